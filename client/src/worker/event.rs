//! What an observer is told, and what it comes to.

#[cfg(doc)]
use crate::Worker;
use crate::{Error, Task};

/// What happens to a worker and its tasks. What became of a task is told when the server has confirmed it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A handler begins.
    Begun(&'a Task),
    /// The handler has finished, and the task is acked: it is gone for good.
    Done(&'a Task),
    /// The handler has failed, for this reason, and the server knows.
    Failed(&'a Task, &'a str),
    /// The task is a dead letter, for this reason.
    Rejected(&'a Task, &'a str),
    /// The task went back to its queue: it was not begun, or not finished, when the worker stopped; or its handler gave up since it was
    /// cancelled.
    GivenBack(&'a Task),
    /// The lease was lost, or no answer came: the task is delivered again, whatever its handler has done, unless an answer to that
    /// was itself lost on the way.
    Lost(&'a Task),
    /// A task arrived damaged and was failed; the error names it.
    Damaged(&'a Error),
    /// The stream has broken, or could not be opened, and is tried again.
    Disconnected(&'a Error),
}

/// What became of the tasks of a worker, as [`Event`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// How many were finished and acked.
    pub done: u64,
    /// How many failed, those that arrived damaged included.
    pub failed: u64,
    /// How many were made dead letters by a [`Reject`](crate::Reject).
    pub rejected: u64,
    /// How many were put back unfinished.
    pub given_back: u64,
    /// Of how many the lease was lost, or the last answer: they may be delivered again.
    pub lost: u64,
}

impl Summary {
    pub(super) fn count(&mut self, event: &Event<'_>) {
        match event {
            Event::Done(_) => self.done += 1,
            Event::Failed(..) | Event::Damaged(_) => self.failed += 1,
            Event::Rejected(..) => self.rejected += 1,
            Event::GivenBack(_) => self.given_back += 1,
            Event::Lost(_) => self.lost += 1,
            Event::Begun(_) | Event::Disconnected(_) => {}
        }
    }
}
