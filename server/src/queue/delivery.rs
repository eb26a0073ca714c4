//! Deliveries that may not reach anybody.
//!
//! From the moment the store leases a task until its answer is handed to HTTP/2, the task hangs on an [`Unsent`]. Whatever
//! ends the call in between, a cancelled call, a passed deadline, a broken connection, a panic, drops it, and dropping it
//! gives the task back to the head of its queue, uncounted.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{Queues, task::Task};
use crate::store::{Attempt, QueueName, Release, StoreError, Token, Withdrawal};

/// The first pause between tries to give tasks back to a store that is away or has too much to do, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Tasks on their way to a worker.
pub struct Delivery {
    /// At least one.
    pub tasks: Vec<Task>,
    /// Gives them back unless it is told that they were handed over.
    pub unsent: Unsent,
}

/// Leased tasks that were not handed over so far.
#[must_use = "dropping it gives the tasks back"]
pub struct Unsent {
    leases: Option<Leases>,
}

struct Leases {
    queues: Queues,
    queue: QueueName,
    which: Which,
    run_out: Instant,
    /// The server does not stop before this is decided.
    _undecided: TaskTrackerToken,
}

enum Which {
    /// These, which a pop was answered with.
    Answered(Vec<Token>, Option<Attempt>),
    /// Whatever a pop leased or will lease, whose answer was lost.
    Unanswered(Withdrawal),
}

impl Unsent {
    /// The deliveries that the store has answered.
    pub(super) fn answered(
        queues: &Queues,
        queue: &QueueName,
        tokens: Vec<Token>,
        attempt: Option<Attempt>,
        lease: Duration,
    ) -> Self {
        Self::new(queues, queue, Which::Answered(tokens, attempt), lease)
    }

    /// The deliveries of a pop of which nobody knows whether the store has done it.
    pub(super) fn unanswered(queues: &Queues, queue: &QueueName, pop: Withdrawal, lease: Duration) -> Self {
        Self::new(queues, queue, Which::Unanswered(pop), lease)
    }

    fn new(queues: &Queues, queue: &QueueName, which: Which, lease: Duration) -> Self {
        let leases = Leases {
            queues: queues.clone(),
            queue: queue.clone(),
            which,
            run_out: Instant::now() + lease,
            _undecided: queues.background.token(),
        };
        Self { leases: Some(leases) }
    }

    /// The answer left for good: from here on the leases run.
    pub fn handed_over(mut self) {
        self.leases = None;
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        if let Some(leases) = self.leases.take() {
            let queues = leases.queues.clone();
            queues.spawn(leases.give_back());
        }
    }
}

impl Leases {
    /// Tries until the store did it, or the leases ran out, which puts the tasks back as well.
    async fn give_back(self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let done = match &self.which {
                Which::Answered(tokens, attempt) => {
                    let release = Release::Unsent(tokens.clone(), *attempt);
                    self.queues.release(&self.queue, release).await.map(drop)
                }
                Which::Unanswered(pop) => self.queues.withdraw(&self.queue, pop.clone()).await,
            };
            match done {
                Ok(()) => return,
                Err(StoreError::Unavailable { .. } | StoreError::Overloaded(_))
                    if Instant::now() + pause < self.run_out =>
                {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Err(error) => {
                    return tracing::warn!(
                        %error, queue = ?self.queue,
                        "could not give back tasks that were not handed over; their leases will run out"
                    );
                }
            }
        }
    }
}
