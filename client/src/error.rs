//! What can go wrong: one error type, matched by its kind.

use std::{error::Error as StdError, fmt, time::Duration};

use data_queue_proto::{ERROR_DOMAIN, reason};
use tonic::{Code, ConnectError, Status, TimeoutExpired};
use tonic_types::StatusExt;

/// What the calls of this crate answer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The lease token is not the task's current one any more: the lease ran out and was taken back, or the task was put
    /// back. Nothing was changed.
    LeaseLost,
    /// A heartbeat or a putback of a task that was acked with this token before. Nothing was changed.
    AlreadyAcked,
    /// The queue is at its cap. Nothing was inserted; [`Error::retry_after`] says when to try again.
    QueueFull,
    /// The store has no room for more. Nothing was inserted; [`Error::retry_after`] says when to try again.
    StoreFull,
    /// The server is over its bounds. [`Error::retry_after`] says when to try again.
    Overloaded,
    /// The request is larger than the server reads.
    MessageTooLarge,
    /// Something was out of range or malformed; [`Error::field`] names it.
    InvalidArgument,
    /// The request id was used before, with other content.
    RequestIdReused,
    /// There is no such queue, or no such task in it.
    NotFound,
    /// The queue has tasks, and was not to be deleted with them. Nothing was changed.
    QueueNotEmpty,
    /// The server or its store cannot be reached now, or the connection broke. The call may have taken effect.
    Unavailable,
    /// The deadline passed. The call may have taken effect.
    DeadlineExceeded,
    /// A task arrived damaged: its md5 is not that of its value. [`Error::task_id`] names it.
    Corrupt,
    /// A value could not be written as JSON, or read from it.
    Json,
    /// A bug in the server, or an answer that this client cannot read.
    Internal,
    /// The server refused for another reason.
    Refused,
}

/// An error: a kind to match on and a text to read. Neither holds a value or a lease token.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Error {
    // In a box, so that every Result stays small.
    detail: Box<Detail>,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

#[derive(Clone, Debug)]
struct Detail {
    kind: ErrorKind,
    message: String,
    reason: Option<String>,
    field: Option<String>,
    retry_after: Option<Duration>,
    task_id: Option<String>,
    retriable: bool,
    unsent: bool,
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match (&self.reason, &self.field) {
            (Some(reason), Some(field)) => write!(f, " ({reason}, field {field})"),
            (Some(reason), None) => write!(f, " ({reason})"),
            (None, Some(field)) => write!(f, " (field {field})"),
            (None, None) => Ok(()),
        }
    }
}

