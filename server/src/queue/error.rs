//! Why a call was not done.

use std::collections::BTreeMap;

use crate::store::{QueueName, StoreError, TaskId};

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the request is not right. Nothing was done.
    #[error(transparent)]
    Invalid(#[from] Box<Invalid>),
    /// Nothing was ever inserted into this queue.
    #[error("there is no queue {0:?}")]
    QueueNotFound(QueueName),
    /// There is no such task in the queue.
    #[error("there is no task {0} in the queue")]
    TaskNotFound(TaskId),
    /// A task of this id was imported before, and was another one. This is the field of the id.
    #[error(
        "{0}: a task of this id was imported before, with another value, other headers, another priority or unique key"
    )]
    ImportedOtherwise(String),
    /// Another stream has the session of this one.
    #[error("another stream has taken over the session of this one")]
    SessionTakenOver,
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The insert of this number was not done, nor any behind it on its stream; or, as the error says, that is not known.
    #[error("insert {number}: {error}")]
    Numbered {
        /// Given by the producer.
        number: u64,
        /// Why not.
        error: Box<Error>,
    },
    /// A bug, or the system's random generator failed.
    #[error("{0}")]
    Bug(String),
}

impl From<getrandom::Error> for Error {
    fn from(error: getrandom::Error) -> Self {
        Self::Bug(format!("no random numbers: {error}"))
    }
}

impl Error {
    /// The field is within this one.
    pub(super) fn within(self, field: &str) -> Self {
        match self {
            Self::Invalid(invalid) => Self::Invalid(invalid.within(field)),
            other => other,
        }
    }

    /// It is about the insert of this number.
    pub(super) fn at(self, number: u64) -> Self {
        Self::Numbered { number, error: Box::new(self) }
    }
}

/// What is wrong with which field.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// As in the proto, with the position in lists: `tasks[3].json`.
    pub field: String,
    /// A constant of `data_queue_proto::reason`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// For programs: limits.
    pub metadata: BTreeMap<String, String>,
}

impl Invalid {
    pub(crate) fn new(field: impl Into<String>, reason: &'static str, message: impl Into<String>) -> Box<Self> {
        Box::new(Self { field: field.into(), reason, message: message.into(), metadata: BTreeMap::new() })
    }

    /// The field is within this one.
    pub(super) fn within(mut self: Box<Self>, field: &str) -> Box<Self> {
        self.field = format!("{field}.{}", self.field);
        self
    }

    pub(crate) fn with_limit(mut self: Box<Self>, limit: impl ToString) -> Box<Self> {
        self.metadata.insert("limit".to_owned(), limit.to_string());
        self
    }
}
