//! `data-queue copy`: queues go from one server to another.
//!
//! Here it is said which, and what came of it; `ends` is both servers and what is asked of them, `moving` how one queue goes.

mod ends;
mod moving;

use std::{
    io::{IsTerminal, Write, stderr},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args as ClapArgs;
use data_queue_client::Page;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::watch;

use self::{
    ends::{Ends, Trouble},
    moving::{Moved, Moving},
};
use crate::{
    EXIT_FAILED, Stop,
    args::Common,
    out::{Cell, Out, Row},
    signals::Signals,
};

/// How many queues a list has a page.
const NAMES: u32 = 1_000;
/// As long as a lease can be.
const LONGEST: Duration = Duration::from_secs(12 * 60 * 60);

/// Moves queues from one server to another
///
/// Their settings go first. Then deliveries of the queue are paused at the source, and its dead letters, scheduled and ready tasks
/// go to the target in their order, with their counters and times, until none is left: what producers insert at the source
/// meanwhile goes too. A task gets a new id at the target, joins the tail of its priority there, and can be delivered at once. In
/// the end the source delivers again, unless it was paused before; the queue itself stays there, empty.
///
/// Held tasks are their workers': they are acked, or go back to the queue and are moved then. What cannot go stays and is told:
/// a task whose unique key another one has at the target, or that the target refuses.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CopyQueues {
    /// The server that has the queues
    #[arg(long, value_name = "HOST:PORT")]
    from: String,

    /// The server that gets them
    #[arg(long, value_name = "HOST:PORT")]
    to: String,

    /// The queues
    #[arg(value_name = "QUEUE", required_unless_present = "all", conflicts_with = "all")]
    queues: Vec<String>,

    /// All queues of the source
    #[arg(long)]
    all: bool,

    /// How long to wait for each queue's held tasks when they are all that is left, 0s to 12h
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = patience)]
    wait: Duration,

    /// Move into a queue that has tasks and other settings, too: it gets the settings of the source
    #[arg(long)]
    force: bool,
}

const AFTER_HELP: &str = "\
Example:
  data-queue copy --from 10.0.0.1:50051 --to 10.0.0.2:50051 mail pictures

Point producers at the target first, or stop them: what they insert at the source when this is done stays there. Workers of the \
target may be at work.

It can be broken off, also by a crash, and run again: a task is deleted at the source as soon as the target has it, and the target \
knows a task again that it got before as long as it has it, and for 5 minutes at least (--memory-window there). So only the last \
400 tasks can ever be doubled, and only those of them that workers of the target have finished by then, if it is run again later than that. \
Ctrl-C ends it after the tasks under way; a second one at once. When tasks may be at both servers the source stays paused, and a line says so: \
run it again.

Whether the queue is paused is not copied. --addr does not count here.

Columns: queue, moved (ready + scheduled + dead), ready, scheduled, dead, duplicates, refused, held (these three stay), and how long \
it took. JSON: these.

Exit code 1: something stays at the source, as stderr says.";

impl CopyQueues {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let ends = Ends::new(&self.from, &self.to)?;
        let (stop, stopped) = watch::channel(false);
        let signals = Signals::listen()?;
        let work = self.move_all(&ends, common, stopped);
        let abandoned = async {
            heed(signals, &stop).await;
            Stop::failed(format!(
                "broken off: some tasks may be at both servers, and a queue may still be paused at {}; run it again",
                self.from
            ))
        };
        tokio::select! {
            code = work => code,
            stop = abandoned => Err(stop),
        }
    }

    async fn move_all(&self, ends: &Ends, common: &Common, stopped: watch::Receiver<bool>) -> Result<ExitCode, Stop> {
        let names = if self.all { all_of(ends).await? } else { self.queues.clone() };
        for name in &names {
            ends.known(name).await.map_err(Trouble::stop)?;
        }
        let mut out = Out::new(common.output);
        let (mut stays, mut written) = (false, Ok(()));
        for name in &names {
            if *stopped.borrow() {
                return Err(Stop::failed(format!("ended before {name} was moved: run it again")));
            }
            let began = Instant::now();
            let mut moving = Moving::new(ends, name, self.force, self.wait, stopped.clone(), bar(name));
            let ended = moving.run().await;
            let moved = moving.moved();
            // Whether anybody reads of it or not, all goes, and what goes wrong is told.
            if written.is_ok() {
                written = out.rows(&[row(name, &moved, began.elapsed())]);
            }
            tell(name, &self.from, &self.to, &moved);
            stays |= moved.duplicates + moved.refused + moved.held > 0;
            ended?;
        }
        match written {
            Err(stop) if !stop.is_unread() => Err(stop),
            _ if stays => Ok(ExitCode::from(EXIT_FAILED)),
            _ => Ok(ExitCode::SUCCESS),
        }
    }
}

/// Ends with the second signal.
async fn heed(mut signals: Signals, stop: &watch::Sender<bool>) {
    signals.next().await;
    stop.send_replace(true);
    let _ = writeln!(stderr(), "data-queue: ends after the tasks under way; the next signal ends it at once");
    signals.next().await;
}

async fn all_of(ends: &Ends) -> Result<Vec<String>, Stop> {
    let (mut names, mut next) = (Vec::new(), Some(Page::first().size(NAMES)));
    while let Some(page) = next {
        let found = ends.names(&page).await?;
        names.extend(found.items.into_iter().map(|queue| queue.name));
        next = found.next;
    }
    Ok(names)
}

fn row(name: &str, moved: &Moved, took: Duration) -> Row {
    let Moved { ready, scheduled, dead, duplicates, refused, held } = *moved;
    Row::new()
        .with("queue", name)
        .with("moved", ready + scheduled + dead)
        .with("ready", ready)
        .with("scheduled", scheduled)
        .with("dead", dead)
        .with("duplicates", duplicates)
        .with("refused", refused)
        .with("held", held)
        .with("took", Cell::Span(Some(Duration::from_millis(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)))))
}

fn patience(text: &str) -> Result<Duration, String> {
    let patience = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if patience <= LONGEST { Ok(patience) } else { Err("it is 0s to 12h".into()) }
}

/// Says what stays, and why.
fn tell(name: &str, from: &str, to: &str, moved: &Moved) {
    let Moved { duplicates, refused, held, .. } = *moved;
    for (count, why) in [
        (duplicates, format!("since other tasks have their unique keys at {to}")),
        (refused, format!("since {to} refused them, or they are damaged")),
        (held, "with the workers that hold them: run it again when these are done".to_owned()),
    ] {
        if count > 0 {
            let stay = if count == 1 { "task stays" } else { "tasks stay" };
            let _ = writeln!(stderr(), "data-queue: {name}: {count} {stay} at {from}, {why}");
        }
    }
}

fn bar(name: &str) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_message(name.to_owned());
    match ProgressStyle::with_template("{spinner} {msg}: {pos} tasks moved, {per_sec}, {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
