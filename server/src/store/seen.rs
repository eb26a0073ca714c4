//! What administration sees of a queue and of its tasks, and what it does to them.

use bytes::Bytes;

use super::{Millis, Plan, TaskId};

/// How many tasks of a queue are where, and what became of the others: see guarantee 14, conservation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tasks that can be popped.
    pub ready: u64,
    /// Tasks that are not due yet.
    pub scheduled: u64,
    /// Tasks that are held.
    pub leased: u64,
    /// Tasks that were given up, and are kept.
    pub dead: u64,
    /// Tasks ever inserted.
    pub inserted: u64,
    /// Tasks ever acked.
    pub acked: u64,
    /// Tasks ever gone because their time was over, or that of dead letters.
    pub expired: u64,
    /// Tasks ever deleted one by one.
    pub deleted: u64,
    /// Tasks ever purged.
    pub purged: u64,
    /// Of the task at the head, how long ago it was inserted; nothing if none is ready, or if that cannot be told.
    pub oldest_ready: Option<Millis>,
    /// Whether nothing is delivered, by the queue's settings.
    pub paused: bool,
}

/// Where a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It can be popped.
    Ready,
    /// It is not due yet.
    Scheduled,
    /// It is held.
    Leased,
    /// It was given up, and is kept.
    Dead,
}

/// Why a task became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It failed too often.
    Failures,
    /// Its leases ran out too often.
    Expiries,
    /// Its holder rejected it.
    Rejected,
}

/// A task as administration sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The task.
    pub id: TaskId,
    /// Where it is.
    pub state: State,
    /// Scheduled: when it falls due. Leased: when the lease runs out. Dead: when it died.
    pub at: Option<Millis>,
    /// As it was inserted.
    pub envelope: Bytes,
    /// When it was inserted.
    pub inserted_at: Millis,
    /// When its time is over.
    pub ends_at: Option<Millis>,
    /// As it was inserted.
    pub plan: Plan,
    /// Deliveries so far, one under way included.
    pub deliveries: u32,
    /// How often its holders said that it failed.
    pub failures: u32,
    /// Leases that ran out so far.
    pub expiries: u32,
    /// What its holder said when it failed or was rejected the last time; empty if never.
    pub last_error: String,
    /// Why it is dead.
    pub cause: Option<Cause>,
    /// It is held, and goes when it would go back.
    pub cancelled: bool,
}

/// Where in a list of tasks to go on, as the store understands it.
pub type Place = Vec<u8>;

/// A page of a list of tasks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskPage {
    /// At most as many as were asked for; fewer, even none, though more may follow.
    pub tasks: Vec<Seen>,
    /// Where to go on. Nothing: that was all.
    pub next: Option<Place>,
}

/// What became of a task that was to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone.
    Gone,
    /// It is held. Its holder is told, may still ack it, and it goes when it would go back.
    Cancelled,
    /// There is no such task in the queue.
    Unknown,
}

/// What became of a dead letter that was to go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redriven {
    /// It is ready, at the tail; its failures and expiries are counted anew.
    Ready,
    /// Another task has its unique key. It stays dead.
    Duplicate,
    /// Its time was over, or it was kept long enough: it is gone.
    Expired,
    /// There is no such dead letter in the queue.
    Unknown,
}
