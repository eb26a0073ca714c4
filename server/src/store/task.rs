//! Tasks, and how they go in.

use bytes::Bytes;

use super::{Cause, Fingerprint, Millis, StoreError, TaskId};

/// The highest priority; 0 is the lowest, and the one of plain tasks.
pub const MAX_PRIORITY: u8 = 9;

/// A task to insert. The envelope is opaque here.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Minted by the caller. It tells whether there is a plan: stores look at that, and need not look for plans.
    pub id: TaskId,
    /// What comes back at each delivery, byte for byte.
    pub envelope: Bytes,
    /// When it can be popped first. Nothing: at once, at the tail of its priority.
    pub due: Option<Due>,
    /// Nothing for most.
    pub plan: Option<Box<Plan>>,
    /// Of a task that is imported, and of no other.
    pub past: Option<Box<Past>>,
}

impl NewTask {
    /// A task that is ready at once. The id says from now on whether there is a plan.
    pub fn new(id: TaskId, envelope: Bytes, plan: Option<Plan>) -> Self {
        let plan = plan.filter(|plan| *plan != Plan::default()).map(Box::new);
        Self { id: id.with_plan(plan.is_some()), envelope, due: None, plan, past: None }
    }

    /// Whether it becomes a dead letter: it has no unique key then, and no limit counts it.
    pub(crate) fn is_dead(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.death.is_some())
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
    /// So long after its insert the task is gone if it is ready or scheduled. One that is held then goes when it would go back,
    /// and a dead letter when it is redriven.
    pub ttl: Option<Millis>,
    /// While a task with this key is ready, scheduled or leased, no other one is inserted with it. One whose time is over, and
    /// that is not held, has none.
    pub unique_key: Option<String>,
}

/// What a task has behind it that comes from another queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// When it was inserted there: not later than now. Its ttl counts from then.
    pub inserted_at: Millis,
    /// How often it was delivered.
    pub deliveries: u32,
    /// How often its holders said that it failed.
    pub failures: u32,
    /// How often its leases ran out.
    pub expiries: u32,
    /// What its holder said when it failed or was rejected the last time; empty if never.
    pub last_error: String,
    /// When and why it was given up. It is a dead letter then, whatever its `due`.
    pub death: Option<(Millis, Cause)>,
}

/// A request id, with what the request was about.
#[derive(Clone, Debug)]
pub struct RequestKey {
    /// The caller's text.
    pub id: String,
    /// Of the request's content: the same id with another fingerprint is refused.
    pub fingerprint: Fingerprint,
}

/// What an insert is to have reached before it is answered, and what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Durability {
    /// The store has it.
    #[default]
    Accepted,
    /// It is on the store's disk.
    Fsynced,
    /// The store's replicas have it, all that are known, and at least one.
    Replicated,
}

/// An insert: all of the tasks but for duplicates, or none; those that are ready at once in this order.
#[derive(Clone, Debug, Default)]
pub struct Insert {
    /// At least one.
    pub tasks: Vec<NewTask>,
    /// Set if the insert is to be remembered.
    pub request: Option<RequestKey>,
    /// How many pops of this server wait on the queue: other servers are told only about tasks beyond these. A hint.
    pub waiting_here: usize,
    /// What it is to have reached.
    pub durability: Durability,
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
    /// What it has reached: at most what was asked for.
    pub durability: Durability,
}

/// Inserts that a producer has numbered.
#[derive(Clone, Debug, Default)]
pub struct Produce {
    /// Names the producer in its queue.
    pub producer: String,
    /// At least one; their numbers ascend. At most [`RECLAIM_STEP`](super::RECLAIM_STEP) tasks in all, or one insert.
    pub inserts: Vec<NumberedInsert>,
    /// As in an insert.
    pub waiting_here: usize,
    /// As in an insert, of each.
    pub durability: Durability,
}

/// One of them: all of its tasks but for duplicates, or none.
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn an_id_tells_whether_its_task_has_a_plan() {
        let minted = TaskId::mint(1).unwrap()[0];
        let with_ttl = Plan { ttl: Some(1), ..Plan::default() };
        for (plan, has_plan) in [(None, false), (Some(Plan::default()), false), (Some(with_ttl), true)] {
            let task = NewTask::new(minted, Bytes::new(), plan.clone());
            assert_eq!((task.id.has_plan(), task.plan.is_some()), (has_plan, has_plan), "{plan:?}");
        }
    }
}
