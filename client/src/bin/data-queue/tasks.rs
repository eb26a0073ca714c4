//! `data-queue tasks`, `task` and `dead`: tasks that are looked at, and not delivered.

use std::{
    io::{IsTerminal, Write, stderr},
    process::ExitCode,
};

use clap::{Args as ClapArgs, ValueEnum};
use data_queue_client::{DeadLetterCause, TaskInfo, TaskState, TaskValue};

use crate::{
    Stop,
    args::Common,
    out::{Cell, Row},
    session::{Session, each_page},
};

/// The most tasks of a page.
const PAGE: u32 = 200;

/// A state of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum State {
    /// It can be taken.
    Ready,
    /// It is not due yet.
    Scheduled,
    /// A worker holds it.
    Leased,
    /// It was given up, and is kept.
    Dead,
}

impl From<State> for TaskState {
    fn from(state: State) -> Self {
        match state {
            State::Ready => Self::Ready,
            State::Scheduled => Self::Scheduled,
            State::Leased => Self::Leased,
            State::Dead => Self::Dead,
        }
    }
}

/// How much of a list is shown.
#[derive(Debug, ClapArgs)]
struct Extent {
    /// How many at the most, 1 or more
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,

    /// All of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

/// Lists the tasks of a queue in one state, without delivering them
///
/// Ready ones in the order of their delivery, scheduled ones by when they fall due, leased ones by when their leases end, dead ones
/// from the oldest on.
#[derive(Debug, ClapArgs)]
#[command(after_help = TASKS_AFTER_HELP)]
pub(crate) struct Tasks {
    /// The queue
    queue: String,

    /// In which state
    #[arg(long, value_enum, default_value_t = State::Ready)]
    state: State,

    #[command(flatten)]
    extent: Extent,
}

const TASKS_AFTER_HELP: &str = "\
Columns: id, priority, deliveries, failures, expiries, inserted, a time, type (json or data), value.
The time is expires of ready tasks, due of scheduled ones, lease_ends of leased ones, died of dead ones.
JSON: all that task shows.";

impl Tasks {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        list(common, &self.queue, self.state.into(), &self.extent, listed).await
    }
}

/// Lists the dead letters of a queue, from the oldest on: why each was given up, and when
#[derive(Debug, ClapArgs)]
#[command(after_help = DEAD_AFTER_HELP)]
pub(crate) struct Dead {
    /// The queue
    queue: String,

    #[command(flatten)]
    extent: Extent,
}

const DEAD_AFTER_HELP: &str = "\
Columns: id, cause (max_failures, max_expiries or rejected), failures, expiries, died, error, type, value.
JSON: all that task shows.";

impl Dead {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        list(common, &self.queue, TaskState::Dead, &self.extent, given_up).await
    }
}

/// Shows all of one task, without delivering it
#[derive(Debug, ClapArgs)]
pub(crate) struct One {
    /// The queue
    queue: String,

    /// Its id
    id: String,
}

impl One {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        let task = session.admin().get_task(&self.queue, &self.id).await;
        session.out.record(&whole(session.take(task)?))?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn list(
    common: &Common,
    queue: &str,
    state: TaskState,
    extent: &Extent,
    row: fn(TaskInfo) -> Row,
) -> Result<ExitCode, Stop> {
    let mut session = Session::open(common)?;
    let admin = session.admin();
    let limit = (!extent.all).then_some(extent.limit);
    let page = async |page: &_| admin.list_tasks(queue, state, page).await;
    let has_more = each_page(&mut session, limit, PAGE, page, |session, tasks| {
        session.out.rows(&tasks.into_iter().map(row).collect::<Vec<_>>())
    })
    .await?;
    if has_more && stderr().is_terminal() {
        let _ = writeln!(stderr(), "there are more: --limit or --all shows them");
    }
    Ok(ExitCode::SUCCESS)
}

/// What a list shows, and in JSON all.
fn listed(task: TaskInfo) -> Row {
    let time = match task.state {
        TaskState::Ready => "expires",
        TaskState::Scheduled => "due",
        TaskState::Leased => "lease_ends",
        TaskState::Dead => "died",
    };
    whole(task).only(&["id", "priority", "deliveries", "failures", "expiries", "inserted", time, "type", "value"])
}

fn given_up(task: TaskInfo) -> Row {
    whole(task).only(&["id", "cause", "failures", "expiries", "died", "error", "type", "value"])
}

fn whole(task: TaskInfo) -> Row {
    let kind = match &task.value {
        TaskValue::Json(_) => "json",
        TaskValue::Bytes(_) => "data",
    };
    Row::new()
        .with("id", task.id)
        .with("queue", task.queue)
        .with("state", state_name(task.state))
        .with("cause", task.cause.map(cause_name))
        .with("priority", task.priority)
        .with("deliveries", task.deliveries)
        .with("failures", task.failures)
        .with("expiries", task.expiries)
        .with("inserted", task.inserted_at)
        .with("due", task.due_at)
        .with("lease_ends", task.lease_expires_at)
        .with("expires", task.expires_at)
        .with("died", task.died_at)
        .with("error", task.last_error)
        .with("unique_key", task.unique_key)
        .with("cancelled", task.cancelled)
        .with("damaged", task.is_damaged)
        .with("headers", task.headers)
        .with("type", kind)
        .with("value", Cell::Value(task.value))
}

fn state_name(state: TaskState) -> &'static str {
    match state {
        TaskState::Ready => "ready",
        TaskState::Scheduled => "scheduled",
        TaskState::Leased => "leased",
        TaskState::Dead => "dead",
    }
}

fn cause_name(cause: DeadLetterCause) -> &'static str {
    match cause {
        DeadLetterCause::MaxFailures => "max_failures",
        DeadLetterCause::MaxExpiries => "max_expiries",
        DeadLetterCause::Rejected => "rejected",
    }
}
