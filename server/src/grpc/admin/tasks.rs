//! Tasks as operators see them, as messages.

use data_queue_proto::v1;

use crate::{
    grpc::service::{time, timestamp},
    queue::{ImportedTask, TaskDetails, Value},
    store::{Cause, Deleted, Inserted, Redriven, State},
};

/// Nothing if it is none.
pub(super) fn state(given: i32) -> Option<State> {
    match v1::TaskState::try_from(given) {
        Ok(v1::TaskState::Ready) => Some(State::Ready),
        Ok(v1::TaskState::Scheduled) => Some(State::Scheduled),
        Ok(v1::TaskState::Leased) => Some(State::Leased),
        Ok(v1::TaskState::Dead) => Some(State::Dead),
        Ok(v1::TaskState::Unspecified) | Err(_) => None,
    }
}

/// A task of this queue.
pub(super) fn info(queue: &str, TaskDetails { seen, content }: TaskDetails) -> v1::TaskInfo {
    let in_state = |state| seen.at.filter(|_| seen.state == state).map(timestamp);
    let task = v1::Task {
        id: seen.id.text(),
        queue: queue.to_owned(),
        lease_token: String::new(),
        value: Some(match content.value {
            Value::Json(text) => v1::task::Value::Json(text),
            Value::Data(data) => v1::task::Value::Data(data),
        }),
        md5: crate::store::hex(&content.md5),
        headers: content.headers,
        priority: content.priority.into(),
        deliveries: seen.deliveries,
        failures: seen.failures,
        expiries: seen.expiries,
        inserted_at: Some(timestamp(seen.inserted_at)),
        lease: None,
        lease_expires_at: in_state(State::Leased),
    };
    v1::TaskInfo {
        task: Some(task),
        state: match seen.state {
            State::Ready => v1::TaskState::Ready,
            State::Scheduled => v1::TaskState::Scheduled,
            State::Leased => v1::TaskState::Leased,
            State::Dead => v1::TaskState::Dead,
        } as i32,
        due_at: in_state(State::Scheduled),
        expires_at: seen.ends_at.map(timestamp),
        unique_key: seen.plan.unique_key.clone().unwrap_or_default(),
        last_error: seen.last_error.clone(),
        died_at: in_state(State::Dead),
        cause: match seen.cause {
            None => v1::DeadLetterCause::Unspecified,
            Some(Cause::Failures) => v1::DeadLetterCause::MaxFailures,
            Some(Cause::Expiries) => v1::DeadLetterCause::MaxExpiries,
            Some(Cause::Rejected) => v1::DeadLetterCause::Rejected,
        } as i32,
        cancelled: seen.cancelled,
    }
}

/// A task of another queue.
pub(super) fn import(info: v1::TaskInfo) -> ImportedTask {
    let task = info.task.unwrap_or_default();
    ImportedTask {
        id: task.id,
        value: task.value.map(|value| match value {
            v1::task::Value::Json(text) => Value::Json(text),
            v1::task::Value::Data(data) => Value::Data(data),
        }),
        md5: task.md5,
        headers: task.headers,
        priority: task.priority,
        unique_key: info.unique_key,
        state: state(info.state),
        due_at: info.due_at.map(time),
        expires_at: info.expires_at.map(time),
        inserted_at: task.inserted_at.map(time),
        deliveries: task.deliveries,
        failures: task.failures,
        expiries: task.expiries,
        last_error: info.last_error,
        died_at: info.died_at.map(time),
        cause: match v1::DeadLetterCause::try_from(info.cause) {
            Ok(v1::DeadLetterCause::MaxFailures) => Some(Cause::Failures),
            Ok(v1::DeadLetterCause::MaxExpiries) => Some(Cause::Expiries),
            Ok(v1::DeadLetterCause::Rejected) => Some(Cause::Rejected),
            Ok(v1::DeadLetterCause::Unspecified) | Err(_) => None,
        },
    }
}

/// Of one task.
pub(super) fn imported(done: &Inserted) -> v1::ImportResult {
    let id = done.ids.first().map(|id| id.text()).unwrap_or_default();
    v1::ImportResult { id, duplicate: !done.duplicates.is_empty(), replayed: done.replayed }
}

pub(super) fn deleted(deleted: Deleted) -> i32 {
    (match deleted {
        Deleted::Gone => v1::DeleteOutcome::Deleted,
        Deleted::Cancelled => v1::DeleteOutcome::Cancelled,
        Deleted::Unknown => v1::DeleteOutcome::NotFound,
    }) as i32
}

pub(super) fn redriven(redriven: Redriven) -> i32 {
    (match redriven {
        Redriven::Ready => v1::RedriveOutcome::Redriven,
        Redriven::Duplicate => v1::RedriveOutcome::Duplicate,
        Redriven::Expired => v1::RedriveOutcome::Expired,
        Redriven::Unknown => v1::RedriveOutcome::NotFound,
    }) as i32
}
