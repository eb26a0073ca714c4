//! What a store keeps, and the traits it is reached through. No connection and no engine type appears here.
//!
//! A store persists and decides nothing else: limits, waiting and defaults belong to [`crate::queue`]. Every method that
//! changes a task's state does it in one step of the store (a script, a transaction, a locked section), so that a process
//! that dies in between leaves either the state before or the state after. Time is the store's own.
//!
//! Ids and tokens are made by the caller and passed in, so that a step that runs twice finds them and changes nothing.

mod backend;
mod clock;
mod holders;
mod ident;
mod lanes;
pub mod memory;
pub mod redis;
pub mod sqlite;

#[cfg(test)]
mod conformance;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

pub use backend::Backend;
pub use clock::{Clock, SystemClock};
pub use ident::{Attempt, Fingerprint, QueueName, QueueNameError, SessionId, Stem, TaskId, Token, TokenError};
pub(crate) use ident::{MintedMap, MintedState, hex};

/// Milliseconds: a span, or a point in time since the Unix epoch by the store's clock.
pub type Millis = u64;

/// The most expired leases that one step takes back. More are taken back in further steps, those with the latest
/// deadlines first: each step puts its tasks in front, so that the ones held longest end at the head.
pub const RECLAIM_STEP: usize = 200;

/// How many answers of a producer are remembered, the latest ones.
pub const PRODUCER_ANSWERS: usize = 1_024;

/// When the envelopes on a page of tasks have about so many bytes, no further task is on it.
const PAGE_BYTES: usize = 1 << 20;

/// For how long a withdrawn pop may still arrive, and then leases nothing.
const WITHDRAWN_FOR: Millis = 60_000;

/// For how long a session is known after the last step of its stream.
const SESSION_KEPT: Millis = 600_000;

/// How a store remembers request ids and acked tokens.
#[derive(Clone, Copy, Debug)]
pub struct Remember {
    /// How long an entry is remembered at least; it is forgotten after at most twice this.
    pub window: Millis,
    /// The most entries of a kind that a queue remembers; at least the newest half of them.
    pub entries: u64,
}

impl Remember {
    /// The most producers that a queue remembers; those that inserted last.
    pub fn producers(&self) -> u64 {
        (self.entries / 100).max(1)
    }

    /// Whether a producer that inserted something last at this time is forgotten.
    fn has_forgotten_producer(&self, inserted_at: Millis, now: Millis) -> bool {
        now >= inserted_at + 2 * self.window
    }
}

/// What a store is told of the rules of queues: where a queue's settings say nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How requests and acks are remembered.
    pub remember: Remember,
    /// How long a pop or heartbeat that does not say holds a task.
    pub lease: Millis,
    /// A task whose holders said so often that it failed is a dead letter. At least 1.
    pub max_failures: u32,
    /// A task whose leases ran out so often is a dead letter. At least 1.
    pub max_expiries: u32,
    /// After how long a task that failed can be popped again.
    pub backoff: Backoff,
}

/// The rules of most tests.
#[cfg(test)]
pub(crate) const TEST_RULES: Rules = Rules {
    remember: Remember { window: 300_000, entries: 1_000_000 },
    lease: 30_000,
    max_failures: 20,
    max_expiries: 20,
    backoff: Backoff { min: 1_000, max: 60_000 },
};

/// A thing that can be set for a queue. Its value is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Setting {
    /// [`Rules::lease`], in milliseconds.
    Lease,
    /// [`Rules::max_failures`].
    MaxFailures,
    /// [`Rules::max_expiries`].
    MaxExpiries,
    /// [`Backoff::min`], in milliseconds.
    BackoffMin,
    /// [`Backoff::max`], in milliseconds.
    BackoffMax,
    /// The most tasks that are ready, scheduled or leased: an insert of more is refused. Unset: any number.
    MaxTasks,
    /// The most bytes that the envelopes of these may have in all. Unset: any number.
    MaxBytes,
    /// How long dead letters are kept, in milliseconds; then they are gone as if their time was over. Unset: for ever.
    DeadLetterRetention,
    /// 1: nothing is delivered. What is held may be finished.
    Paused,
}

