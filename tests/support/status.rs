//! What a refusal carries besides its code.

use std::time::Duration;

use data_queue_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The `google.rpc` details of a status.
pub trait Details {
    fn reason(&self) -> Option<String>;
    fn domain(&self) -> Option<String>;
    /// The first field that `BadRequest` names.
    fn field(&self) -> Option<String>;
    fn retry_delay(&self) -> Option<Duration>;
    /// Whether a value of the `ErrorInfo` metadata is this one.
    fn has_metadata(&self, value: &str) -> bool;
}

impl Details for Status {
    fn reason(&self) -> Option<String> {
        self.get_details_error_info().map(|info| info.reason)
    }

    fn domain(&self) -> Option<String> {
        self.get_details_error_info().map(|info| info.domain)
    }

    fn field(&self) -> Option<String> {
        self.get_details_bad_request()?.field_violations.into_iter().next().map(|violation| violation.field)
    }

    fn retry_delay(&self) -> Option<Duration> {
        self.get_details_retry_info()?.retry_delay
    }

    fn has_metadata(&self, value: &str) -> bool {
        self.get_details_error_info().is_some_and(|info| info.metadata.values().any(|found| found == value))
    }
}

/// What a call must be refused with.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    pub code: Code,
    pub reason: &'static str,
    /// Part of the path in `BadRequest`.
    pub field: Option<&'static str>,
}

impl Refusal {
    pub fn invalid(reason: &'static str, field: &'static str) -> Self {
        Self { code: Code::InvalidArgument, reason, field: Some(field) }
    }

    pub fn not_found(reason: &'static str) -> Self {
        Self::of(Code::NotFound, reason)
    }

    pub fn of(code: Code, reason: &'static str) -> Self {
        Self { code, reason, field: None }
    }

    /// Checks an answer and hands back the status for more.
    #[track_caller]
    pub fn check<T: std::fmt::Debug>(&self, case: &str, answer: Result<T, Status>) -> Status {
        let status = match answer {
            Ok(answer) => panic!("{case}: {answer:?} instead of {self:?}"),
            Err(status) => status,
        };
        assert_eq!(status.code(), self.code, "{case}: {status:?}");
        assert_eq!(status.reason().as_deref(), Some(self.reason), "{case}: {status:?}");
        assert_eq!(status.domain().as_deref(), Some(ERROR_DOMAIN), "{case}: {status:?}");
        if let Some(field) = self.field {
            let named = status.field().unwrap_or_default();
            assert!(named.contains(field), "{case}: names the field {named:?}, not {field:?}");
        }
        status
    }
}
