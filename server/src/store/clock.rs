//! The time of the stores that live in this process.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::Millis;

/// Tells the time, in milliseconds since the Unix epoch.
pub trait Clock: Send + Sync + 'static {
    /// Now.
    fn now(&self) -> Millis;
}

/// The machine's clock as it was at the beginning, and from there on without leaps: whoever sets the machine's clock
/// must not end leases.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    began: Instant,
    at: Millis,
}

impl SystemClock {
    /// Begins now, or at this time if the machine's clock is behind it.
    pub fn not_before(earliest: Millis) -> Self {
        let at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        Self { began: Instant::now(), at: at.max(earliest) }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::not_before(0)
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Millis {
        self.at.saturating_add(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}
