//! Takes back leases that ran out in queues where nobody pops. Pops and looks do it by themselves in the others, so
//! this serves nobody who waits: it goes round slowly.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    queue::Waits,
    store::{ReapCursor, Store, StoreError},
};

/// Between two steps.
const EVERY: Duration = Duration::from_millis(700);
/// The most queues that a step visits.
const QUEUES_PER_STEP: usize = 256;
/// The most parts of the registry that a step reads; most are small or empty.
const PARTS_PER_STEP: usize = 32;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Queues that were visited.
    pub queues: usize,
    /// Leases that were taken back.
    pub reclaimed: u64,
}

/// Goes round the queues of a store.
pub struct Reaper {
    store: Arc<dyn Store>,
    waits: Arc<Waits>,
    cursor: ReapCursor,
}

impl Reaper {
    /// Begins at the beginning.
    pub fn new(store: Arc<dyn Store>, waits: Arc<Waits>) -> Self {
        Self { store, waits, cursor: ReapCursor::default() }
    }

    /// Visits the next queues, within the budget of a step, and at most each once.
    pub async fn run_once(&mut self) -> Result<Step, StoreError> {
        let mut step = Step::default();
        for _ in 0..PARTS_PER_STEP {
            let reaped = self.store.reap(self.cursor, QUEUES_PER_STEP - step.queues).await?;
            self.cursor = reaped.next;
            step.queues += reaped.visited;
            for (queue, count) in reaped.reclaimed {
                step.reclaimed += count;
                self.waits.wake(&queue, usize::try_from(count).unwrap_or(usize::MAX));
            }
            if self.cursor == ReapCursor::default() || step.queues >= QUEUES_PER_STEP {
                break;
            }
        }
        Ok(step)
    }

    /// Steps for ever.
    pub async fn run(mut self) {
        loop {
            sleep(EVERY).await;
            match self.run_once().await {
                Ok(Step { reclaimed: 0, .. }) => {}
                Ok(step) => tracing::debug!(step.queues, step.reclaimed, "took back leases that ran out"),
                Err(error) => tracing::debug!(%error, "could not look for leases that ran out"),
            }
        }
    }
}
