//! What stores answer to the steps of a history, with times from its beginning.

use std::{collections::BTreeMap, fmt};

use super::{
    super::*,
    name::{TaskNumber, Ticket},
};

/// A delivery, in short words.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Delivery {
    pub(super) ticket: Ticket,
    pub(super) task: TaskNumber,
    pub(super) envelope: Bytes,
    inserted_at: Millis,
    pub(super) deliveries: u32,
    pub(super) failures: u32,
    pub(super) expiries: u32,
    left: Millis,
    pub(super) expires_at: Millis,
}

impl Delivery {
    pub(super) fn of(leased: &Leased) -> Self {
        Self {
            ticket: Ticket::of(leased.token),
            task: TaskNumber::of(leased.id),
            envelope: leased.envelope.clone(),
            inserted_at: leased.inserted_at.wrapping_sub(START),
            deliveries: leased.deliveries,
            failures: leased.failures,
            expiries: leased.expiries,
            left: leased.left,
            expires_at: leased.expires_at.wrapping_sub(START),
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ticket, task, envelope, inserted_at, deliveries, failures, expiries, left, expires_at } = self;
        write!(f, "{ticket:?} {task:?} {envelope:?} of {inserted_at}, delivered {deliveries}, failed {failures}, ")?;
        write!(f, "expired {expiries}, ")?;
        write!(f, "{left} left until {expires_at}")
    }
}

/// A task as administration sees it, with times from the beginning.
#[derive(Clone, PartialEq)]
pub(super) struct View(pub(super) Seen);

impl View {
    pub(super) fn of(seen: Seen) -> Self {
        let from_start = |at: Millis| at.wrapping_sub(START);
        let (at, inserted_at) = (seen.at.map(from_start), from_start(seen.inserted_at));
        Self(Seen { at, inserted_at, ends_at: seen.ends_at.map(from_start), ..seen })
    }

    pub(super) fn number(&self) -> TaskNumber {
        TaskNumber::of(self.0.id)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.number(), self.0)
    }
}

/// The tasks, which of them are duplicates, and whether they are those of an earlier call.
pub(super) type Entered = (Vec<TaskNumber>, Vec<usize>, bool);

/// What a store answered.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Done,
    Refused(String),
    Inserted {
        tasks: Vec<TaskNumber>,
        duplicates: Vec<usize>,
        replayed: bool,
    },
    /// Of each task: as one that is inserted, or why it was not.
    Imported(Vec<Result<Entered, String>>),
    /// Of each insert; and why the next one was not done.
    Produced(Vec<Entered>, Option<String>),
    Popped {
        acks: Vec<Outcome>,
        tasks: Vec<Delivery>,
        ready: u64,
        reclaimed: u64,
        due_in: Option<Millis>,
        taken_over: bool,
        known: bool,
    },
    Outcomes(Vec<Outcome>),
    Beaten(Vec<Outcome>, Option<(Millis, Millis)>, Vec<Ticket>),
    GivenBack(Vec<Outcome>, Released),
    Withdrawn(u64),
    Released(Released),
    Resumed(Vec<Ticket>, Vec<Millis>),
    /// Nothing if another stream has the session.
    Kept(Option<(Vec<Outcome>, Vec<Ticket>)>),
    Seen(Vec<Sight>),
    Counted(Vec<Option<Counts>>),
    Named(Vec<QueueName>),
    Reaped(BTreeMap<QueueName, u64>),
    Set(Option<Settings>),
    Listed(Option<Vec<View>>),
    Told(Vec<Option<View>>),
    Deleted(Vec<(TaskNumber, Deleted)>),
    Redriven(Vec<(TaskNumber, Redriven)>),
    Purged(u64),
    Dropped(bool),
}
