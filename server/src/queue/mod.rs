//! The core: what a call may ask, what it means, who waits for what.
//!
//! Handlers translate, this module decides, the store persists. Nothing here knows gRPC.

mod admin;
mod consume;
mod delivery;
mod error;
mod limits;
mod pop_batch;
mod produce;
mod task;
#[cfg(test)]
mod tests;
mod uncancelled;
mod waits;

use std::{ops::Deref, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use data_queue_proto::reason;

use self::uncancelled::uncancelled;
pub use self::{
    admin::{
        Activity, Given, ImportedTask, QueuePage, Redrive, RedriveDone, SettingChange, TaskDetails, TaskList, Watch,
    },
    consume::{
        ConsumeAnswer, ConsumeCall, ConsumeMessage, ConsumeOpen, Ended, MAX_OUTSTANDING, Outlet, Tokens, Unread,
    },
    delivery::{Delivery, Unsent},
    error::{Error, Invalid},
    limits::{Limits, MAX_BATCH, MAX_DELAY, MAX_LEASE, MAX_POP_BATCH, MAX_WAIT, MIN_LEASE, Span},
    pop_batch::PopBatchCall,
    produce::{ProduceAnswer, ProduceEnd, ProduceMessage},
    task::{Content, NewTask, Task, Timing, Value},
    waits::{Seat, Waits},
};
use crate::store::{
    Admin, Attempt, Beaten, Clock, Due, Fingerprint, Insert, Inserted, Leased, Millis, NewTask as StoredTask, Outcome,
    Pop, PopRequest, PutBack, QueueName, Release, Released, RequestKey, Stem, StoreError, SystemClock, TaskId, Token,
    Withdrawal,
};

/// The envelopes in one message of a PopBatch have about this size at most, in bytes, unless a single one has more.
const MESSAGE_BYTES: usize = 1 << 20;

/// When the store has too much to do, a pop that waits looks again after this.
const OVERLOADED_FOR: Duration = Duration::from_millis(100);

/// How long before its caller's deadline a waiting pop answers, at most; at least a quarter of what it has.
const ANSWER_BEFORE_DEADLINE: Duration = Duration::from_millis(50);

/// Inserts tasks.
#[derive(Debug)]
pub struct InsertCall {
    /// The queue's name, unchecked like the rest.
    pub queue: String,
    /// What to insert.
    pub tasks: Vec<NewTask>,
    /// Empty: do not remember.
    pub request_id: String,
    /// Of the whole request but its id and durability; looked at if there is one.
    pub fingerprint: Fingerprint,
    /// What it is to have reached, by its number in the contract.
    pub durability: i32,
}

/// Pops one task.
#[derive(Debug)]
pub struct PopCall {
    /// The queue's name, unchecked like the rest.
    pub queue: String,
    /// How long to hold it.
    pub lease: Option<Span>,
    /// How long to wait for it.
    pub wait: Option<Span>,
    /// Empty: do not remember.
    pub request_id: String,
    /// Of the lease and the acks; looked at if there is a request id.
    pub fingerprint: Fingerprint,
    /// Tokens to ack first.
    pub acks: Vec<String>,
    /// When the caller stops listening.
    pub deadline: Option<Instant>,
}

/// Gives tasks back that the caller holds.
#[derive(Clone, Debug, Default)]
pub struct PutBackCall {
    /// Unchecked like the rest.
    pub lease_tokens: Vec<String>,
    /// After how long they can be popped again.
    pub delay: Option<Span>,
    /// They failed.
    pub failed: bool,
    /// They are to become dead letters.
    pub dead_letter: bool,
    /// Why.
    pub reason: String,
}

impl PutBackCall {
    /// Checks all but the number of tokens. `message` is where the fields are.
    fn check(self, message: &str) -> Result<PutBack, Error> {
        let tokens = limits::tokens(&format!("{message}.lease_tokens"), &self.lease_tokens)?;
        let delay = limits::delay(&format!("{message}.delay"), self.delay)?;
        limits::reason_text(&format!("{message}.reason"), &self.reason)?;
        let Self { failed, dead_letter, reason, .. } = self;
        let chance = if failed { (getrandom::u32()? >> 16) as u16 } else { 0 };
        Ok(PutBack { tokens, delay, failed, dead_letter, reason, chance })
    }
}

/// All queues, as one thread reaches them. Every delivery has a copy.
#[derive(Clone)]
pub struct Queues(Arc<Reach>);

/// What calls need.
pub struct Reach {
    store: Arc<dyn Admin>,
    waits: Arc<Waits>,
    limits: Limits,
    stopping: CancellationToken,
    background: TaskTracker,
}

impl Deref for Queues {
    type Target = Reach;

    fn deref(&self) -> &Reach {
        &self.0
    }
}

impl Queues {
    /// `waits` is the process' own; `stopping` ends all waiting; `background` is what must end before the process does.
    pub fn new(
        store: Arc<dyn Admin>,
        waits: Arc<Waits>,
        limits: Limits,
        stopping: CancellationToken,
        background: TaskTracker,
    ) -> Self {
        Self(Arc::new(Reach { store, waits, limits, stopping, background }))
    }

    /// Inserts all tasks or none, and wakes those who wait for them.
    pub async fn insert(&self, call: InsertCall) -> Result<Inserted, Error> {
        let queue = limits::queue(&call.queue)?;
        limits::request_id(&call.request_id)?;
        let durability = limits::durability("durability", call.durability)?;
        let tasks = self.stored(call.tasks)?;
        let due = first_due(&tasks);
        let request = request_key(call.request_id, call.fingerprint);
        let insert = Insert { tasks, request, waiting_here: self.waits.waiting(&queue), durability };

        // A caller who leaves must not keep the waiters from being woken.
        let this = self.clone();
        uncancelled(&self.background, async move {
            let inserted = this.store.insert(&queue, insert).await?;
            if !inserted.replayed {
                this.wake_for(&queue, inserted.ids.len() - inserted.duplicates.len(), due);
            }
            Ok(inserted)
        })
        .await
    }

    /// Checks the tasks of an insert, and packs them.
    fn stored(&self, tasks: Vec<NewTask>) -> Result<Vec<StoredTask>, Error> {
        limits::batch("tasks", tasks.len(), MAX_BATCH, "tasks")?;
        for (at, task) in tasks.iter().enumerate() {
            self.limits.value(at, task.value.as_ref())?;
            limits::headers(at, &task.headers)?;
        }
        let ids = TaskId::mint(tasks.len())?;
        ids.into_iter().zip(tasks).enumerate().map(|(at, (id, task))| Ok(task.stored(at, id)?)).collect()
    }

    /// Wakes those who wait for new tasks, and has them look again when the first of those that are not due yet is.
    fn wake_for(&self, queue: &QueueName, count: usize, due: Option<Instant>) {
        self.waits.wake(queue, count);
        if let Some(due) = due {
            self.waits.look_at(queue, due);
        }
    }

    /// Acks, then pops a task, waiting for one if asked to.
    pub async fn pop(&self, call: PopCall) -> Result<(Option<Delivery>, Vec<Outcome>), Error> {
        let queue = limits::queue(&call.queue)?;
        let lease = limits::lease(call.lease)?;
        let wait = limits::wait(call.wait)?;
        limits::request_id(&call.request_id)?;
        limits::at_most("ack_lease_tokens", call.acks.len(), MAX_BATCH, "tokens")?;
        let acks = limits::tokens("ack_lease_tokens", &call.acks)?;
        let request = match request_key(call.request_id, call.fingerprint) {
            Some(key) => Some(PopRequest { key, attempt: Attempt::mint()? }),
            None => None,
        };
        let pop = PopPlan { queue, lease, max_tasks: 1, request };
        self.pop_or_wait(&pop, acks, wait_until(wait, call.deadline)).await.map(|found| (found.delivery, found.acks))
    }

    /// Acks.
    pub async fn ack(&self, queue: &str, tokens: &[String]) -> Result<Vec<Outcome>, Error> {
        let queue = limits::queue(queue)?;
        limits::batch("lease_tokens", tokens.len(), MAX_BATCH, "tokens")?;
        let tokens = limits::tokens("lease_tokens", tokens)?;
        Ok(self.store.ack(&queue, &tokens).await?)
    }

    /// Extends leases.
    pub async fn heartbeat(&self, queue: &str, tokens: &[String], lease: Option<Span>) -> Result<Beaten, Error> {
        let queue = limits::queue(queue)?;
        limits::batch("lease_tokens", tokens.len(), MAX_BATCH, "tokens")?;
        let tokens = limits::tokens("lease_tokens", tokens)?;
        let lease = limits::lease(lease)?;
        Ok(self.store.heartbeat(&queue, &tokens, lease).await?)
    }

    /// Gives back what the caller holds.
    pub async fn put_back(&self, queue: &str, call: PutBackCall) -> Result<(Vec<Outcome>, Released), Error> {
        let queue = limits::queue(queue)?;
        limits::batch("tokens.lease_tokens", call.lease_tokens.len(), MAX_BATCH, "tokens")?;
        let put_back = call.check("tokens")?;
        let this = self.clone();
        uncancelled(&self.background, async move { Ok(this.release(&queue, Release::PutBack(put_back)).await?) }).await
    }

    /// Gives back what anybody has held for so long.
    pub async fn put_back_held(&self, queue: &str, held_for: Span) -> Result<Released, Error> {
        let queue = limits::queue(queue)?;
        let held_for = limits::held_for(held_for)?;
        let this = self.clone();
        uncancelled(&self.background, async move {
            let released = this.store.release_held(&queue, held_for).await?;
            this.waits.wake(&queue, usize::try_from(released.ready).unwrap_or(usize::MAX));
            Ok(released)
        })
        .await
    }

    /// Refuses a Putback that names neither tokens nor an age.
    pub fn nothing_selected(queue: &str) -> Error {
        if let Err(invalid) = limits::queue(queue) {
            return invalid.into();
        }
        let message = "neither tokens nor held_for is set";
        Error::Invalid(Invalid::new("selection", reason::PUTBACK_SELECTION_MISSING, message))
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError> {
        let (outcomes, released) = self.store.release(queue, release).await?;
        self.waits.wake(queue, usize::try_from(released.ready).unwrap_or(usize::MAX));
        Ok((outcomes, released))
    }

    async fn pop_or_wait(&self, plan: &PopPlan, acks: Vec<Token>, until: Option<Instant>) -> Result<Found, Error> {
        let seat = until.map(|_| Seat::take(&self.waits, &plan.queue));
        let mut found = self.pop_once(plan, acks, seat.is_some()).await?;
        let (Some(until), Some(seat)) = (until, seat) else { return Ok(found) };
        while found.delivery.is_none() {
            if let Some(due) = found.due {
                self.waits.look_at(&plan.queue, due);
            }
            tokio::select! {
                () = seat.woken() => {}
                () = sleep_until(until) => break,
                () = self.stopping.cancelled() => break,
            }
            match self.pop_once(plan, Vec::new(), true).await {
                Ok(next) => found = Found { acks: found.acks, ..next },
                // It waits anyway.
                Err(Error::Store(StoreError::Overloaded(_))) => {
                    self.waits.look_at(&plan.queue, Instant::now() + OVERLOADED_FOR);
                }
                // The acks were done.
                Err(Error::Store(error)) if !found.acks.is_empty() => return Err(error.after_others().into()),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// One step of the store, which goes on when its caller leaves: what it leased is dropped then, and that gives it back.
    async fn pop_once(&self, plan: &PopPlan, acks: Vec<Token>, will_wait: bool) -> Result<Found, Error> {
        let (this, queue) = (self.clone(), plan.queue.clone());
        let lease = plan.lease.map_or(MAX_LEASE, Duration::from_millis);
        let request = plan.request.clone();
        let (stem, max_tasks) = (Stem::mint()?, plan.max_tasks);
        let pop = Pop {
            acks,
            max_tasks,
            max_bytes: MESSAGE_BYTES,
            lease: plan.lease,
            stem,
            request: plan.request.clone(),
            will_wait,
            consumer: None,
            spent: Vec::new(),
        };
        uncancelled(&self.background, async move {
            let popped = match this.store.pop(&queue, pop).await {
                Ok(popped) => popped,
                Err(error) => {
                    if matches!(error, StoreError::Unavailable { did_not_run: false, .. }) {
                        drop(Unsent::unanswered(&this, &queue, Withdrawal { stem, max_tasks, request }, lease));
                    }
                    return Err(error.into());
                }
            };
            if popped.reclaimed > 0 && popped.ready > 0 {
                this.waits.wake(&queue, usize::try_from(popped.ready).unwrap_or(usize::MAX));
            }
            let attempt = request.map(|request| request.attempt);
            // What was answered says how long it is held.
            let left = popped.tasks.iter().map(|task| task.left).max().map_or(lease, Duration::from_millis);
            Ok(Found {
                delivery: this.deliver(&queue, popped.tasks, attempt, left)?,
                acks: popped.acks,
                ready: popped.ready,
                known: popped.known,
                due: popped.due_in.map(|due_in| Instant::now() + Duration::from_millis(due_in)),
            })
        })
        .await
    }

    /// A task that cannot be read, because a newer server wrote it, must not stand in the way of the others: it is not
    /// given back to the head, but left to its lease.
    fn deliver(
        &self,
        queue: &QueueName,
        leased: Vec<Leased>,
        attempt: Option<Attempt>,
        lease: Duration,
    ) -> Result<Option<Delivery>, Error> {
        let (mut tasks, mut tokens, mut failed) =
            (Vec::with_capacity(leased.len()), Vec::with_capacity(leased.len()), None);
        for one in leased {
            let token = one.token;
            match task::unpack(one) {
                Ok(task) => {
                    tasks.push(task);
                    tokens.push(token);
                }
                Err(error) => failed = Some(error),
            }
        }
        match (tasks.is_empty(), failed) {
            (true, Some(error)) => return Err(error),
            (true, None) => return Ok(None),
            (false, Some(error)) => tracing::error!(%error, "a task was left out of a delivery"),
            (false, None) => {}
        }
        Ok(Some(Delivery { tasks, unsent: Unsent::answered(self, queue, tokens, attempt, lease) }))
    }

    async fn withdraw(&self, queue: &QueueName, pop: Withdrawal) -> Result<(), StoreError> {
        let back = self.store.withdraw(queue, pop).await?;
        self.waits.wake(queue, usize::try_from(back).unwrap_or(usize::MAX));
        Ok(())
    }

    /// Runs work that must end before the process does. A runtime that is being torn down drops it.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Ok(runtime) = Handle::try_current() {
            self.background.spawn_on(work, &runtime);
        }
    }
}

/// A pop whose fields were checked.
struct PopPlan {
    queue: QueueName,
    lease: Option<Millis>,
    max_tasks: usize,
    request: Option<PopRequest>,
}

struct Found {
    delivery: Option<Delivery>,
    acks: Vec<Outcome>,
    ready: u64,
    /// The request was answered with a delivery before.
    known: bool,
    due: Option<Instant>,
}

fn request_key(id: String, fingerprint: Fingerprint) -> Option<RequestKey> {
    (!id.is_empty()).then_some(RequestKey { id, fingerprint })
}

/// When the first of these tasks falls due that do not at once. By the store's clock that may be a little later.
fn first_due(tasks: &[StoredTask]) -> Option<Instant> {
    let span = |task: &StoredTask| match task.due? {
        Due::In(span) => Some(span),
        // The wall clock of this machine is near enough for a hint.
        Due::At(time) => Some(time.saturating_sub(SystemClock::default().now())),
    };
    let first = tasks.iter().filter_map(span).min()?;
    Some(Instant::now() + Duration::from_millis(first))
}

/// Until when to wait: nothing if not at all, and not so long that the caller's deadline passes.
fn wait_until(wait: Duration, deadline: Option<Instant>) -> Option<Instant> {
    let now = Instant::now();
    let until = now + wait;
    let answer_by = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(now);
        deadline - ANSWER_BEFORE_DEADLINE.min(left / 4)
    });
    (!wait.is_zero()).then(|| answer_by.map_or(until, |answer_by| until.min(answer_by)))
}
