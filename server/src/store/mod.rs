//! What a store keeps, and the traits it is reached through. No connection and no engine type appears here.
//!
//! A store persists and decides nothing else: limits, waiting and defaults belong to [`crate::queue`]. Every method that
//! changes a task's state does it in one step of the store (a script, a transaction, a locked section), so that a process
//! that dies in between leaves either the state before or the state after. Time is the store's own.
//!
//! Ids and tokens are made by the caller and passed in, so that a step that runs twice finds them and changes nothing.
//!
//! What a queue's time has come for is done by whoever comes by, and by the reaper where nobody does: tasks whose ttl is over
//! and dead letters that were kept long enough go, leases that ran out are taken back, and what is due joins the tail.

mod backend;
mod clock;
mod delivery;
mod description;
mod error;
mod holders;
mod ident;
mod lanes;
mod look;
pub mod memory;
pub mod redis;
mod rules;
mod seen;
mod sessions;
pub mod sqlite;
mod task;

#[cfg(test)]
mod conformance;

use async_trait::async_trait;

pub use backend::Backend;
pub use clock::{Clock, SystemClock};
pub use delivery::{
    Beaten, Consumer, Kept, Leased, Outcome, Pop, PopRequest, Popped, PutBack, Release, Released, Withdrawal,
};
pub use description::{Description, Survives};
pub use error::StoreError;
use ident::Shard;
pub use ident::{
    Attempt, Fingerprint, MAX_SHARDS, QueueName, QueueNameError, SessionId, Stem, TaskId, Token, TokenError,
};
pub(crate) use ident::{MintedMap, MintedState, hex};
pub use look::{OnWake, ReapCursor, Reaped, Sight};
#[cfg(test)]
pub(crate) use rules::TEST_RULES;
pub use rules::{Backoff, Remember, Rules, Setting, Settings};
pub use seen::{Cause, Counts, Deleted, Place, Redriven, Seen, State, TaskPage};
pub use task::{
    Due, Durability, Insert, Inserted, MAX_PRIORITY, NewTask, NumberedInsert, Past, Plan, Produce, Produced, RequestKey,
};

/// Milliseconds: a span, or a point in time since the Unix epoch by the store's clock.
pub type Millis = u64;

/// The most expired leases that one step takes back. More are taken back in further steps, those with the latest
/// deadlines first: each step puts its tasks in front, so that the ones held longest end at the head. What ended and what is
/// due is taken in steps too, about as large. And the most tasks that a call on many may name or lease, where it says so.
pub const RECLAIM_STEP: usize = 200;

/// How many answers of a producer are remembered, the latest ones.
pub const PRODUCER_ANSWERS: usize = 1_024;

/// When the envelopes on a page of tasks have about so many bytes, no further task is on it.
const PAGE_BYTES: usize = 1 << 20;

/// For how long a withdrawn pop may still arrive, and then leases nothing.
const WITHDRAWN_FOR: Millis = 60_000;

/// For how long a session is known after the last step of its stream.
const SESSION_KEPT: Millis = 600_000;

/// The data path.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Puts tasks at the tails of their priorities, or among those that are not due yet. Makes an unknown queue. What can never reach the
    /// durability that is asked for is refused before anything is done: [`StoreError::DurabilityUnsupported`].
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError>;

    /// Inserts what a producer has not numbered before: the numbers are greater than its last one. Of the others the remembered answer is given again, as long as it is among the last
    /// [`PRODUCER_ANSWERS`] of the producer. A producer is forgotten when it has inserted nothing for the window twice, or
    /// when [`Remember::producers`] others inserted something after it.
    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError>;

    /// Acks, then does what the queue's time has come for, then leases from the head: those of the highest priority first. An
    /// unknown queue is empty and is not made.
    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError>;

    /// Ends tasks.
    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError>;

    /// Moves deadlines to now + `lease`, never to an earlier time. Nothing: the lease of the queue's settings or of the rules.
    async fn heartbeat(&self, queue: &QueueName, tokens: &[Token], lease: Option<Millis>)
    -> Result<Beaten, StoreError>;

    /// Gives leased tasks back, or gives them up. Answers one outcome for each token, in order.
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

    /// Gives back every task whose delivery or last heartbeat is at least this old; each counts as an expiry, and may be one too
    /// many.
    /// Atomic for a task, not for the call.
    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError>;

    /// Does a step's worth of what the time of these queues has come for, and looks at them, for those who wait on them.
    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError>;

    /// Does what the time of some of the known queues has come for, wherever nobody pops. `budget` is how many are visited at
    /// most; where there is very much to do in one, a further round goes on with it.
    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError>;

    /// Passes on hints from other servers, until the store is lost.
    async fn listen(&self, on_wake: OnWake) -> Result<(), StoreError>;

    /// Asks whether the store is there and fit to serve.
    async fn check(&self) -> Result<(), StoreError>;
}

/// Administration.
#[async_trait]
pub trait Admin: Store {
    /// Counts the tasks of each queue, in one step a queue, after what its time had come for was done; of very much, the rest is
    /// counted where it still is. Nothing for an unknown queue.
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

    /// Changes settings, all of these in one step; nothing leaves one to the rules. Makes an unknown queue. Answers what is set then. The
    /// number of shards of a queue with tasks, dead ones too, does not change, nor does anything with it: [`StoreError::NotEmpty`].
    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError>;

    /// Tasks in one state: ready ones in the order in which they would be delivered, those of the highest priority first;
    /// scheduled ones by when they fall due; dead letters, the oldest first; leased ones by the ends of their leases.
    /// `after` is where the page before ended. A task that is in the state from the first page to the last is on exactly
    /// one of them, if it does not move: a leased one whose lease is extended may be met twice. Nothing for an unknown queue.
    ///
    /// A place is good for the queue and the state that its page was of. What is not written as one is refused with
    /// [`StoreError::PlaceUnknown`]; a place of another list may be as well, or may be taken for one of this list. So whoever
    /// hands places out has to tell by itself which list they are of.
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

    /// Makes dead letters ready again, at most [`RECLAIM_STEP`], in this order, whatever limits the queue has.
    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError>;

    /// Does what the queue's time has come for, then puts in tasks that come from other queues, at most [`RECLAIM_STEP`], in one step: as many inserts, each of one task that has a
    /// past, and with a request. Each is done or refused on its own, one after the other. One whose task is there already, under
    /// the same id, was done before: it is answered as its request would be.
    async fn import(
        &self,
        queue: &QueueName,
        inserts: Vec<Insert>,
    ) -> Result<Vec<Result<Inserted, StoreError>>, StoreError>;

    /// Drops tasks in one state, held ones too, at most [`RECLAIM_STEP`]. Answers how many, and 0 when there are no more.
    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError>;

    /// Drops a queue with all that is known of it; one with tasks, dead ones too, only if `force`, else [`StoreError::NotEmpty`]. Answers whether
    /// it was there.
    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError>;

    /// What the store is, as far as is known now.
    fn describe(&self) -> Description;
}
