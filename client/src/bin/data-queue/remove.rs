//! `data-queue delete`, `delete-queue`, `purge` and `redrive`: what cannot be undone.

use std::process::ExitCode;

use clap::{ArgGroup, Args as ClapArgs};
use data_queue_client::{DeleteOutcome, RedriveOutcome, Redriven, TaskState};

use crate::{Stop, args::Common, ask::Sure, out::Row, session::Session, tasks::State};

/// The most ids of a call.
const MAX_IDS: usize = 1_000;

/// Deletes tasks, whatever their state
///
/// One that a worker holds is cancelled: the worker is told, may still finish it, and it is gone when it would go back. Exit code 1 if
/// one of them is not there.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Columns: id, outcome (deleted, cancelled or not_found).")]
pub(crate) struct Delete {
    /// The queue
    queue: String,

    /// Their ids
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,

    #[command(flatten)]
    sure: Sure,
}

impl Delete {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let mut session = Session::open(common)?;
        self.sure.ask(&format!("Delete {} of {}?", tasks(self.ids.len() as u64), self.queue))?;
        let mut missing = 0;
        for ids in self.ids.chunks(MAX_IDS) {
            let outcomes = session.admin().delete_tasks(&self.queue, ids).await;
            let outcomes = session.take(outcomes)?;
            missing += outcomes.iter().filter(|outcome| **outcome == DeleteOutcome::NotFound).count();
            let name = |outcome| match outcome {
                DeleteOutcome::Deleted => "deleted",
                DeleteOutcome::Cancelled => "cancelled",
                DeleteOutcome::NotFound => "not_found",
            };
            session.out.rows(&rows(ids, outcomes.into_iter().map(name)))?;
        }
        all_done(missing, self.ids.len(), "were not there")
    }
}

/// Deletes a queue: its settings, its counts, and with --force its tasks
#[derive(Debug, ClapArgs)]
pub(crate) struct DeleteQueue {
    /// The queue
    queue: String,

    /// With its tasks, dead letters included
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    sure: Sure,
}

impl DeleteQueue {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open_patient(common)?;
        let what = if self.force { "with all its tasks" } else { "if it has no tasks" };
        self.sure.ask(&format!("Delete the queue {} {what}?", self.queue))?;
        session.take(session.admin().delete_queue(&self.queue, self.force).await)?;
        let row = Row::new().with("queue", self.queue.as_str()).with("outcome", "deleted");
        session.out.done(&format!("{} is gone", self.queue), &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Removes the tasks of a queue that are in one of the given states
#[derive(Debug, ClapArgs)]
#[command(after_help = "Columns: queue, purged (how many).")]
pub(crate) struct Purge {
    /// The queue
    queue: String,

    /// In which states, such as ready,scheduled
    #[arg(long = "state", value_name = "STATE", value_enum, value_delimiter = ',', required = true)]
    states: Vec<State>,

    #[command(flatten)]
    sure: Sure,
}

impl Purge {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open_patient(common)?;
        let states: Vec<_> = self.states.iter().map(|state| format!("{state:?}").to_lowercase()).collect();
        self.sure.ask(&format!("Remove the {} tasks of {}?", states.join(" and "), self.queue))?;
        let purged = session.admin().purge(&self.queue, self.states.iter().copied().map(TaskState::from)).await;
        let purged = session.take(purged)?;
        let row = Row::new().with("queue", self.queue.as_str()).with("purged", purged);
        session.out.done(&format!("{} removed from {}", tasks(purged), self.queue), &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes dead letters ready again, at the tail and with their failures and expiries counted anew
///
/// One whose unique key another task has by now stays dead. Exit code 1 if one of them is not ready then.
#[derive(Debug, ClapArgs)]
#[command(group = ArgGroup::new("which").required(true), after_help = REDRIVE_AFTER_HELP)]
pub(crate) struct Redrive {
    /// The queue
    queue: String,

    /// Those with these ids
    #[arg(value_name = "ID", group = "which")]
    ids: Vec<String>,

    /// The oldest ones, so many at the most, 1 or more
    #[arg(long, value_name = "N", group = "which", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,

    /// All of them; asks, as delete does
    #[arg(long, group = "which")]
    all: bool,

    #[command(flatten)]
    sure: Sure,
}

const REDRIVE_AFTER_HELP: &str = "\
Columns with ids: id, outcome (redriven, duplicate, expired or not_found); otherwise: queue, redriven, duplicates (how many stay \
dead, since another task has their unique key).";

impl Redrive {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        if !self.ids.is_empty() {
            return self.redrive_ids(Session::open(common)?).await;
        }
        let session = Session::open_patient(common)?;
        let redriven = match self.max {
            Some(max) => session.admin().redrive_oldest(&self.queue, max).await,
            None => {
                self.sure.ask(&format!("Make all dead letters of {} ready again?", self.queue))?;
                session.admin().redrive_all(&self.queue).await
            }
        };
        let Redriven { redriven, duplicates, .. } = session.take(redriven)?;
        let row =
            Row::new().with("queue", self.queue.as_str()).with("redriven", redriven).with("duplicates", duplicates);
        session.out.done(&format!("{} of {} made ready again", tasks(redriven), self.queue), &row)?;
        let asked = redriven + duplicates;
        all_done(duplicates as usize, asked as usize, "stay dead, since another task has their unique key")
    }

    async fn redrive_ids(&self, mut session: Session) -> Result<ExitCode, Stop> {
        let mut left = 0;
        for ids in self.ids.chunks(MAX_IDS) {
            let redriven = session.admin().redrive(&self.queue, ids).await;
            let outcomes = session.take(redriven)?.outcomes;
            left += outcomes.iter().filter(|outcome| **outcome != RedriveOutcome::Redriven).count();
            let name = |outcome| match outcome {
                RedriveOutcome::Redriven => "redriven",
                RedriveOutcome::Duplicate => "duplicate",
                RedriveOutcome::Expired => "expired",
                RedriveOutcome::NotFound => "not_found",
            };
            session.out.rows(&rows(ids, outcomes.into_iter().map(name)))?;
        }
        all_done(left, self.ids.len(), "are not ready")
    }
}

fn rows(ids: &[String], outcomes: impl Iterator<Item = &'static str>) -> Vec<Row> {
    let row = |(id, outcome): (&String, &'static str)| Row::new().with("id", id.as_str()).with("outcome", outcome);
    ids.iter().zip(outcomes).map(row).collect()
}

fn tasks(count: u64) -> String {
    if count == 1 { "1 task".to_owned() } else { format!("{count} tasks") }
}

fn all_done(left: usize, asked: usize, what: &str) -> Result<ExitCode, Stop> {
    match left {
        0 => Ok(ExitCode::SUCCESS),
        left => Err(Stop::failed(format!("{left} of {asked} {what}"))),
    }
}
