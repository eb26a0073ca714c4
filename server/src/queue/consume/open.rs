//! What a client may open a stream with.

use std::{collections::HashSet, time::Duration};

use data_queue_proto::reason;

use super::{ConsumeOpen, MAX_OUTSTANDING};
use crate::{
    queue::{
        Error, Invalid, Span,
        limits::{self, MAX_LEASE},
    },
    store::{Attempt, Consumer, Millis, QueueName, SessionId},
};

/// The most queues of a stream.
const MAX_QUEUES: usize = 64;
/// The largest weight of a queue.
const MAX_WEIGHT: u32 = 100;
/// For how long leases are extended unless the client says.
const MAX_HOLD: Duration = Duration::from_secs(60 * 60);

/// A stream as it was opened.
pub(super) struct Opened {
    pub(super) queues: Vec<(QueueName, u32)>,
    /// Nothing: each queue has its own.
    pub(super) lease: Option<Millis>,
    pub(super) max_outstanding: usize,
    pub(super) max_hold: Duration,
    pub(super) consumer: Consumer,
    /// The session is the client's own.
    pub(super) resumes: bool,
}

pub(super) fn check(open: ConsumeOpen) -> Result<Opened, Error> {
    let queues = queues(open.queues)?;
    let lease = limits::lease(open.lease).map_err(|invalid| invalid.within("open"))?;
    let max_outstanding = max_outstanding("open.max_outstanding", open.max_outstanding, 1)?;
    let max_hold = max_hold(open.max_hold)?;
    let session = match open.session.len() {
        0 => None,
        _ => Some(SessionId(open.session.as_slice().try_into().map_err(|_| {
            let message = format!("has {} bytes; 16 or none are allowed", open.session.len());
            refused("open.session", message)
        })?)),
    };
    let resumes = session.is_some();
    let session = session.map_or_else(SessionId::mint, Ok)?;
    let consumer = Consumer { session, stream: Attempt::mint()? };
    Ok(Opened { queues, lease, max_outstanding, max_hold, consumer, resumes })
}

fn queues(given: Vec<(String, u32)>) -> Result<Vec<(QueueName, u32)>, Error> {
    if given.is_empty() || given.len() > MAX_QUEUES {
        return Err(refused("open.queues", format!("has {} queues; 1 to {MAX_QUEUES} are allowed", given.len())));
    }
    let mut names = HashSet::new();
    let mut queues = Vec::with_capacity(given.len());
    for (at, (name, weight)) in given.into_iter().enumerate() {
        let field = |part| format!("open.queues[{at}].{part}");
        let name = limits::queue(&name).map_err(|invalid| Box::new(Invalid { field: field("name"), ..*invalid }))?;
        if weight > MAX_WEIGHT {
            return Err(refused(field("weight"), format!("is {weight}; 1 to {MAX_WEIGHT} are allowed, and 0 is 1")));
        }
        if !names.insert(name.clone()) {
            return Err(refused(field("name"), format!("is {name:?} for the second time")));
        }
        queues.push((name, weight.max(1)));
    }
    Ok(queues)
}

pub(super) fn max_outstanding(field: &str, given: u32, min: u32) -> Result<usize, Error> {
    if (min..=MAX_OUTSTANDING).contains(&given) {
        return Ok(given as usize);
    }
    Err(refused(field, format!("is {given}; {min} to {MAX_OUTSTANDING} are allowed")))
}

fn max_hold(given: Option<Span>) -> Result<Duration, Error> {
    let Some(span) = given else { return Ok(MAX_HOLD) };
    span.millis(Duration::ZERO, Some(MAX_LEASE)).map(Duration::from_millis).ok_or_else(|| {
        let max = humantime::format_duration(MAX_LEASE);
        refused("open.max_hold", format!("is {span}; 0s to {max} are allowed, and unset is 1h"))
    })
}

/// The first message is not there, or no `open`, or there is a further one.
pub(super) fn misplaced(message: &str) -> Error {
    refused("open", message.to_owned())
}

/// A message of a newer client, or an empty one.
pub(super) fn unknown() -> Error {
    refused("request", "has none of the fields that this server knows".to_owned())
}

/// Tokens of a queue that the stream does not consume.
pub(super) fn no_queue_of_the_stream(call: &str, queue: &str) -> Error {
    let message = match queue {
        "" => "is unset, and the stream has several queues".to_owned(),
        _ => format!("is {queue:?}, which is none of the stream's queues"),
    };
    refused(format!("{call}.queue"), message)
}

fn refused(field: impl Into<String>, message: String) -> Error {
    Error::Invalid(Invalid::new(field, reason::CONSUME_INVALID, message))
}
