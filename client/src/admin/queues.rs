//! What operators are told of queues.

use std::time::Duration;

use data_queue_proto::v1;

use super::QueueSettings;

/// A queue.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QueueInfo {
    /// Its name.
    pub name: String,
    /// Its tasks.
    pub counts: QueueCounts,
    /// What is set for it. Told by [`Admin::get_queue`](crate::Admin::get_queue) only.
    pub settings: Option<QueueSettings>,
}

impl From<v1::Queue> for QueueInfo {
    fn from(v1::Queue { name, counts, settings }: v1::Queue) -> Self {
        Self { name, counts: counts.unwrap_or_default().into(), settings: settings.map(QueueSettings::from) }
    }
}

/// How many tasks are where. At any moment, inserted = ready + scheduled + leased + dead + acked + expired + deleted + purged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueCounts {
    /// Tasks that can be popped.
    pub ready: u64,
    /// Tasks that are not due yet.
    pub scheduled: u64,
    /// Tasks that are held by workers.
    pub leased: u64,
    /// Dead letters: tasks that were given up, and are kept.
    pub dead: u64,
    /// Tasks that were ever inserted.
    pub inserted: u64,
    /// Tasks that were ever acked. They are gone.
    pub acked: u64,
    /// Tasks that are gone because their time to live had passed, and dead letters that were kept long enough.
    pub expired: u64,
    /// Tasks that operators deleted by their ids.
    pub deleted: u64,
    /// Tasks that operators purged.
    pub purged: u64,
    /// How long the task at the head has been in the queue, since its insert. `None` if no task is ready, or if the store cannot
    /// tell at once which one is at the head.
    pub oldest_ready_age: Option<Duration>,
    /// Whether nothing is delivered, since the queue was paused.
    pub paused: bool,
}

impl From<v1::QueueCounts> for QueueCounts {
    fn from(counts: v1::QueueCounts) -> Self {
        let v1::QueueCounts {
            ready,
            leased,
            dead,
            inserted,
            acked,
            oldest_ready_age,
            scheduled,
            expired,
            deleted,
            purged,
            paused,
        } = counts;
        let oldest_ready_age = oldest_ready_age.and_then(|age| Duration::try_from(age).ok());
        Self { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, oldest_ready_age, paused }
    }
}

/// What goes on in a queue.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct QueueActivity {
    /// Its name.
    pub queue: String,
    /// Its tasks.
    pub counts: QueueCounts,
    /// Tasks inserted a second, since the last time. 0 the first time.
    pub inserted_per_second: f64,
    /// Tasks acked a second, since the last time. 0 the first time.
    pub acked_per_second: f64,
}

impl From<v1::QueueActivity> for QueueActivity {
    fn from(activity: v1::QueueActivity) -> Self {
        let v1::QueueActivity { queue, counts, inserted_per_second, acked_per_second } = activity;
        Self { queue, counts: counts.unwrap_or_default().into(), inserted_per_second, acked_per_second }
    }
}
