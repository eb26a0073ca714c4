//! `data-queue set`, `pause` and `resume`: what holds for a queue.

use std::{process::ExitCode, str::FromStr};

use clap::Args as ClapArgs;
use data_queue_client::{QueueSettings, SettingsUpdate};

use crate::{
    Stop,
    args::{Common, span},
    out::{Cell, Row},
    session::Session,
};

/// Changes settings of a queue, all that are named or none, and shows them all
///
/// They hold at once, on every server, also for a queue that has no task yet. A setting without a value, as in max-failures=, is
/// unset: then it is as the server's flags say.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Set {
    /// The queue
    queue: String,

    /// What to change
    #[arg(value_name = "NAME=VALUE", required = true, value_parser = change)]
    changes: Vec<(String, String)>,
}

const AFTER_HELP: &str = "\
Settings:
  lease                  how long a pop holds a task, 100ms to 12h
  max-failures           a task that failed so often is a dead letter, 1 to 1000000
  max-expiries           a task whose leases ran out so often is a dead letter, 1 to 1000000
  backoff-min            how long a task rests after its first failure, 0s to 366days; then twice as long
                         each time
  backoff-max            the longest such rest, 0s to 366days
  max-tasks              the most tasks that are ready, scheduled or held
  max-bytes              the most bytes that these have
  dead-letter-retention  how long dead letters are kept, 1s to 366days
  shards                 over how many shards Redis spreads the queue, 1, 2, 4 … 64; only while it has
                         no tasks

Example:
  data-queue set mail lease=2m max-tasks=100000 max-failures=";

impl Set {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        let update = self.changes.iter().try_fold(SettingsUpdate::new(), |update, (name, value)| {
            changed(update, name, value).map_err(Stop::usage)
        })?;
        let settings = session.admin().update_queue(&self.queue, update).await;
        let settings = session.take(settings)?;
        session.out.record(&shown(Row::new().with("queue", self.queue), &settings))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Stops deliveries of a queue; inserts go on, and what is held may be finished
#[derive(Debug, ClapArgs)]
pub(crate) struct Pause {
    /// The queue
    queue: String,
}

impl Pause {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        session.take(session.admin().pause(&self.queue).await)?;
        let row = Row::new().with("queue", self.queue.as_str()).with("outcome", "paused");
        session.out.done(&format!("{} is paused: nothing is delivered until it is resumed", self.queue), &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Lets deliveries of a queue go on
#[derive(Debug, ClapArgs)]
pub(crate) struct Resume {
    /// The queue
    queue: String,
}

impl Resume {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        session.take(session.admin().resume(&self.queue).await)?;
        let row = Row::new().with("queue", self.queue.as_str()).with("outcome", "resumed");
        session.out.done(&format!("{} delivers again", self.queue), &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(crate) fn shown(row: Row, settings: &QueueSettings) -> Row {
    row.with("paused", settings.paused)
        .with("lease", Cell::Span(settings.lease))
        .with("max_failures", settings.max_failures)
        .with("max_expiries", settings.max_expiries)
        .with("backoff_min", Cell::Span(settings.backoff_min))
        .with("backoff_max", Cell::Span(settings.backoff_max))
        .with("max_tasks", settings.max_tasks)
        .with("max_bytes", settings.max_bytes)
        .with("dead_letter_retention", Cell::Span(settings.dead_letter_retention))
        .with("shards", settings.shards)
}

/// Looked at once when it is read, so that what is wrong is told as bad usage before anything is done.
fn change(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is NAME=VALUE, or NAME= to unset it")?;
    changed(SettingsUpdate::new(), name, value).map(drop)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn changed(update: SettingsUpdate, name: &str, value: &str) -> Result<SettingsUpdate, String> {
    let given = (!value.is_empty()).then_some(value);
    let time = || given.map(span).transpose();
    Ok(match name {
        "lease" => update.lease(time()?),
        "max-failures" => update.max_failures(number(given)?),
        "max-expiries" => update.max_expiries(number(given)?),
        "backoff-min" => update.backoff_min(time()?),
        "backoff-max" => update.backoff_max(time()?),
        "max-tasks" => update.max_tasks(number(given)?),
        "max-bytes" => update.max_bytes(number(given)?),
        "dead-letter-retention" => update.dead_letter_retention(time()?),
        "shards" => update.shards(number(given)?),
        "paused" => return Err("a queue is paused with pause, and goes on with resume".to_owned()),
        _ => return Err(format!("{name} is no setting: see data-queue set --help")),
    })
}

fn number<N: FromStr>(given: Option<&str>) -> Result<Option<N>, String> {
    given.map(|given| given.parse().map_err(|_| format!("{given} is no number, or too large"))).transpose()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::change;

    #[test]
    fn a_change_names_a_setting_and_a_value_that_fits_or_none() {
        for good in [
            "lease=2m",
            "lease=",
            "max-tasks=0",
            "max-failures=",
            "backoff-min=0s",
            "dead-letter-retention=7days",
            "shards=8",
        ] {
            assert!(change(good).is_ok(), "{good}");
        }
        for bad in
            ["lease", "lease=soon", "max-tasks=-1", "max-failures=5000000000", "colour=red", "paused=yes", "=", ""]
        {
            assert!(change(bad).is_err(), "{bad}");
        }
    }
}
