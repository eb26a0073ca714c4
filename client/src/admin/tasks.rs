//! Tasks as operators see them: without a lease, and not to be worked on.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use bytes::Bytes;
use data_queue_proto::v1::{self, task::Value};

use crate::{Error, Result, task::is_whole};

/// Where a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskState {
    /// It can be popped.
    Ready,
    /// It is not due yet.
    Scheduled,
    /// A worker holds it.
    Leased,
    /// A dead letter: it was given up, and is kept.
    Dead,
}

impl TaskState {
    pub(super) fn code(self) -> i32 {
        let state = match self {
            Self::Ready => v1::TaskState::Ready,
            Self::Scheduled => v1::TaskState::Scheduled,
            Self::Leased => v1::TaskState::Leased,
            Self::Dead => v1::TaskState::Dead,
        };
        state.into()
    }

    fn of(code: i32) -> Option<Self> {
        match v1::TaskState::try_from(code) {
            Ok(v1::TaskState::Ready) => Some(Self::Ready),
            Ok(v1::TaskState::Scheduled) => Some(Self::Scheduled),
            Ok(v1::TaskState::Leased) => Some(Self::Leased),
            Ok(v1::TaskState::Dead) => Some(Self::Dead),
            Ok(v1::TaskState::Unspecified) | Err(_) => None,
        }
    }
}

/// Why a task became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeadLetterCause {
    /// It failed too often.
    MaxFailures,
    /// Its leases ran out too often.
    MaxExpiries,
    /// Its holder put it back as one.
    Rejected,
}

impl DeadLetterCause {
    fn code(self) -> i32 {
        let cause = match self {
            Self::MaxFailures => v1::DeadLetterCause::MaxFailures,
            Self::MaxExpiries => v1::DeadLetterCause::MaxExpiries,
            Self::Rejected => v1::DeadLetterCause::Rejected,
        };
        cause.into()
    }

    /// Nothing if it is no dead letter.
    fn of(code: i32) -> Result<Option<Self>> {
        match v1::DeadLetterCause::try_from(code) {
            Ok(v1::DeadLetterCause::Unspecified) => Ok(None),
            Ok(v1::DeadLetterCause::MaxFailures) => Ok(Some(Self::MaxFailures)),
            Ok(v1::DeadLetterCause::MaxExpiries) => Ok(Some(Self::MaxExpiries)),
            Ok(v1::DeadLetterCause::Rejected) => Ok(Some(Self::Rejected)),
            Err(_) => Err(Error::internal("the server answered an unknown cause of a dead letter")),
        }
    }
}

/// What became of a task that was to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeleteOutcome {
    /// It is gone.
    Deleted,
    /// It is held: its holder is told, and it goes when it would go back.
    Cancelled,
    /// There is no such task in the queue.
    NotFound,
}

impl DeleteOutcome {
    pub(super) fn of(code: i32) -> Option<Self> {
        match v1::DeleteOutcome::try_from(code) {
            Ok(v1::DeleteOutcome::Deleted) => Some(Self::Deleted),
            Ok(v1::DeleteOutcome::Cancelled) => Some(Self::Cancelled),
            Ok(v1::DeleteOutcome::NotFound) => Some(Self::NotFound),
            Ok(v1::DeleteOutcome::Unspecified) | Err(_) => None,
        }
    }
}

/// What became of a dead letter that was to be made ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RedriveOutcome {
    /// It is ready.
    Redriven,
    /// Another task has its unique key. It stays dead.
    Duplicate,
    /// Its time to live had passed: it is gone.
    Expired,
    /// There is no such dead letter in the queue.
    NotFound,
}

