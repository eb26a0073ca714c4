//! Settings of queues: messages and masks into settings, and back.

use std::collections::BTreeSet;

use data_queue_proto::v1;
use tonic::Status;

use crate::{
    grpc::service::{duration, span},
    queue::{Given, Queues, SettingChange},
    store::{Setting, Settings},
};

/// The most names in a mask: each setting some times over.
const MAX_PATHS: usize = 100;

/// What a mask may name, and what that is.
const PATHS: [(&str, &[Setting]); 11] = [
    ("lease", &[Setting::Lease]),
    ("max_failures", &[Setting::MaxFailures]),
    ("max_expiries", &[Setting::MaxExpiries]),
    ("retry_backoff", &[Setting::BackoffMin, Setting::BackoffMax]),
    ("retry_backoff.min", &[Setting::BackoffMin]),
    ("retry_backoff.max", &[Setting::BackoffMax]),
    ("max_tasks", &[Setting::MaxTasks]),
    ("max_bytes", &[Setting::MaxBytes]),
    ("dead_letter_retention", &[Setting::DeadLetterRetention]),
    ("paused", &[Setting::Paused]),
    ("shards", &[Setting::Shards]),
];

/// What a message changes, of what the mask names.
pub(super) fn changes(given: &v1::QueueSettings, paths: &[String]) -> Result<Vec<SettingChange>, Status> {
    if paths.len() > MAX_PATHS {
        return Err(Queues::no_setting("").into());
    }
    let mut all = BTreeSet::<Setting>::new();
    for path in paths {
        let named = match path.as_str() {
            "*" => &Setting::ALL[..],
            path => PATHS
                .iter()
                .find(|(name, _)| *name == path)
                .map(|(_, settings)| *settings)
                .ok_or_else(|| Queues::no_setting(path))?,
        };
        all.extend(named);
    }
    Ok(all.into_iter().map(|setting| (setting, value(given, setting))).collect())
}

fn value(given: &v1::QueueSettings, setting: Setting) -> Option<Given> {
    let backoff = given.retry_backoff.unwrap_or_default();
    let time = |time: Option<prost_types::Duration>| time.map(|time| Given::Span(span(time)));
    match setting {
        Setting::Lease => time(given.lease),
        Setting::MaxFailures => given.max_failures.map(|number| Given::Number(number.into())),
        Setting::MaxExpiries => given.max_expiries.map(|number| Given::Number(number.into())),
        Setting::BackoffMin => time(backoff.min),
        Setting::BackoffMax => time(backoff.max),
        Setting::MaxTasks => given.max_tasks.map(Given::Number),
        Setting::MaxBytes => given.max_bytes.map(Given::Number),
        Setting::DeadLetterRetention => time(given.dead_letter_retention),
        Setting::Paused => given.paused.then_some(Given::Number(1)),
        Setting::Shards => given.shards.map(|number| Given::Number(number.into())),
    }
}

/// What is set.
pub(super) fn message(settings: &Settings) -> v1::QueueSettings {
    let number = |setting| settings.get(setting);
    let small = |setting| settings.get(setting).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let time = |setting| settings.get(setting).map(duration);
    let (min, max) = (time(Setting::BackoffMin), time(Setting::BackoffMax));
    v1::QueueSettings {
        lease: time(Setting::Lease),
        max_failures: small(Setting::MaxFailures),
        max_expiries: small(Setting::MaxExpiries),
        retry_backoff: (min.is_some() || max.is_some()).then_some(v1::RetryBackoff { min, max }),
        max_tasks: number(Setting::MaxTasks),
        max_bytes: number(Setting::MaxBytes),
        dead_letter_retention: time(Setting::DeadLetterRetention),
        paused: settings.paused(),
        shards: small(Setting::Shards),
    }
}
