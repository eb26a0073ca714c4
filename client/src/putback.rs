//! How a task is given back: at once or later, as failed, or for good.

use std::{fmt, time::Duration};

use data_queue_proto::v1;

use crate::{Error, Result, client::duration};

/// The longest text that says why, in bytes.
const MAX_REASON_BYTES: usize = 1_024;
/// The longest delay: 366 days.
const MAX_DELAY: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// How tasks are given back. By default as by a plain putback: at once, to the head of the queue, and not counted as a failure.
///
/// ```
/// use std::time::Duration;
///
/// use data_queue_client::Putback;
///
/// let later = Putback::new().delay(Duration::from_secs(60));
/// let failed = Putback::new().failed(true).reason("the mail server is away");
/// let given_up = Putback::new().dead_letter(true).reason("no such address");
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
#[must_use]
pub struct Putback {
    delay: Option<Duration>,
    reason: String,
    failed: bool,
    dead_letter: bool,
}

impl Putback {
    /// At once, to the head of the queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long until the task can be popped again: 0 to 366 days. It is scheduled until then, and joins the tail of its
    /// priority when it falls due. Zero: at once, at the head. Default: at once, or after a failure as long as the queue's backoff
    /// says.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Whether the task failed. Each failure is counted, and the last one that the queue allows makes a dead letter. Default: false.
    pub fn failed(mut self, failed: bool) -> Self {
        self.failed = failed;
        self
    }

    /// Whether the task becomes a dead letter at once, whatever its counters say. Default: false.
    pub fn dead_letter(mut self, dead_letter: bool) -> Self {
        self.dead_letter = dead_letter;
        self
    }

    /// Why. Kept as the task's last error if it failed or becomes a dead letter. Of a longer text the first 1,024 bytes count, so
    /// that the text of any error can be given. Default: empty.
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.reason = reason.into();
        let end = (0..=MAX_REASON_BYTES.min(self.reason.len())).rev().find(|end| self.reason.is_char_boundary(*end));
        self.reason.truncate(end.unwrap_or_default());
        self
    }

    /// What a server would refuse, and end the whole stream for it.
    pub(crate) fn check(&self) -> Result<()> {
        if self.delay.is_some_and(|delay| delay > MAX_DELAY) {
            return Err(Error::invalid_argument("the delay is longer than 366 days", "delay"));
        }
        Ok(())
    }

    pub(crate) fn tokens(self, lease_tokens: Vec<String>) -> v1::PutbackTokens {
        let Self { delay, reason, failed, dead_letter } = self;
        v1::PutbackTokens { lease_tokens, delay: delay.map(duration), reason, failed, dead_letter }
    }

    pub(crate) fn consumed(&self, queue: String, lease_tokens: Vec<String>) -> v1::ConsumePutback {
        let Self { delay, reason, failed, dead_letter } = self.clone();
        v1::ConsumePutback { queue, lease_tokens, delay: delay.map(duration), reason, failed, dead_letter }
    }
}

impl fmt::Debug for Putback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delay, failed, dead_letter, .. } = self;
        let mut debug = f.debug_struct("Putback");
        debug.field("delay", delay).field("failed", failed).field("dead_letter", dead_letter).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_two_characters() {
        let reason = |text: String| Putback::new().reason(text).tokens(Vec::new()).reason;
        assert_eq!(reason("x".repeat(1_024)).len(), 1_024);
        assert_eq!(reason("x".repeat(5_000)).len(), 1_024);
        let cut = reason("x".to_owned() + &"é".repeat(1_000));
        assert_eq!((cut.len(), cut.chars().count()), (1_023, 512));
    }

    #[test]
    fn a_delay_that_would_end_a_stream_is_refused() {
        assert!(Putback::new().delay(MAX_DELAY).check().is_ok());
        assert_eq!(
            Putback::new().delay(MAX_DELAY + Duration::from_millis(1)).check().unwrap_err().field(),
            Some("delay")
        );
    }
}
