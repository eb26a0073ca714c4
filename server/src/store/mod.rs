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

use std::sync::Arc;

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

/// What a store is told of the rules of queues.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How requests and acks are remembered.
    pub remember: Remember,
    /// A task whose leases ran out so often is a dead letter. At least 1.
    pub max_expiries: u32,
}

/// A task to insert. The envelope is opaque here.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Minted by the caller.
    pub id: TaskId,
    /// What comes back at each delivery, byte for byte.
    pub envelope: Bytes,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inserted {
    /// One for each task, in order: of the first call if this one was a repetition.
    pub ids: Vec<TaskId>,
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
    /// How long the tasks are held.
    pub lease: Millis,
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
    /// How many tasks are ready now.
    pub ready: u64,
    /// How many tasks went back to the head on the way, because their leases ran out.
    pub reclaimed: u64,
    /// When nothing was found: how long until the first lease runs out.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beaten {
    /// One for each token, in order.
    pub outcomes: Vec<Outcome>,
    /// Of the lease that ends first among those extended: how much is left, and when it ends.
    pub earliest: Option<(Millis, Millis)>,
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

/// What [`Store::release_held`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Tasks that went back to the head.
    pub put_back: u64,
    /// Tasks that became dead letters, because it was one expiry too many.
    pub dead_lettered: u64,
}

/// Which leases to release, and what that counts as. In every form the tasks go to the head, in the order of their delivery.
#[derive(Clone, Debug)]
pub enum Release {
    /// By their holder. The deliveries count.
    PutBack(Vec<Token>),
    /// Never handed over: as if they had not been delivered. Only those that no other try was answered with.
    Unsent(Vec<Token>, Option<Attempt>),
}

/// What is to be seen of a queue once expired leases were taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Tasks that are ready.
    pub ready: u64,
    /// How long until the first lease runs out.
    pub due_in: Option<Millis>,
    /// How many tasks went back to the head, because their leases ran out.
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

    /// Moves deadlines to now + `lease`, never to an earlier time.
    async fn heartbeat(&self, queue: &QueueName, tokens: &[Token], lease: Millis) -> Result<Beaten, StoreError>;

    /// Gives leased tasks back to the head.
    async fn release(&self, queue: &QueueName, release: Release) -> Result<Vec<Outcome>, StoreError>;

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
    ) -> Result<Option<Vec<Outcome>>, StoreError>;

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
    /// Tasks that are held.
    pub leased: u64,
    /// Tasks that were given up, and are kept.
    pub dead: u64,
    /// Tasks ever inserted.
    pub inserted: u64,
    /// Tasks ever acked.
    pub acked: u64,
    /// Of the task at the head, how long ago it was inserted; nothing if none is ready, or if that cannot be told.
    pub oldest_ready: Option<Millis>,
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