impl RedriveOutcome {
    pub(super) fn of(code: i32) -> Option<Self> {
        match v1::RedriveOutcome::try_from(code) {
            Ok(v1::RedriveOutcome::Redriven) => Some(Self::Redriven),
            Ok(v1::RedriveOutcome::Duplicate) => Some(Self::Duplicate),
            Ok(v1::RedriveOutcome::Expired) => Some(Self::Expired),
            Ok(v1::RedriveOutcome::NotFound) => Some(Self::NotFound),
            Ok(v1::RedriveOutcome::Unspecified) | Err(_) => None,
        }
    }
}

/// One known outcome for each id.
pub(super) fn each<T>(answered: &[i32], asked: usize, known: impl Fn(i32) -> Option<T>) -> Result<Vec<T>> {
    if answered.len() != asked {
        return Err(Error::internal("the server answered another number of outcomes than there were ids"));
    }
    let outcome = |code: &i32| known(*code).ok_or_else(|| Error::internal("the server answered an unknown outcome"));
    answered.iter().map(outcome).collect()
}

/// What became of a task that was to be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// Its id in the queue that it was imported into; of a duplicate, the id of the task that has its unique key.
    pub id: String,
    /// Another task has its unique key: it was not put in.
    pub duplicate: bool,
    /// It was imported before: this is what became of it then, and nothing was put in now.
    pub replayed: bool,
}

impl Imported {
    pub(super) fn of(message: v1::ImportResult) -> Self {
        Self { id: message.id, duplicate: message.duplicate, replayed: message.replayed }
    }
}

/// What a redrive did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Redriven {
    /// With ids: one for each, in order. Otherwise empty.
    pub outcomes: Vec<RedriveOutcome>,
    /// How many are ready now.
    pub redriven: u64,
    /// How many stay dead, because another task has their unique key.
    pub duplicates: u64,
}

/// A task's payload, as it was inserted.
#[derive(Clone, PartialEq, Eq)]
pub enum TaskValue {
    /// One JSON text, byte for byte.
    Json(String),
    /// Any bytes.
    Bytes(Bytes),
}

/// Values are not printed.
impl fmt::Debug for TaskValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json(_) => "Json(..)",
            Self::Bytes(_) => "Bytes(..)",
        })
    }
}

/// A task as an operator sees it. Times are by the store's clock.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TaskInfo {
    /// Names the task for life.
    pub id: String,
    /// The queue it is in.
    pub queue: String,
    /// Where it is.
    pub state: TaskState,
    /// Its payload.
    pub value: TaskValue,
    /// Of the payload, taken when it was inserted: 32 lower-case hex characters.
    pub md5: String,
    /// The payload is not the one that was inserted: its md5 is another one. A worker's client refuses it.
    pub is_damaged: bool,
    /// The headers, as they were inserted.
    pub headers: BTreeMap<String, String>,
    /// 0 to 9; higher ones go first.
    pub priority: u32,
    /// As it was inserted; empty if it has none.
    pub unique_key: String,
    /// How often it was delivered.
    pub deliveries: u32,
    /// How often its holders said that it failed.
    pub failures: u32,
    /// How often a lease of it ran out.
    pub expiries: u32,
    /// When it was inserted.
    pub inserted_at: Option<SystemTime>,
    /// Of a scheduled task: when it falls due.
    pub due_at: Option<SystemTime>,
    /// When its time to live ends. `None`: never.
    pub expires_at: Option<SystemTime>,
    /// Of a held task: when its lease runs out.
    pub lease_expires_at: Option<SystemTime>,
    /// What its holder said when it failed or was rejected the last time. Empty: never, or nothing.
    pub last_error: String,
    /// Of a dead letter: when it was given up.
    pub died_at: Option<SystemTime>,
    /// Of a dead letter: why.
    pub cause: Option<DeadLetterCause>,
    /// It was deleted while it was held, and goes when it would go back.
    pub cancelled: bool,
}

