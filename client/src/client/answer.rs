//! What calls answer.

use std::time::Duration;

use data_queue_proto::v1;

#[cfg(doc)]
use crate::Admin;
use crate::{Error, ErrorKind, Result, Task};

/// What became of one lease token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The token was the task's current one, and the call did what it says.
    Applied,
    /// The task was acked with this token before.
    AlreadyAcked,
    /// The token is not a task's current one in this queue. Nothing was changed.
    LeaseLost,
}

/// What an insert did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inserted {
    /// One for each task, in order.
    pub tasks: Vec<InsertedTask>,
    /// Whether the request id was known: this is the answer to the first call, and nothing was inserted now.
    pub replayed: bool,
}

/// What became of one task of an insert.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct InsertedTask {
    /// The task's id; of a duplicate, the id of the task that has its unique key.
    pub id: String,
    /// Whether another task has the unique key: this one was not inserted.
    pub duplicate: bool,
    /// What its insert has reached, at most what was asked for.
    pub durability: Durability,
}

impl InsertedTask {
    pub(crate) fn new(v1::InsertResult { id, duplicate }: v1::InsertResult, durability: Durability) -> Self {
        Self { id, duplicate, durability }
    }
}

/// What an insert is to reach before it is answered, and what it has; see [`Client::durability`](crate::Client::durability). It is about
/// the insert alone: the ack of its task may be lost in a failover, and the task comes back then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// The store has it: what that survives is what GetServerInfo tells.
    #[default]
    Accepted,
    /// It is on the store's disk.
    Fsynced,
    /// All replicas have it that Redis lists as online, one at least.
    Replicated,
}

impl Durability {
    pub(crate) fn into_message(self) -> i32 {
        match self {
            // What a server from before this was knows.
            Self::Accepted => v1::Durability::Unspecified,
            Self::Fsynced => v1::Durability::Fsynced,
            Self::Replicated => v1::Durability::Replicated,
        }
        .into()
    }

    pub(crate) fn from_message(reached: i32) -> Self {
        match v1::Durability::try_from(reached) {
            Ok(v1::Durability::Fsynced) => Self::Fsynced,
            Ok(v1::Durability::Replicated) => Self::Replicated,
            Ok(v1::Durability::Unspecified | v1::Durability::Accepted) | Err(_) => Self::Accepted,
        }
    }
}

/// What a putback of many did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PutbackDone {
    /// What became of the tokens, in order.
    pub outcomes: Vec<Outcome>,
    /// How many tasks went back, to the head or to wait until they are due.
    pub put_back: u64,
    /// How many became dead letters instead: because it was asked for, or because they failed too often.
    pub dead_lettered: u64,
}

/// What a heartbeat of many did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Heartbeat {
    /// What became of the tokens, in order.
    pub outcomes: Vec<Outcome>,
    /// How much time is left of the shortest of the leases that were extended, if any was.
    pub lease: Option<Duration>,
    /// Of the leases that were extended, those whose tasks an operator deleted ([`Admin::delete_tasks`]): there is no use in working
    /// on them. An ack still works; put back, they are gone.
    pub cancelled: Vec<String>,
}

pub(crate) fn outcomes(answered: &[i32], asked: usize) -> Result<Vec<Outcome>> {
    if answered.len() != asked {
        return Err(Error::internal("the server answered another number of outcomes than there were tokens"));
    }
    let outcome = |code: &i32| match v1::Outcome::try_from(*code) {
        Ok(v1::Outcome::Applied) => Ok(Outcome::Applied),
        Ok(v1::Outcome::AlreadyAcked) => Ok(Outcome::AlreadyAcked),
        Ok(v1::Outcome::LeaseLost) => Ok(Outcome::LeaseLost),
        Ok(v1::Outcome::Unspecified) | Err(_) => Err(Error::internal("the server answered an unknown outcome")),
    };
    answered.iter().map(outcome).collect()
}

pub(super) fn first(outcomes: &[Outcome]) -> Result<Outcome> {
    outcomes.first().copied().ok_or_else(|| Error::internal("the server answered no outcome"))
}

pub(crate) fn applied(outcome: Outcome, task: &Task) -> Result<()> {
    match outcome {
        Outcome::Applied => Ok(()),
        Outcome::AlreadyAcked => Err(Error::about_task(ErrorKind::AlreadyAcked, task.id())),
        Outcome::LeaseLost => Err(Error::about_task(ErrorKind::LeaseLost, task.id())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn outcomes_are_one_for_each_token_and_known() {
        let all = [Outcome::Applied, Outcome::AlreadyAcked, Outcome::LeaseLost];
        assert_eq!(outcomes(&[1, 2, 3], 3).unwrap(), all);
        for (answered, asked) in [(vec![1], 2), (vec![0], 1), (vec![9], 1)] {
            assert_eq!(outcomes(&answered, asked).unwrap_err().kind(), ErrorKind::Internal);
        }
    }
}