impl Setting {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Lease,
        Self::MaxFailures,
        Self::MaxExpiries,
        Self::BackoffMin,
        Self::BackoffMax,
        Self::MaxTasks,
        Self::MaxBytes,
        Self::DeadLetterRetention,
        Self::Paused,
    ];

    /// Under which a store keeps it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::MaxFailures => "max_failures",
            Self::MaxExpiries => "max_expiries",
            Self::BackoffMin => "backoff_min",
            Self::BackoffMax => "backoff_max",
            Self::MaxTasks => "max_tasks",
            Self::MaxBytes => "max_bytes",
            Self::DeadLetterRetention => "dead_letter_retention",
            Self::Paused => "paused",
        }
    }
}

/// What is set for a queue; where nothing is, the rules hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<Setting, u64>);

impl Settings {
    /// What it is set to.
    pub fn get(&self, setting: Setting) -> Option<u64> {
        self.0.get(&setting).copied()
    }

    /// Sets it, or leaves it to the rules.
    pub fn set(&mut self, setting: Setting, value: Option<u64>) {
        match value {
            Some(value) => self.0.insert(setting, value),
            None => self.0.remove(&setting),
        };
    }

    /// Whether nothing is delivered.
    pub fn paused(&self) -> bool {
        self.get(Setting::Paused).is_some_and(|value| value != 0)
    }

    /// The rules of this queue.
    pub fn over(&self, rules: Rules) -> Rules {
        let count = |setting, rule: u32| self.get(setting).map_or(rule, |value| value.min(u32::MAX.into()) as u32);
        Rules {
            remember: rules.remember,
            lease: self.get(Setting::Lease).unwrap_or(rules.lease),
            max_failures: count(Setting::MaxFailures, rules.max_failures),
            max_expiries: count(Setting::MaxExpiries, rules.max_expiries),
            backoff: Backoff {
                min: self.get(Setting::BackoffMin).unwrap_or(rules.backoff.min),
                max: self.get(Setting::BackoffMax).unwrap_or(rules.backoff.max),
            },
        }
    }
}

/// After how long a task that failed can be popped again: `min` after the first failure, twice as long after each further one,
/// at most `max`; and up to a quarter of that longer, at random, so that what failed together does not come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure. 0: at once, whatever the number of failures.
    pub min: Millis,
    /// At most, the random part left out.
    pub max: Millis,
}

impl Backoff {
    /// `chance` is what the random part is made of. `nth` counts the tasks that one call puts back: they are spread.
    pub(crate) fn after(&self, failures: u32, chance: u16, nth: usize) -> Millis {
        let doubled = self.min.saturating_mul(1 << failures.saturating_sub(1).min(40));
        let span = doubled.min(self.max.max(self.min));
        // The golden ratio of 2^16: neighbours end up far apart.
        let part = (u64::from(chance) + 40_503 * nth as u64) % 65_536;
        span + (span / 4) * part / 65_536
    }
}

/// The highest priority; 0 is the lowest, and the one of plain tasks.
pub const MAX_PRIORITY: u8 = 9;

/// A task to insert. The envelope is opaque here.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Minted by the caller. It tells whether there is a plan: stores look at that, and need not look for plans.
    pub id: TaskId,
    /// What comes back at each delivery, byte for byte.
    pub envelope: Bytes,
    /// When it can be popped first. Nothing: at once, at the tail.
    pub due: Option<Due>,
    /// Nothing for most.
    pub plan: Option<Box<Plan>>,
}

impl NewTask {
    /// A task that is ready at once. The id says from now on whether there is a plan.
    pub fn new(id: TaskId, envelope: Bytes, plan: Option<Plan>) -> Self {
        let plan = plan.filter(|plan| *plan != Plan::default()).map(Box::new);
        Self { id: id.with_plan(plan.is_some()), envelope, due: None, plan }
    }
}

/// When a task falls due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// So long after its insert.
    In(Millis),
    /// At this time; one that has passed is now.
    At(Millis),
}