impl TaskInfo {
    pub(super) fn receive(message: v1::TaskInfo) -> Result<Self> {
        let task = message.task.ok_or_else(|| Error::internal("the server answered a task without its content"))?;
        let state = TaskState::of(message.state);
        let state = state.ok_or_else(|| Error::internal("the server answered an unknown state of a task"))?;
        let time = |time: Option<prost_types::Timestamp>| time.and_then(|time| SystemTime::try_from(time).ok());
        Ok(Self {
            is_damaged: !is_whole(&task),
            md5: task.md5,
            id: task.id,
            queue: task.queue,
            state,
            value: match task.value {
                Some(Value::Json(text)) => TaskValue::Json(text),
                Some(Value::Data(data)) => TaskValue::Bytes(data),
                None => TaskValue::Bytes(Bytes::new()),
            },
            headers: task.headers,
            priority: task.priority,
            unique_key: message.unique_key,
            deliveries: task.deliveries,
            failures: task.failures,
            expiries: task.expiries,
            inserted_at: time(task.inserted_at),
            due_at: time(message.due_at),
            expires_at: time(message.expires_at),
            lease_expires_at: time(task.lease_expires_at),
            last_error: message.last_error,
            died_at: time(message.died_at),
            cause: DeadLetterCause::of(message.cause)?,
            cancelled: message.cancelled,
        })
    }

    /// With its md5, so that the server sees whether it was changed on its way.
    pub(super) fn into_message(self) -> v1::TaskInfo {
        let task = v1::Task {
            id: self.id,
            queue: self.queue,
            lease_token: String::new(),
            value: Some(match self.value {
                TaskValue::Json(text) => Value::Json(text),
                TaskValue::Bytes(data) => Value::Data(data),
            }),
            md5: self.md5,
            headers: self.headers,
            deliveries: self.deliveries,
            expiries: self.expiries,
            inserted_at: self.inserted_at.map(Into::into),
            lease: None,
            lease_expires_at: self.lease_expires_at.map(Into::into),
            priority: self.priority,
            failures: self.failures,
        };
        v1::TaskInfo {
            task: Some(task),
            state: self.state.code(),
            due_at: self.due_at.map(Into::into),
            expires_at: self.expires_at.map(Into::into),
            unique_key: self.unique_key,
            last_error: self.last_error,
            died_at: self.died_at.map(Into::into),
            cause: self.cause.map_or(0, DeadLetterCause::code),
            cancelled: self.cancelled,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ErrorKind;

    fn message(md5: &str) -> v1::TaskInfo {
        let task = v1::Task { value: Some(Value::Json("1".into())), md5: md5.into(), ..v1::Task::default() };
        v1::TaskInfo { task: Some(task), state: TaskState::Dead.code(), ..v1::TaskInfo::default() }
    }

    #[test]
    fn a_damaged_task_can_be_looked_at_and_its_value_is_not_printed() {
        let whole = TaskInfo::receive(message("c4ca4238a0b923820dcc509a6f75849b")).unwrap();
        assert!(!whole.is_damaged && whole.state == TaskState::Dead && whole.cause.is_none());
        assert_eq!(whole.into_message(), message("c4ca4238a0b923820dcc509a6f75849b"));
        let damaged = TaskInfo::receive(message("0")).unwrap();
        assert!(damaged.is_damaged && format!("{damaged:?}").contains("Json(..)"));
    }

    #[test]
    fn outcomes_are_one_for_each_id_and_known() {
        let all = [DeleteOutcome::Deleted, DeleteOutcome::Cancelled, DeleteOutcome::NotFound];
        assert_eq!(each(&[1, 2, 3], 3, DeleteOutcome::of).unwrap(), all);
        for (answered, asked) in [(vec![1], 2), (vec![0], 1), (vec![9], 1)] {
            assert_eq!(each(&answered, asked, RedriveOutcome::of).unwrap_err().kind(), ErrorKind::Internal);
        }
        let strange = v1::TaskInfo { state: 9, ..message("") };
        assert_eq!(TaskInfo::receive(strange).unwrap_err().kind(), ErrorKind::Internal);
    }
}