impl Error {
    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.detail.kind
    }

    /// The server's reason, one of `data_queue_proto::reason`, if it gave one.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.detail.reason.as_deref()
    }

    /// The field that was refused, such as `tasks[3].json`, if one was.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        self.detail.field.as_deref()
    }

    /// How long the server asks to wait before the call is repeated.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.detail.retry_after
    }

    /// The task that the error is about, if it is about one.
    #[must_use]
    pub fn task_id(&self) -> Option<&str> {
        self.detail.task_id.as_deref()
    }

    /// Whether the call failed on its way, so that the same call may go through later. It may have taken effect: repeat
    /// it with the same request id or tokens. The client has done so already, as far as deadline and budget allowed.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        self.detail.retriable
    }

    /// Whether the call certainly never left this process.
    pub(crate) fn is_unsent(&self) -> bool {
        self.detail.unsent
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let detail = Detail {
            kind,
            message: message.into(),
            reason: None,
            field: None,
            retry_after: None,
            task_id: None,
            retriable: false,
            unsent: false,
        };
        Self { detail: Box::new(detail), source: None }
    }

    pub(crate) fn invalid_argument(message: &str, field: &str) -> Self {
        let mut error = Self::new(ErrorKind::InvalidArgument, message);
        error.detail.field = Some(field.to_owned());
        error
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    pub(crate) fn caused(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn deadline(last: Option<Error>) -> Self {
        match last {
            Some(last) => {
                let message = format!("the deadline passed; the try before failed: {last}");
                Self::new(ErrorKind::DeadlineExceeded, message).caused(last)
            }
            None => Self::new(ErrorKind::DeadlineExceeded, "the deadline passed"),
        }
    }

    /// Of an insert of a producer.
    pub(crate) fn unanswered(last: Option<Error>) -> Self {
        let message = "the deadline passed before the insert was answered; it may have been done";
        match last {
            Some(last) => {
                Self::new(ErrorKind::DeadlineExceeded, format!("{message}; the try before failed: {last}")).caused(last)
            }
            None => Self::new(ErrorKind::DeadlineExceeded, message),
        }
    }

    /// Of an insert that was refused as long as it was tried.
    pub(crate) fn until_deadline(mut self) -> Self {
        self.detail.message.push_str("; it was tried until its deadline");
        self
    }

    /// Of an insert that was refused, but that an earlier try may have done.
    pub(crate) fn in_doubt(mut self) -> Self {
        self.detail.message.push_str("; it may have been done nevertheless");
        self
    }

    pub(crate) fn no_room() -> Self {
        let message = "the deadline passed before there was room for the insert; it was not sent";
        Self::new(ErrorKind::DeadlineExceeded, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Refused, "the producer was closed; nothing was sent")
    }

    pub(crate) fn about_task(kind: ErrorKind, id: &str) -> Self {
        let what = match kind {
            ErrorKind::LeaseLost => "the lease is lost",
            ErrorKind::AlreadyAcked => "it was acked before",
            _ => "it arrived damaged: its md5 is not that of its value",
        };
        let mut error = Self::new(kind, format!("task {id}: {what}"));
        error.detail.task_id = Some(id.to_owned());
        error
    }

    /// A stream that should go on has ended.
    pub(crate) fn ended(message: &str) -> Self {
        let mut error = Self::new(ErrorKind::Unavailable, message);
        error.detail.retriable = true;
        error
    }

    /// The same error for another one who waits, without its source.
    pub(crate) fn again(&self) -> Self {
        Self { detail: self.detail.clone(), source: None }
    }

    /// The cause is not kept as the source: serde quotes the value in its messages.
    pub(crate) fn json(what: &str, cause: &serde_json::Error) -> Self {
        let place = match (cause.line(), cause.column()) {
            (0, _) => String::new(),
            (line, column) => format!(" at line {line} column {column}"),
        };
        let why = match cause.classify() {
            serde_json::error::Category::Io => "it could not be written",
            serde_json::error::Category::Syntax => "it is not JSON",
            serde_json::error::Category::Data => "it does not fit the type",
            serde_json::error::Category::Eof => "it ends too early",
        };
        Self::new(ErrorKind::Json, format!("{what}: {why}{place}"))
    }

    pub(crate) fn not_json(id: &str) -> Self {
        let mut error = Self::new(ErrorKind::Json, format!("task {id}: its value is bytes, not JSON"));
        error.detail.task_id = Some(id.to_owned());
        error
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let ours = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN);
        let reason = ours.map(|info| info.reason);
        let bad = status.get_details_bad_request();
        let detail = Detail {
            kind: kind(&status, reason.as_deref()),
            message: message(&status),
            field: bad.and_then(|bad| bad.field_violations.into_iter().next()).map(|violation| violation.field),
            retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
            task_id: None,
            retriable: retriable(&status, reason.is_some()),
            unsent: cause::<ConnectError>(&status).is_some(),
            reason,
        };
        Self { detail: Box::new(detail), source: Some(Box::new(status)) }
    }
}

fn kind(status: &Status, reason: Option<&str>) -> ErrorKind {
    match (status.code(), reason) {
        (_, Some(reason::STORE_FULL)) => ErrorKind::StoreFull,
        (_, Some(reason::QUEUE_FULL)) => ErrorKind::QueueFull,
        (_, Some(reason::QUEUE_NOT_EMPTY)) => ErrorKind::QueueNotEmpty,
        (_, Some(reason::QUEUE_NOT_FOUND | reason::TASK_NOT_FOUND)) => ErrorKind::NotFound,
        (_, Some(reason::MESSAGE_TOO_LARGE)) => ErrorKind::MessageTooLarge,
        (_, Some(reason::REQUEST_ID_REUSED)) => ErrorKind::RequestIdReused,
        (Code::InvalidArgument, _) => ErrorKind::InvalidArgument,
        (Code::ResourceExhausted, _) => ErrorKind::Overloaded,
        (Code::DeadlineExceeded, _) => ErrorKind::DeadlineExceeded,
        (Code::Unavailable, _) => ErrorKind::Unavailable,
        (Code::Cancelled, None) if cause::<TimeoutExpired>(status).is_some() => ErrorKind::DeadlineExceeded,
        // Without our details, these are how tonic reports a connection that broke under a call.
        (Code::Unknown | Code::Cancelled, None) => ErrorKind::Unavailable,
        (Code::Internal, None) if status.source().is_some() => ErrorKind::Unavailable,
        (Code::Internal | Code::Unknown | Code::DataLoss, _) => ErrorKind::Internal,
        _ => ErrorKind::Refused,
    }
}

/// Whether the status says that the call failed on its way, not that it was refused.
fn retriable(status: &Status, ours: bool) -> bool {
    match status.code() {
        Code::Unavailable => true,
        Code::Cancelled => !ours && cause::<TimeoutExpired>(status).is_none(),
        Code::Unknown | Code::Internal => !ours,
        _ => false,
    }
}

/// The status' text and, for what happened on this side, the cause at the bottom.
fn message(status: &Status) -> String {
    let mut message = match status.message() {
        "" => status.code().description().to_owned(),
        text => text.to_owned(),
    };
    let mut next = status.source();
    let mut root = None;
    while let Some(error) = next {
        root = Some(error.to_string());
        next = error.source();
    }
    if let Some(root) = root.filter(|root| !message.contains(root)) {
        message.push_str(": ");
        message.push_str(&root);
    }
    message
}