impl Due {
    /// By the store's clock.
    pub(crate) fn at(self, now: Millis) -> Millis {
        match self {
            Self::In(span) => now + span,
            Self::At(time) => time,
        }
    }
}

/// What sets a task apart for as long as it lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// 0 to [`MAX_PRIORITY`]: tasks of a higher one come first, whenever they were inserted.
    pub priority: u8,
    /// So long after its insert the task is gone, unless it is held then. Then it goes when it would go back.
    pub ttl: Option<Millis>,
    /// While a task with this key is ready, scheduled or leased, no other one is inserted with it.
    pub unique_key: Option<String>,
}

/// A request id, with what the request was about.
#[derive(Clone, Debug)]
pub struct RequestKey {
    /// The caller's text.
    pub id: String,
    /// Of the request's content: the same id with another fingerprint is refused.
    pub fingerprint: Fingerprint,
}

/// An insert: all of the tasks or none, at the tail, in this order.
#[derive(Clone, Debug)]
pub struct Insert {
    /// At least one.
    pub tasks: Vec<NewTask>,
    /// Set if the insert is to be remembered.
    pub request: Option<RequestKey>,
    /// How many pops of this server wait on the queue: other servers are told only about tasks beyond these. A hint.
    pub waiting_here: usize,
}

/// What an insert did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inserted {
    /// One for each task, in order: of the first call if this one was a repetition; of a duplicate, of the task that has its
    /// unique key.
    pub ids: Vec<TaskId>,
    /// Which of them are duplicates and were not inserted, by their positions in ascending order.
    pub duplicates: Vec<usize>,
    /// True if the request id was known and nothing was inserted.
    pub replayed: bool,
}

/// Inserts that a producer has numbered.
#[derive(Clone, Debug)]
pub struct Produce {
    /// Names the producer in its queue.
    pub producer: String,
    /// At least one; their numbers ascend. At most [`RECLAIM_STEP`] tasks in all, or one insert.
    pub inserts: Vec<NumberedInsert>,
    /// As in an insert.
    pub waiting_here: usize,
}

/// One of them: all of its tasks or none.
#[derive(Clone, Debug)]
pub struct NumberedInsert {
    /// At least 1.
    pub number: u64,
    /// Of the insert's content: the same number with another fingerprint is refused.
    pub fingerprint: Fingerprint,
    /// At least one.
    pub tasks: Vec<NewTask>,
}

/// What became of a producer's inserts.
#[derive(Debug, Default)]
pub struct Produced {
    /// One for each of the first inserts, in order: those that are done. Replayed if the tasks are those of an earlier call.
    pub inserted: Vec<Inserted>,
    /// Why the insert behind those was not done, nor any behind that. Nothing if all are done.
    pub refused: Option<StoreError>,
}

/// What makes a pop repeatable.
#[derive(Clone, Debug)]
pub struct PopRequest {
    /// The caller's request id and what it asked for.
    pub key: RequestKey,
    /// Names this try of the request; every try that was answered with a delivery has to disown it before it is unsent.
    pub attempt: Attempt,
}

/// A pop: acks first, then leases from the head.
#[derive(Clone, Debug)]
pub struct Pop {
    /// Tokens to ack, whatever is then found.
    pub acks: Vec<Token>,
    /// The most tasks to lease, at most [`RECLAIM_STEP`]. 0: only answer what an earlier try of the request still holds.
    pub max_tasks: usize,
    /// The envelopes' size after which no further task is leased; the first one is, whatever its size.
    pub max_bytes: usize,
    /// How long the tasks are held; nothing: as the queue's settings or the rules say.
    pub lease: Option<Millis>,
    /// The tokens are this stem and the position in the batch.
    pub stem: Stem,
    /// Set if the pop is to be remembered.
    pub request: Option<PopRequest>,
    /// True if the caller will wait when nothing is found: other servers then tell this one about inserts.
    pub will_wait: bool,
    /// Set if the leases belong to a stream.
    pub consumer: Option<Consumer>,
    /// Earlier pops of the stream that have no leases left: the session need not know them any more. A hint.
    pub spent: Vec<Stem>,
}

