//! The settings of queues: which there are, and what they may be.

use std::time::Duration;

use data_queue_proto::reason;

use crate::{
    queue::{
        Queues,
        error::{Error, Invalid},
        limits::{self, MAX_DELAY, MAX_LEASE, MIN_LEASE, Span},
        uncancelled::uncancelled,
    },
    store::{MAX_SHARDS, QueueName, Setting, Settings},
};

/// The most failures or expiries that a queue may allow.
const MAX_TRIES: u64 = 1_000_000;
/// How much of what is no setting is repeated to who named it, in characters.
const MAX_SHOWN: usize = 64;
/// The shortest time for which dead letters may be kept.
const MIN_RETENTION: Duration = Duration::from_secs(1);

/// A value as a request gives it.
#[derive(Clone, Copy, Debug)]
pub enum Given {
    /// A span.
    Span(Span),
    /// A number.
    Number(u64),
}

/// What a setting is to be; nothing: as the server's settings say.
pub type SettingChange = (Setting, Option<Given>);

impl Queues {
    /// Changes settings, all of these or none. `named` is what a request named as such and is no setting.
    pub async fn update(&self, queue: &str, changes: &[SettingChange]) -> Result<Settings, Error> {
        let queue = limits::queue(queue)?;
        if changes.is_empty() {
            let message = "is empty; it names the settings to change, or is \"*\"";
            return Err(Error::Invalid(Invalid::new("update_mask", reason::UPDATE_MASK_INVALID, message)));
        }
        let checked: Result<Vec<_>, Error> = changes
            .iter()
            .map(|(setting, given)| Ok((*setting, given.map(|given| value(*setting, given)).transpose()?)))
            .collect();
        self.change(&queue, &checked?).await
    }

    /// Refuses a mask that names what is no setting.
    pub fn no_setting(path: &str) -> Error {
        // A status has to fit in the headers that clients take.
        let path: String = path.chars().take(MAX_SHOWN).collect();
        let message = format!("names {path:?}, which is no setting, or too many");
        Error::Invalid(Invalid::new("update_mask", reason::UPDATE_MASK_INVALID, message))
    }

    /// Stops the deliveries of a queue.
    pub async fn pause(&self, queue: &str) -> Result<(), Error> {
        let queue = limits::queue(queue)?;
        self.change(&queue, &[(Setting::Paused, Some(1))]).await.map(drop)
    }

    /// Lets them go on.
    pub async fn resume(&self, queue: &str) -> Result<(), Error> {
        let queue = limits::queue(queue)?;
        if self.store.settings(&queue).await?.is_none() {
            return Err(Error::QueueNotFound(queue));
        }
        self.change(&queue, &[(Setting::Paused, None)]).await.map(drop)
    }

    /// Those who wait look again: there may be something for them now.
    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, Error> {
        let (this, queue, changes) = (self.clone(), queue.clone(), changes.to_vec());
        // A caller who leaves must not keep the waiters from being woken.
        uncancelled(&self.background, async move {
            let settings = this.store.change(&queue, &changes).await?;
            if !settings.paused() {
                this.waits.wake(&queue, usize::MAX);
            }
            Ok(settings)
        })
        .await
    }
}

/// As a store keeps it: milliseconds, or a number.
fn value(setting: Setting, given: Given) -> Result<u64, Error> {
    let field = match setting {
        Setting::Lease => "settings.lease",
        Setting::MaxFailures => "settings.max_failures",
        Setting::MaxExpiries => "settings.max_expiries",
        Setting::BackoffMin => "settings.retry_backoff.min",
        Setting::BackoffMax => "settings.retry_backoff.max",
        Setting::MaxTasks => "settings.max_tasks",
        Setting::MaxBytes => "settings.max_bytes",
        Setting::DeadLetterRetention => "settings.dead_letter_retention",
        Setting::Paused => "settings.paused",
        Setting::Shards => "settings.shards",
    };
    let refuse = |message| Error::Invalid(Invalid::new(field, reason::SETTING_OUT_OF_RANGE, message));
    let (min, max) = match setting {
        Setting::Lease => (MIN_LEASE, MAX_LEASE),
        Setting::DeadLetterRetention => (MIN_RETENTION, MAX_DELAY),
        _ => (Duration::ZERO, MAX_DELAY),
    };
    match given {
        Given::Span(span) => span.millis(min, Some(max)).ok_or_else(|| {
            let [min, max] = [min, max].map(humantime::format_duration);
            refuse(format!("is {span}; {min} to {max} are allowed"))
        }),
        Given::Number(number) => match setting {
            Setting::MaxFailures | Setting::MaxExpiries if !(1..=MAX_TRIES).contains(&number) => {
                Err(refuse(format!("is {number}; 1 to {MAX_TRIES} are allowed")))
            }
            Setting::Shards if !number.is_power_of_two() || number > MAX_SHARDS.into() => {
                Err(refuse(format!("is {number}; 1, 2, 4 and so on up to {MAX_SHARDS} are allowed")))
            }
            // What stores can count exactly.
            _ if number > 1 << 53 => Err(refuse(format!("is {number}; at most {} is allowed", 1_u64 << 53))),
            _ => Ok(number),
        },
    }
}
