//! What clients say on a stream, what they are sent, and where that goes.

use crate::{
    queue::{Delivery, Error, PutBackCall, Span},
    store::{Millis, Outcome, QueueName, StoreError, Token},
};

/// What a client sends.
#[derive(Debug)]
pub enum ConsumeCall {
    /// First, and only then.
    Open(ConsumeOpen),
    /// These are done.
    Ack(Tokens),
    /// These go back.
    PutBack(Tokens, PutBackCall),
    /// These go on, for so long.
    Heartbeat(Tokens, Option<Span>),
    /// How many it will hold from now on.
    MaxOutstanding(u32),
    /// A message of a newer client, or an empty one.
    Unknown,
}

/// Opens a session.
#[derive(Debug)]
pub struct ConsumeOpen {
    /// Names and weights, unchecked like the rest; weight 0 is the default.
    pub queues: Vec<(String, u32)>,
    /// Of each delivery.
    pub lease: Option<Span>,
    /// How many tasks the client will hold.
    pub max_outstanding: u32,
    /// Empty, or what names the client's work over its streams.
    pub session: Vec<u8>,
    /// For how long leases are extended.
    pub max_hold: Option<Span>,
}

/// Lease tokens of a queue; without a name, of the only one.
#[derive(Debug)]
pub struct Tokens {
    /// Unchecked like the rest.
    pub queue: String,
    /// The tokens' texts.
    pub lease_tokens: Vec<String>,
}

/// What is sent to the client at once. Any part may be missing.
#[derive(Default)]
pub struct ConsumeMessage {
    /// At the beginning: what an earlier stream held.
    pub resumed: Vec<(QueueName, Vec<Token>)>,
    /// Tasks of one queue.
    pub delivery: Option<(QueueName, Delivery)>,
    /// In the order of what was asked.
    pub answers: Vec<ConsumeAnswer>,
    /// What is with the client and is to be deleted.
    pub cancelled: Vec<(QueueName, Vec<Token>)>,
    /// The stream is about to end.
    pub drain: bool,
}

/// Answers an ack, a putback or a heartbeat.
pub struct ConsumeAnswer {
    /// One for each token, in order.
    pub outcomes: Vec<Outcome>,
    /// Of a heartbeat: what is left of the lease that ends first among those extended.
    pub lease: Option<Millis>,
}

/// Where messages go.
pub trait Outlet: Send {
    /// Waits until all that was sent has left, and there is room for a message. False: the client is cut off.
    fn clear(&self) -> impl Future<Output = bool> + Send;

    /// Sends a message; only when it is clear.
    fn send(&mut self, message: ConsumeMessage);

    /// Waits until the client is gone.
    fn gone(&self) -> impl Future<Output = ()> + Send;
}

/// A call that could not be read.
pub enum Unread<E> {
    /// The stream is broken.
    Broken,
    /// The stream ends with this when all before it is answered.
    Refused(E),
}

/// How a stream ended other than well.
pub enum Ended<E> {
    /// Nobody is there any more.
    Broken,
    /// With an error of ours.
    Failed(Error),
    /// With what the reader of calls said.
    Refused(E),
    /// The server stops.
    Stopping,
}

impl<E> From<Error> for Ended<E> {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<E> From<StoreError> for Ended<E> {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}
