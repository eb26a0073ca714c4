//! What is set for a queue, and how that is changed.

use std::time::Duration;

use data_queue_proto::v1;
use prost_types::FieldMask;

use crate::client::duration;

/// What is set for a queue. `None`: as the server's settings say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueSettings {
    /// How long pops and heartbeats that do not say hold a task.
    pub lease: Option<Duration>,
    /// A task that failed so often is a dead letter.
    pub max_failures: Option<u32>,
    /// A task whose leases ran out so often is a dead letter.
    pub max_expiries: Option<u32>,
    /// After how long a task that failed once can be popped again; twice as long after each further failure.
    pub backoff_min: Option<Duration>,
    /// The longest such time, but for up to a quarter more at random.
    pub backoff_max: Option<Duration>,
    /// The most tasks that are ready, scheduled or held. `None`: any number.
    pub max_tasks: Option<u64>,
    /// The most bytes that these may have, as they are stored. `None`: any number.
    pub max_bytes: Option<u64>,
    /// How long dead letters are kept. `None`: for ever.
    pub dead_letter_retention: Option<Duration>,
    /// Nothing is delivered.
    pub paused: bool,
    /// Over how many shards the queue is spread. `None`: 1.
    pub shards: Option<u32>,
}

impl From<v1::QueueSettings> for QueueSettings {
    fn from(settings: v1::QueueSettings) -> Self {
        let time = |time: Option<prost_types::Duration>| time.and_then(|time| Duration::try_from(time).ok());
        let backoff = settings.retry_backoff.unwrap_or_default();
        Self {
            lease: time(settings.lease),
            max_failures: settings.max_failures,
            max_expiries: settings.max_expiries,
            backoff_min: time(backoff.min),
            backoff_max: time(backoff.max),
            max_tasks: settings.max_tasks,
            max_bytes: settings.max_bytes,
            dead_letter_retention: time(settings.dead_letter_retention),
            paused: settings.paused,
            shards: settings.shards,
        }
    }
}

/// Changes of a queue's settings. What is not named stays; what is named with `None` is unset, so that the server's own setting
/// holds again.
///
/// ```
/// use std::time::Duration;
///
/// use data_queue_client::SettingsUpdate;
///
/// let update = SettingsUpdate::new().lease(Duration::from_secs(60)).max_tasks(100_000).max_failures(None);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use]
pub struct SettingsUpdate {
    settings: v1::QueueSettings,
    backoff: v1::RetryBackoff,
    paths: Vec<&'static str>,
}

impl SettingsUpdate {
    /// Nothing yet. An update that names nothing is refused.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long pops and heartbeats that do not say hold a task: 100 ms to 12 h.
    pub fn lease(mut self, lease: impl Into<Option<Duration>>) -> Self {
        self.settings.lease = lease.into().map(duration);
        self.naming("lease")
    }

    /// A task that failed so often is a dead letter: 1 to 1,000,000.
    pub fn max_failures(mut self, failures: impl Into<Option<u32>>) -> Self {
        self.settings.max_failures = failures.into();
        self.naming("max_failures")
    }

    /// A task whose leases ran out so often is a dead letter: 1 to 1,000,000.
    pub fn max_expiries(mut self, expiries: impl Into<Option<u32>>) -> Self {
        self.settings.max_expiries = expiries.into();
        self.naming("max_expiries")
    }

    /// After how long a task that failed once can be popped again, 0 to 366 days; twice as long after each further failure. Zero:
    /// at once.
    pub fn backoff_min(mut self, min: impl Into<Option<Duration>>) -> Self {
        self.backoff.min = min.into().map(duration);
        self.naming("retry_backoff.min")
    }

    /// The longest such time, 0 to 366 days, but for up to a quarter more at random. Less than the shortest one counts as that.
    pub fn backoff_max(mut self, max: impl Into<Option<Duration>>) -> Self {
        self.backoff.max = max.into().map(duration);
        self.naming("retry_backoff.max")
    }

    /// The most tasks that are ready, scheduled or held: an insert beyond is refused with
    /// [`ErrorKind::QueueFull`](crate::ErrorKind::QueueFull). 0: none can be inserted. `None`: any number.
    pub fn max_tasks(mut self, tasks: impl Into<Option<u64>>) -> Self {
        self.settings.max_tasks = tasks.into();
        self.naming("max_tasks")
    }

    /// The most bytes that these may have, as they are stored: value, headers and about 30 bytes more of each. `None`: any number.
    pub fn max_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.settings.max_bytes = bytes.into();
        self.naming("max_bytes")
    }

    /// How long dead letters are kept, 1 s to 366 days: then they are gone, and counted as expired. `None`: for ever.
    pub fn dead_letter_retention(mut self, retention: impl Into<Option<Duration>>) -> Self {
        self.settings.dead_letter_retention = retention.into().map(duration);
        self.naming("dead_letter_retention")
    }

    /// Over how many shards the queue is spread: 1, 2, 4 and so on up to 64. `None`: 1. It changes only while the queue has no tasks, else
    /// [`ErrorKind::QueueNotEmpty`](crate::ErrorKind::QueueNotEmpty).
    pub fn shards(mut self, shards: impl Into<Option<u32>>) -> Self {
        self.settings.shards = shards.into();
        self.naming("shards")
    }

    /// Whether nothing is delivered, as [`Admin::pause`](crate::Admin::pause) and [`Admin::resume`](crate::Admin::resume) do it.
    pub fn paused(mut self, paused: bool) -> Self {
        self.settings.paused = paused;
        self.naming("paused")
    }

    fn naming(mut self, path: &'static str) -> Self {
        if !self.paths.contains(&path) {
            self.paths.push(path);
        }
        self
    }

    pub(super) fn into_message(self) -> (v1::QueueSettings, FieldMask) {
        let Self { settings, backoff, paths } = self;
        let settings = v1::QueueSettings { retry_backoff: Some(backoff), ..settings };
        (settings, FieldMask { paths: paths.into_iter().map(str::to_owned).collect() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn an_update_names_what_it_sets_and_what_it_unsets_once() {
        let second = Duration::from_secs(1);
        let update = SettingsUpdate::new().lease(second).max_tasks(0).lease(None).backoff_max(second).paused(false);
        let (settings, mask) = update.into_message();
        assert_eq!(mask.paths, ["lease", "max_tasks", "retry_backoff.max", "paused"]);
        assert_eq!((settings.lease, settings.max_tasks), (None, Some(0)));
        assert_eq!(QueueSettings::from(settings).backoff_max, Some(second));
        assert!(SettingsUpdate::new().into_message().1.paths.is_empty());
    }
}
