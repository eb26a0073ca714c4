//! Why a store did not do it.

use super::Setting;

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
    /// It has lost its data, and nobody said that this is right. Nothing was done.
    #[error("{0}")]
    DatasetReset(String),
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
    /// A queue is at its limit. Nothing was done.
    #[error("the queue is at its {setting} of {max}", setting = .0.name(), max = .1)]
    QueueFull(Setting, u64),
    /// It is not set up for the durability that an insert is to reach. Nothing was done.
    #[error("{0}")]
    DurabilityUnsupported(String),
    /// The queue is spread over other shards by now. Nothing was done. A store answers it to nobody but itself.
    #[error("the shards of the queue were changed meanwhile")]
    Moved,
    /// The tasks of one insert have unique keys that belong to different shards of the queue. Nothing was done.
    #[error(
        "the queue has {0} shards, and the unique keys of these tasks do not belong to the same one; insert them one by one"
    )]
    KeysApart(u8),
    /// The queue has tasks. Nothing was done.
    #[error("the queue has tasks")]
    NotEmpty,
    /// It is no place of this list. Not every place of another list is known to be one: see [`Admin::list`](super::Admin::list).
    #[error("the list has no such place")]
    PlaceUnknown,
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