/// A stream of deliveries, and the session that its leases belong to. The stream that came last has the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consumer {
    /// Of the client.
    pub session: SessionId,
    /// This stream.
    pub stream: Attempt,
}

/// A delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    /// The proof of the hold.
    pub token: Token,
    /// The task.
    pub id: TaskId,
    /// As it was inserted.
    pub envelope: Bytes,
    /// When it was inserted.
    pub inserted_at: Millis,
    /// Deliveries so far, this one included.
    pub deliveries: u32,
    /// How often its holders said that it failed.
    pub failures: u32,
    /// Leases that ran out so far.
    pub expiries: u32,
    /// How much of the lease is left.
    pub left: Millis,
    /// When the lease runs out.
    pub expires_at: Millis,
}

/// What a pop did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Popped {
    /// One for each token to ack, in order.
    pub acks: Vec<Outcome>,
    /// The deliveries, from the head on.
    pub tasks: Vec<Leased>,
    /// How many tasks are ready now; none while the queue is paused.
    pub ready: u64,
    /// How many tasks became ready on the way, because their leases ran out or because they fell due.
    pub reclaimed: u64,
    /// When nothing was found: how long until the first lease runs out or the first task falls due. Nothing while the
    /// queue is paused.
    pub due_in: Option<Millis>,
    /// True if another stream has the session: nothing was leased. The acks were applied.
    pub taken_over: bool,
    /// True if the request is one that was answered with a delivery before, be it by an earlier run of this very call.
    pub known: bool,
}

/// What became of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was the current one, and the step did its work.
    Applied,
    /// Its task was acked with it before.
    AlreadyAcked,
    /// It is not the current one of a task of this queue.
    LeaseLost,
}

/// What a heartbeat did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beaten {
    /// One for each token, in order.
    pub outcomes: Vec<Outcome>,
    /// Of the lease that ends first among those extended: how much is left, and when it ends.
    pub earliest: Option<(Millis, Millis)>,
    /// Of those extended, the ones whose tasks are to be deleted, in order, each once.
    pub cancelled: Vec<Token>,
}

/// What keeping leases did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// One for each token, in order.
    pub outcomes: Vec<Outcome>,
    /// As in [`Beaten`].
    pub cancelled: Vec<Token>,
}

/// A pop whose answer was lost: it may have run, or run later, or never.
#[derive(Clone, Debug)]
pub struct Withdrawal {
    /// Of its tokens.
    pub stem: Stem,
    /// The most tasks that it may lease.
    pub max_tasks: usize,
    /// As in the pop.
    pub request: Option<PopRequest>,
}

/// What became of released tasks. Those whose time was over, and those that were to be deleted, are gone, and not counted here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Tasks that went back: to the head, or to wait until they are due.
    pub put_back: u64,
    /// Of these, the ones that are ready at once.
    pub ready: u64,
    /// Tasks that became dead letters.
    pub dead_lettered: u64,
}

/// Tasks that their holder gives back. The deliveries count. Without a delay they go to the head, in the order of their
/// delivery.
#[derive(Clone, Debug, Default)]
pub struct PutBack {
    /// Of the tasks.
    pub tokens: Vec<Token>,
    /// After how long they can be popped again, at the tail then, in the order in which they fall due; 0 is the head, at once.
    /// Nothing: at once, or for what failed, as the queue's backoff says.
    pub delay: Option<Millis>,
    /// It counts as a failure, and one too many makes a dead letter.
    pub failed: bool,
    /// They become dead letters, whatever their counters say.
    pub dead_letter: bool,
    /// Why: kept as the task's last error if it failed or became a dead letter.
    pub reason: String,
    /// What the random part of the backoff is made of.
    pub chance: u16,
}

/// Which leases to release, and what that counts as.
#[derive(Clone, Debug)]
pub enum Release {
    /// By their holder.
    PutBack(PutBack),
    /// Never handed over: as if they had not been delivered, at the head again in the order of delivery. Only those that no other try was answered with.
    Unsent(Vec<Token>, Option<Attempt>),
}

