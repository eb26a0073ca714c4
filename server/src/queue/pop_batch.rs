//! PopBatch: many tasks, popped in steps as the stream is read.
//!
//! A batch that is to be repeatable gives each step a request of its own, numbered from 0. A repetition first asks for what the
//! steps before it still hold, until it comes to a number that was never used; from there on it pops anew.

use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::time::Instant;

use super::{Delivery, Error, Found, PopPlan, Queues, Span, limits, request_key, wait_until};
use crate::store::{Attempt, Fingerprint, Millis, PopRequest, QueueName, RECLAIM_STEP, RequestKey};

/// Pops many tasks.
#[derive(Debug)]
pub struct PopBatchCall {
    /// The queue's name, unchecked like the rest.
    pub queue: String,
    /// How many at most.
    pub max_tasks: u32,
    /// How long to hold each.
    pub lease: Option<Span>,
    /// The stream ends when nothing came for this long.
    pub wait: Option<Span>,
    /// Empty: do not remember.
    pub request_id: String,
    /// Of the lease and the number of tasks; looked at if there is a request id.
    pub fingerprint: Fingerprint,
    /// When the caller stops listening.
    pub deadline: Option<Instant>,
}

impl Queues {
    /// Pops tasks as the stream is read: each item is one message, and nothing is popped before it is asked for.
    pub fn pop_batch(
        &self,
        call: PopBatchCall,
    ) -> Result<impl Stream<Item = Result<Delivery, Error>> + Send + use<>, Error> {
        let queue = limits::queue(&call.queue)?;
        limits::max_tasks(call.max_tasks)?;
        let lease = limits::lease(call.lease)?;
        let wait = limits::wait(call.wait)?;
        limits::request_id(&call.request_id)?;
        let repeatable = match request_key(call.request_id, call.fingerprint) {
            Some(key) => Some(Steps { key, attempt: Attempt::mint()?, next: 0, recalls: true }),
            None => None,
        };
        let left = call.max_tasks as usize;
        let batch = Batch { queues: self.clone(), queue, lease, wait, deadline: call.deadline, left, repeatable };
        Ok(stream::try_unfold(batch, |mut batch| async move { Ok(batch.next().await?.map(|next| (next, batch))) }))
    }
}

struct Batch {
    queues: Queues,
    queue: QueueName,
    lease: Option<Millis>,
    wait: Duration,
    deadline: Option<Instant>,
    left: usize,
    repeatable: Option<Steps>,
}

/// The steps of a batch that can be repeated.
struct Steps {
    key: RequestKey,
    attempt: Attempt,
    next: u32,
    /// The steps so far were another try's.
    recalls: bool,
}

impl Steps {
    /// The request of the next step. An id that a caller gives has no such end by accident.
    fn request(&self) -> PopRequest {
        let id = format!("{}\0{}", self.key.id, self.next);
        PopRequest { key: RequestKey { id, ..self.key.clone() }, attempt: self.attempt }
    }
}

impl Batch {
    async fn next(&mut self) -> Result<Option<Delivery>, Error> {
        while self.left > 0 && !self.queues.stopping.is_cancelled() {
            let request = self.repeatable.as_ref().map(Steps::request);
            let recalls = self.repeatable.as_ref().is_some_and(|steps| steps.recalls);
            let max_tasks = if recalls { 0 } else { self.left.min(RECLAIM_STEP) };
            let plan = PopPlan { queue: self.queue.clone(), lease: self.lease, max_tasks, request };
            let found = match recalls {
                true => self.queues.pop_once(&plan, Vec::new(), false).await?,
                false => self.queues.pop_or_wait(&plan, Vec::new(), wait_until(self.wait, self.deadline)).await?,
            };
            self.note(&found);
            match found.delivery {
                Some(delivery) => {
                    self.left = self.left.saturating_sub(delivery.tasks.len());
                    if !recalls && self.wait.is_zero() && found.ready == 0 {
                        self.left = 0;
                    }
                    return Ok(Some(delivery));
                }
                None if recalls => {}
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    fn note(&mut self, found: &Found) {
        if let Some(steps) = &mut self.repeatable {
            let was_used = found.known || found.delivery.is_some();
            steps.next += u32::from(was_used);
            steps.recalls &= was_used;
        }
    }
}
