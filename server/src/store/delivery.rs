//! Deliveries, and what becomes of them.

use bytes::Bytes;

use super::{Attempt, Millis, RequestKey, SessionId, Stem, TaskId, Token};

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
    /// The most tasks to lease, at most [`RECLAIM_STEP`](super::RECLAIM_STEP). 0: only answer what an earlier try of the request still holds.
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