/// What is to be seen of a queue once what its time had come for was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// As in [`Popped`].
    pub ready: u64,
    /// As in [`Popped`].
    pub due_in: Option<Millis>,
    /// As in [`Popped`].
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
    /// Those in which tasks went back to the head, and how many.
    pub reclaimed: Vec<(QueueName, u64)>,
    /// Where to go on; the default when the round is complete.
    pub next: ReapCursor,
}

/// Called with hints from other servers: this queue has got so many tasks.
pub type OnWake = Arc<dyn Fn(&QueueName, usize) + Send + Sync>;

/// The data path.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Puts tasks at the tail of a queue; the first insert makes it.
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError>;

    /// Puts a producer's inserts at the tail, those that it has not numbered before: their numbers are greater than its
    /// last one. Of the others the remembered answer is given again, as long as it is among the last
    /// [`PRODUCER_ANSWERS`] of the producer. A producer is forgotten when it has inserted nothing for the window twice, or
    /// when [`Remember::producers`] others inserted something after it.
    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError>;

    /// Acks, then takes back expired leases, then leases from the head. An unknown queue is empty and is not made.
    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError>;

    /// Ends tasks.
    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError>;

    /// Moves deadlines to now + `lease`, never to an earlier time. Nothing: the lease of the queue's settings or of the rules.
    async fn heartbeat(&self, queue: &QueueName, tokens: &[Token], lease: Option<Millis>)
    -> Result<Beaten, StoreError>;

    /// Gives leased tasks back. Answers one outcome for each token, in order.
    async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError>;

    /// Gives a session to this stream, and moves the deadlines of its leases to now + `lease` at least, but for those that have
    /// been held for `max_hold`. Answers the tokens of all of them, in the order of their delivery, each with the time since
    /// its delivery or its holder's last heartbeat, which is how long it has been held.
    async fn resume(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
    ) -> Result<Vec<(Token, Millis)>, StoreError>;

    /// Moves deadlines as a heartbeat does, on behalf of a stream that lives; it is no heartbeat of the holder's. Nothing is
    /// moved, nor answered, if another stream has the session. At least one token.
    async fn keep(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
    ) -> Result<Option<Kept>, StoreError>;

    /// Moves deadlines to now + `grace`, never to a later time than they had: the stream has broken. Nothing is moved if another stream
    /// has the session.
    async fn abandon(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
    ) -> Result<(), StoreError>;

    /// Undoes a pop whose answer was lost. What it leased goes back to the head, as if it had not been delivered, unless
    /// another try was answered with it; should it run only within the next minute, it leases nothing. Answers how many
    /// tasks went back.
    async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError>;

    /// Gives back every task whose delivery or last heartbeat is at least this old; each counts as an expiry.
    /// Atomic for a task, not for the call.
    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError>;

    /// Takes back expired leases and looks at queues, for those who wait on them.
    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError>;

    /// Takes back expired leases in some of the known queues, wherever nobody pops.
    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError>;

    /// Passes on hints from other servers, until the store is lost.
    async fn listen(&self, on_wake: OnWake) -> Result<(), StoreError>;

    /// Asks whether the store is there and fit to serve.
    async fn check(&self) -> Result<(), StoreError>;
}

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
    /// Tasks ever gone because their time was over.
    pub expired: u64,
    /// Tasks ever deleted one by one.
    pub deleted: u64,
    /// Tasks ever purged.
    pub purged: u64,
    /// Of the task at the head, how long ago it was inserted; nothing if none is ready, or if that cannot be told.
    pub oldest_ready: Option<Millis>,
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
    /// Its time was over: it is gone.
    Expired,
    /// There is no such dead letter in the queue.
    Unknown,
}

/// What a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its engine and version, for people; without a version as long as that is not known.
    pub engine: String,
    /// What an answered change survives at least.
    pub survives: Survives,
    /// The same in words, with the settings that it follows from.
    pub note: String,
}

