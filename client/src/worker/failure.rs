//! What a handler answers when it does not succeed.

use std::{any::Any, error::Error as StdError, fmt, time::Duration};

/// Why a handler did not succeed: made of any error that can be shown, so `?` works on all of them.
///
/// A [`Reject`] makes a dead letter, also from within a `Box<dyn Error>`. Everything else is a failure, with the text of the error as its reason, of which
/// the server keeps 1,024 bytes.
///
/// ```
/// use data_queue_client::{Failure, Reject};
///
/// fn handle(text: &str) -> Result<(), Failure> {
///     let amount: u32 = text.parse()?;
///     if amount == 0 {
///         return Err(Reject::new("nothing to pay").into());
///     }
///     if amount > 100 { Err("the cash box is empty".into()) } else { Ok(()) }
/// }
/// assert!(handle("1").is_ok() && handle("0").is_err() && handle("one").is_err() && handle("101").is_err());
/// ```
pub struct Failure(pub(super) Verdict);

pub(super) enum Verdict {
    Failed(String),
    Rejected(String),
}

impl Failure {
    pub(super) fn of_deadline(deadline: Duration) -> Self {
        Self(Verdict::Failed(format!("deadline of {} s passed", deadline.as_secs_f64())))
    }

    /// What a panic says, if it is a text.
    pub(super) fn of_panic(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        Self(Verdict::Failed(match text {
            Some(text) => format!("the handler panicked: {text}"),
            None => "the handler panicked".to_owned(),
        }))
    }
}

/// It has no [`fmt::Display`], so that this can be for all that have.
impl<E: fmt::Display + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        match rejection(&error) {
            Some(reject) => Self(Verdict::Rejected(reject.reason.clone())),
            // What keeps a chain of causes may show it in this form only.
            None => Self(Verdict::Failed(format!("{error:#}"))),
        }
    }
}

fn rejection(error: &dyn Any) -> Option<&Reject> {
    if let Some(boxed) = error.downcast_ref::<Box<dyn StdError + Send + Sync>>() {
        return boxed.downcast_ref();
    }
    if let Some(boxed) = error.downcast_ref::<Box<dyn StdError>>() {
        return boxed.downcast_ref();
    }
    error.downcast_ref()
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Verdict::Failed(reason) => f.debug_tuple("Failed").field(reason).finish(),
            Verdict::Rejected(reason) => f.debug_tuple("Rejected").field(reason).finish(),
        }
    }
}

/// The error of a handler whose task will never succeed: it becomes a dead letter at once, whatever its counters say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Reject {
    reason: String,
}

impl Reject {
    /// The reason is kept with the dead letter, at most 1,024 bytes of it.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_rejection_is_found_in_whatever_box_and_all_else_failed() {
        let rejected = |failure: Failure| match failure.0 {
            Verdict::Rejected(reason) => reason,
            Verdict::Failed(reason) => panic!("failed: {reason}"),
        };
        assert_eq!(rejected(Reject::new("no").into()), "no");
        assert_eq!(rejected(Box::<dyn StdError + Send + Sync>::from(Reject::new("no")).into()), "no");
        assert_eq!(rejected(Box::<dyn StdError>::from(Reject::new("no")).into()), "no");
        for failure in
            ["no".into(), String::from("no").into(), Failure::from(Box::<dyn StdError + Send + Sync>::from("no"))]
        {
            assert!(matches!(&failure.0, Verdict::Failed(reason) if reason == "no"), "{failure:?}");
        }
    }

    #[test]
    fn a_deadline_is_told_in_seconds() {
        for (deadline, text) in [(Duration::from_secs(60), "60"), (Duration::from_millis(1_500), "1.5")] {
            assert!(format!("{:?}", Failure::of_deadline(deadline)).contains(&format!("deadline of {text} s passed")));
        }
    }
}