fn cause<E: StdError + 'static>(status: &Status) -> Option<&E> {
    let mut next = status.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::collections::HashMap;

    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    fn refusal(code: Code, reason: &str, more: impl FnOnce(&mut ErrorDetails)) -> Error {
        let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
        more(&mut details);
        Error::from(Status::with_error_details(code, "no", details))
    }

    #[test]
    fn a_refusal_keeps_reason_field_and_delay_and_shows_them() {
        let error = refusal(Code::InvalidArgument, reason::JSON_INVALID, |details| {
            details.set_bad_request(vec![FieldViolation::new("tasks[3].json", "line 1 column 2")]);
        });
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!((error.reason(), error.field()), (Some(reason::JSON_INVALID), Some("tasks[3].json")));
        assert_eq!(error.to_string(), "no (JSON_INVALID, field tasks[3].json)");
        assert!(error.source().is_some());

        let error = refusal(Code::ResourceExhausted, reason::STORE_FULL, |details| {
            details.set_retry_info(Some(Duration::from_secs(1)));
        });
        assert_eq!((error.kind(), error.retry_after()), (ErrorKind::StoreFull, Some(Duration::from_secs(1))));
        assert!(!error.is_retriable());
    }

    #[test]
    fn each_status_has_its_kind_and_only_failures_on_the_way_are_retriable() {
        for (code, reason, kind, retriable) in [
            (Code::Unavailable, Some(reason::STORE_UNAVAILABLE), ErrorKind::Unavailable, true),
            (Code::Unavailable, None, ErrorKind::Unavailable, true),
            (Code::Unknown, None, ErrorKind::Unavailable, true),
            (Code::Cancelled, None, ErrorKind::Unavailable, true),
            (Code::Internal, None, ErrorKind::Internal, true),
            (Code::Internal, Some(reason::INTERNAL), ErrorKind::Internal, false),
            (Code::ResourceExhausted, Some(reason::QUEUE_FULL), ErrorKind::QueueFull, false),
            (Code::ResourceExhausted, Some("OVERLOADED"), ErrorKind::Overloaded, false),
            (Code::ResourceExhausted, Some(reason::MESSAGE_TOO_LARGE), ErrorKind::MessageTooLarge, false),
            (Code::AlreadyExists, Some(reason::REQUEST_ID_REUSED), ErrorKind::RequestIdReused, false),
            (Code::DeadlineExceeded, None, ErrorKind::DeadlineExceeded, false),
            (Code::InvalidArgument, None, ErrorKind::InvalidArgument, false),
            (Code::PermissionDenied, None, ErrorKind::Refused, false),
            (Code::NotFound, Some(reason::QUEUE_NOT_FOUND), ErrorKind::NotFound, false),
            (Code::NotFound, Some(reason::TASK_NOT_FOUND), ErrorKind::NotFound, false),
            (Code::FailedPrecondition, Some(reason::QUEUE_NOT_EMPTY), ErrorKind::QueueNotEmpty, false),
        ] {
            let error = match reason {
                Some(reason) => refusal(code, reason, |_| ()),
                None => Error::from(Status::new(code, "no")),
            };
            assert_eq!((error.kind(), error.is_retriable()), (kind, retriable), "{code:?} {reason:?}");
            assert!(!error.is_unsent());
        }
    }

    #[test]
    fn what_tonic_makes_of_a_timeout_and_of_no_connection() {
        let error = Error::from(Status::from_error(Box::new(TimeoutExpired(()))));
        assert_eq!((error.kind(), error.is_retriable()), (ErrorKind::DeadlineExceeded, false));

        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = Error::from(Status::from_error(Box::new(ConnectError(refused.into()))));
        assert_eq!((error.kind(), error.is_retriable()), (ErrorKind::Unavailable, true));
        assert!(error.is_unsent());
        assert!(error.to_string().contains("connection refused"), "{error}");
    }

    #[test]
    fn a_foreign_domain_is_not_our_refusal() {
        let details = ErrorDetails::with_error_info("STORE_FULL", "example.org", HashMap::new());
        let error = Error::from(Status::with_error_details(Code::Internal, "no", details));
        assert_eq!((error.reason(), error.is_retriable()), (None, true));
    }

    #[test]
    fn a_json_error_tells_the_place_and_not_the_value() {
        let cause = serde_json::from_str::<u32>("\n \"hush\"").unwrap_err();
        assert!(cause.to_string().contains("hush"));
        let error = Error::json("task x", &cause);
        assert_eq!(error.to_string(), "task x: it does not fit the type at line 2 column 7");
        assert!(!format!("{error:?}").contains("hush") && error.source().is_none());
    }
}
