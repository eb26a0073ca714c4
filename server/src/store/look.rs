//! What those who wait on queues are told of them, and what the reaper is.

use std::sync::Arc;

use super::{Millis, QueueName};

/// What is to be seen of a queue after a step's worth of what its time had come for was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// How many tasks are ready now; none while the queue is paused.
    pub ready: u64,
    /// How long until the first lease runs out or the first task falls due; 0 if that of one has come, and the step left it.
    /// Nothing while the queue is paused.
    pub due_in: Option<Millis>,
    /// How many tasks became ready by this step.
    pub reclaimed: u64,
}

/// Where a round of the reaper goes on. The default is the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReapCursor {
    /// Which part of the registry of queues.
    pub part: u32,
    /// The position in it, as the store understands it.
    pub position: u64,
}

/// What one step of the reaper saw.
#[derive(Clone, Debug, Default)]
pub struct Reaped {
    /// The queues that were visited.
    pub visited: usize,
    /// Those in which tasks became ready, because their leases ran out or because they fell due, and how many.
    pub reclaimed: Vec<(QueueName, u64)>,
    /// Where to go on; the default when the round is complete.
    pub next: ReapCursor,
}

/// Called with hints from other servers: this queue has got so many tasks.
pub type OnWake = Arc<dyn Fn(&QueueName, usize) + Send + Sync>;