/// What an answered insert or ack survives at least. Each survives what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survives {
    /// Nothing: it is gone when the server ends.
    Nothing,
    /// The end of the server, whatever ends it.
    ServerKill,
    /// A power cut of the machine that keeps it.
    PowerCut,
}

/// Administration.
#[async_trait]
pub trait Admin: Store {
    /// Counts the tasks of each queue, in one step a queue, after expired leases were taken back. Nothing for an unknown
    /// queue.
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError>;

    /// The same for a list. Where the data of one queue can be unreadable on its own, such a queue counts as unknown here, so
    /// that it does not keep the others from being seen.
    async fn counts_in_list(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        self.counts(queues).await
    }

    /// Known queues by name, those behind `after`, at most so many. Some may have gone since.
    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError>;

    /// What is set for a queue. Nothing for an unknown one.
    async fn settings(&self, queue: &QueueName) -> Result<Option<Settings>, StoreError>;

    /// Changes settings, all of these in one step; nothing leaves one to the rules. Makes an unknown queue. Answers what is set then.
    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError>;

    /// Tasks in one state: ready ones in the order in which they would be delivered, those of the highest priority first;
    /// scheduled ones by when they fall due; dead letters, the oldest first; leased ones by the ends of their leases.
    /// `after` is where the page before ended. A task that is in the state from the first page to the last is on exactly
    /// one of them, if it does not move: a leased one whose lease is extended may be met twice. Nothing for an unknown
    /// queue, and for a place that no page of this queue and state ended at, the error [`StoreError::PlaceUnknown`].
    async fn list(
        &self,
        queue: &QueueName,
        state: State,
        after: Option<&Place>,
        max: usize,
    ) -> Result<Option<TaskPage>, StoreError>;

    /// Tasks by id, at most [`RECLAIM_STEP`]: each as it is in one step, with nothing for an unknown one.
    async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError>;

    /// Deletes tasks, at most [`RECLAIM_STEP`], wherever they are. Of one that is held it is noted that it has to go.
    async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError>;

    /// Makes dead letters ready again, at most [`RECLAIM_STEP`], in this order.
    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError>;

    /// Drops tasks in one state, at most [`RECLAIM_STEP`]. Answers how many, and 0 when there are no more.
    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError>;

    /// Drops a queue with all that is known of it; one with tasks only if `force`, else [`StoreError::NotEmpty`]. Answers whether
    /// it was there.
    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError>;

    /// What the store is, as far as is known now.
    fn describe(&self) -> Description;
}

/// Why a store did not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or is not fit to serve. The step may have been done, unless `did_not_run`.
    #[error("{message}")]
    Unavailable {
        /// What happened, for people.
        message: String,
        /// True if the step was certainly not done.
        did_not_run: bool,
    },
    /// It has no room for more. Nothing was done.
    #[error("{0}")]
    Full(String),
    /// More calls wait for it than are kept. Nothing was done.
    #[error("{0}")]
    Overloaded(String),
    /// The request id was used with other content. Nothing was done.
    #[error("the request id was used before, with other content")]
    RequestIdReused,
    /// The number is one of the producer's past, and its answer is not remembered any more. Nothing was done.
    #[error("the number is not greater than the producer's last one, and was not used, or is too old to be known")]
    NumberForgotten,
    /// A queue is at its limit. Nothing was done.
    #[error("the queue is at its {setting} of {max}", setting = .0.name(), max = .1)]
    QueueFull(Setting, u64),
    /// The queue has tasks. Nothing was done.
    #[error("the queue has tasks")]
    NotEmpty,
    /// It is not where a page of this list ended.
    #[error("the list has no such place")]
    PlaceUnknown,
    /// The store's data or answer cannot be read: a bug, or another program's data.
    #[error("{0}")]
    Broken(String),
}

impl StoreError {
    /// Of a call of several steps, of which some were done before this one was not.
    pub(crate) fn after_others(self) -> Self {
        match self {
            Self::Unavailable { message, .. } | Self::Overloaded(message) => {
                Self::Unavailable { message, did_not_run: false }
            }
            other => other,
        }
    }
}
