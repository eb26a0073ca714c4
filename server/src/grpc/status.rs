//! The one table from errors to statuses.

use std::{collections::HashMap, time::Duration};

use data_queue_proto::{ERROR_DOMAIN, reason};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    queue::{Error, Invalid},
    store::StoreError,
};

/// When to try again after the store was away or full.
const RETRY_STORE_AFTER: Duration = Duration::from_secs(1);
/// When to try again after too many calls waited: clients add their own jitter, and back off.
const RETRY_OVERLOADED_AFTER: Duration = Duration::from_millis(100);
/// When to try again, with another server or this one, after a server stopped.
const RETRY_STOPPED_AFTER: Duration = Duration::from_millis(200);

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => {
                let mut details = info(invalid.reason, invalid.metadata.clone().into_iter().collect());
                details.add_bad_request_violation(&invalid.field, &invalid.message);
                refuse(Code::InvalidArgument, invalid.to_string(), details)
            }
            Error::QueueNotFound(_) => {
                let message = format!("{error}; the first insert makes a queue");
                refuse(Code::NotFound, message, info(reason::QUEUE_NOT_FOUND, HashMap::new()))
            }
            Error::TaskNotFound(_) => {
                refuse(Code::NotFound, error.to_string(), info(reason::TASK_NOT_FOUND, HashMap::new()))
            }
            Error::ImportedOtherwise(ref field) => {
                let mut details = info(reason::REQUEST_ID_REUSED, HashMap::new());
                details.add_bad_request_violation(field, error.to_string());
                refuse(Code::AlreadyExists, error.to_string(), details)
            }
            Error::SessionTakenOver => {
                refuse(Code::Aborted, error.to_string(), info(reason::SESSION_TAKEN_OVER, HashMap::new()))
            }
            Error::Store(StoreError::Unavailable { message, .. }) => {
                let details = retry(info(reason::STORE_UNAVAILABLE, HashMap::new()), RETRY_STORE_AFTER);
                refuse(Code::Unavailable, format!("the store is not available: {message}"), details)
            }
            Error::Store(StoreError::DatasetReset(message)) => {
                let details = retry(info(reason::DATASET_RESET, HashMap::new()), RETRY_STORE_AFTER);
                refuse(Code::Unavailable, format!("the store is not available: {message}"), details)
            }
            Error::Store(StoreError::Full(message)) => {
                let details = retry(info(reason::STORE_FULL, HashMap::new()), RETRY_STORE_AFTER);
                let message = format!("the store is full: {message}; tasks in it can be popped and acked");
                refuse(Code::ResourceExhausted, message, details)
            }
            Error::Store(StoreError::QueueFull(setting, max)) => {
                let metadata = HashMap::from([
                    ("limit".to_owned(), max.to_string()),
                    ("setting".to_owned(), setting.name().to_owned()),
                ]);
                let details = retry(info(reason::QUEUE_FULL, metadata), RETRY_STORE_AFTER);
                let message =
                    format!("the queue is full: its {} is {max}; tasks in it can be popped and acked", setting.name());
                refuse(Code::ResourceExhausted, message, details)
            }
            Error::Store(StoreError::NotEmpty) => {
                let message = "the queue has tasks, or dead letters: its shards change only while it has none, and it is deleted along with them only by force";
                let message = message.to_owned();
                refuse(Code::FailedPrecondition, message, info(reason::QUEUE_NOT_EMPTY, HashMap::new()))
            }
            Error::Store(StoreError::DurabilityUnsupported(message)) => {
                let mut details = info(reason::DURABILITY_UNSUPPORTED, HashMap::new());
                details.add_bad_request_violation("durability", &message);
                refuse(Code::FailedPrecondition, message, details)
            }
            Error::Store(StoreError::KeysApart(shards)) => {
                let message = format!(
                    "have unique keys that belong to different ones of the queue's {shards} shards; insert them one by one"
                );
                Error::Invalid(Invalid::new("tasks", reason::UNIQUE_KEYS_APART, message)).into()
            }
            // The store that answers so goes on with what is right by then.
            Error::Store(error @ StoreError::Moved) => bug(&error.to_string()),
            Error::Store(StoreError::PlaceUnknown) => {
                let message = "is not a next_page_token of this call";
                Error::Invalid(Invalid::new("page_token", reason::PAGE_TOKEN_INVALID, message)).into()
            }
            Error::Store(StoreError::Overloaded(message)) => {
                let details = retry(info(reason::OVERLOADED, HashMap::new()), RETRY_OVERLOADED_AFTER);
                refuse(Code::ResourceExhausted, format!("the server is overloaded: {message}"), details)
            }
            Error::Store(StoreError::RequestIdReused) => reused("request_id"),
            Error::Numbered { number, error } => {
                let status = match *error {
                    Error::Store(StoreError::RequestIdReused) => reused("insert.number"),
                    error => error.into(),
                };
                with_number(&status, number)
            }
            Error::Store(StoreError::NumberForgotten) => {
                let message =
                    "is not greater than the producer's last one, and was not used, or is too old to be known";
                Error::Invalid(Invalid::new("insert.number", reason::PRODUCE_INVALID, message)).into()
            }
            Error::Store(StoreError::Broken(cause)) | Error::Bug(cause) => bug(&cause),
        }
    }
}

fn reused(field: &str) -> Status {
    let mut details = info(reason::REQUEST_ID_REUSED, HashMap::new());
    let message = "was used before, with other content";
    details.add_bad_request_violation(field, message);
    refuse(Code::AlreadyExists, format!("{field}: {message}"), details)
}

/// Names the insert of a stream that a status is about.
fn with_number(status: &Status, number: u64) -> Status {
    let mut details = status.get_error_details();
    if let Some(info) = details.error_info().cloned() {
        let mut metadata = info.metadata;
        metadata.insert("number".to_owned(), number.to_string());
        details.set_error_info(info.reason, info.domain, metadata);
    }
    refuse(status.code(), status.message().to_owned(), details)
}

/// A bug of ours: logged here, with its cause, and only here.
pub(super) fn bug(cause: &str) -> Status {
    tracing::error!(cause, "a call failed for a bug in the server");
    let message = "a bug in the server; its log has the cause";
    refuse(Code::Internal, message.to_owned(), info(reason::INTERNAL, HashMap::new()))
}

/// The server is stopping.
pub(super) fn shutting_down() -> Status {
    let details = retry(info(reason::SHUTTING_DOWN, HashMap::new()), RETRY_STOPPED_AFTER);
    refuse(Code::Unavailable, "the server is stopping".to_owned(), details)
}

/// The request is longer than the server reads.
pub(super) fn message_too_large(limit: usize) -> Status {
    let details = info(reason::MESSAGE_TOO_LARGE, HashMap::from([("limit".to_owned(), limit.to_string())]));
    refuse(
        Code::ResourceExhausted,
        format!(
            "the request has more than {limit} bytes; send fewer tasks at a time, or raise the server's --max-message"
        ),
        details,
    )
}

/// The caller's deadline passed. Without details: those would mean that nothing happened, and it may have.
pub(super) fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("the call's deadline passed")
}

/// The client of a stream did not read.
pub(super) fn not_read(limit: Duration) -> Status {
    let limit = humantime::format_duration(limit);
    Status::deadline_exceeded(format!(
        "the client did not read for {limit}; the tasks that were not sent went back to their queue, and their tokens are void"
    ))
}

/// The `grpc-timeout` header is no timeout.
pub(super) fn timeout_invalid() -> Status {
    let mut details = info(reason::TIMEOUT_INVALID, HashMap::new());
    let message = "must be 1 to 8 digits and one of the units H, M, S, m, u, n";
    details.add_bad_request_violation("grpc-timeout", message);
    refuse(Code::InvalidArgument, format!("grpc-timeout: {message}"), details)
}

fn info(reason: &str, metadata: HashMap<String, String>) -> ErrorDetails {
    ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata)
}

fn retry(mut details: ErrorDetails, after: Duration) -> ErrorDetails {
    details.set_retry_info(Some(after));
    details
}

fn refuse(code: Code, message: String, details: ErrorDetails) -> Status {
    Status::with_error_details(code, message, details)
}
