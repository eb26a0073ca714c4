//! `data-queue work`: a command for each task.
//!
//! Here tasks are taken and counted; `handler` is what becomes of one, `command` the process that works on it, and `lines` where
//! what processes say goes.

mod command;
mod handler;
mod lines;

use std::{ffi::OsString, future::pending, process::ExitCode, sync::Arc, time::Duration};

use clap::Args as ClapArgs;
use data_queue_client::{Admin, Consumer, ErrorKind};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use self::{
    handler::{Fate, Handler},
    lines::Output,
};
use crate::{
    EXIT_FAILED, Stop,
    args::{Common, span},
    session::Session,
    signals::Signals,
};

/// How long a server that is away is waited for at the end, besides the grace.
const FAREWELL: Duration = Duration::from_secs(30);
/// How long a queue seems empty before it is counted.
const LULL: Duration = Duration::from_millis(100);

/// Runs a command for each task
///
/// The command gets the task's value on stdin. Exit code 0: the task is done and acked. Any other, or a signal: it failed, with the
/// end of stderr as the reason; it comes again after the queue's backoff, or becomes a dead letter if it failed too often. Goes on
/// until Ctrl-C or SIGTERM, and waits for a server that is away. What a command says is passed on line by line; the last line on
/// stderr counts what became of the tasks.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Work {
    /// The queues, up to 64: each has the same share as long as all have tasks
    #[arg(value_name = "QUEUE", required = true)]
    queues: Vec<String>,

    /// How many commands run at once, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    concurrency: u32,

    /// How long after its worker has died a task comes back at the latest, 100ms to 12h. It does not limit how long a command may
    /// run [default: the queue's, or the server's]
    #[arg(long, value_name = "DURATION", value_parser = span)]
    lease: Option<Duration>,

    /// How long a command may run, more than 0s: then it is ended, and the task failed [default: any time]
    #[arg(long, value_name = "DURATION", value_parser = some_time)]
    deadline: Option<Duration>,

    /// How long commands may go on after Ctrl-C or SIGTERM, 0s or more; then, or at a second one, they are ended, and their tasks
    /// given back
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = span)]
    grace: Duration,

    /// Ends after so many tasks, 1 or more [default: never]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tasks: Option<u64>,

    /// Ends when nothing is ready and nobody holds a task; what is scheduled, such as after a failure, is not waited for
    #[arg(long)]
    until_empty: bool,

    /// An exit code, 1 to 255, that makes the task a dead letter at once; may be given again
    #[arg(long = "reject-code", value_name = "CODE", value_parser = clap::value_parser!(u8).range(1..))]
    reject_codes: Vec<u8>,

    /// The command and its arguments, after --; it is not given to a shell
    #[arg(value_name = "CMD", last = true, required = true)]
    command: Vec<OsString>,
}

const AFTER_HELP: &str = "\
Examples:
  data-queue work mail --concurrency 4 --deadline 1m -- ./send-mail --from ops@example.org
  data-queue work pictures --reject-code 65 -- sh -c 'convert - -resize 200 \"$DATA_QUEUE_ID.png\"'

In the environment of the command:
  DATA_QUEUE_ID, DATA_QUEUE_QUEUE, DATA_QUEUE_ADDR
  DATA_QUEUE_DELIVERIES, DATA_QUEUE_FAILURES
      this delivery counted, and how often it failed before
  DATA_QUEUE_HEADER_<NAME>
      each header; its name is in capitals, and has _ for what is no ASCII letter or digit. It is not
      there if two names become the same so, or a value has a NUL

A command has a process group of its own. To end it, the group gets SIGTERM, and after 5 s SIGKILL. What \
it leaves behind in its group ends with it. It is also ended, and the task given back, if somebody deletes the task (then it is gone) \
or its lease is lost. A SIGKILL of data-queue itself does not end commands, and their tasks come back: work must bear being done twice.

Exit codes: 0 also if tasks failed; 64 if there is no such command, and then no task was taken.";

impl Work {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        command::find(&self.command[0])?;
        let session = Session::with(common, self.grace.saturating_add(FAREWELL))?;
        let signals = Signals::listen()?;
        let mut consumer = session.client.consumer(&self.queues[0]).max_outstanding(self.most_at_once());
        for queue in &self.queues[1..] {
            consumer = consumer.queue(queue, 1);
        }
        if let Some(lease) = self.lease {
            consumer = consumer.lease(lease);
        }
        let (hurry, hurried) = watch::channel(false);
        let (output, written) = lines::start(hurried.clone());
        tokio::spawn(tell_if_away(session.admin(), self.queues[0].clone(), common.addr.clone(), output.clone()));
        let handler = Handler::new(&self, &common.addr, output.clone(), hurried);
        let mut crew =
            Crew { handler: Arc::new(handler), running: JoinSet::new(), tally: Tally::default(), signals, output };
        let mut consumer = session.take(consumer.start())?;

        let ended = self.take(&mut crew, &mut consumer, &session).await;
        let closed = crew.finish(consumer, &ended, self.grace, &hurry).await;
        let (output, line) = crew.last_line();
        written.end(output, line).await;
        match ended {
            Ended::Failed(stop) => Err(stop),
            Ended::Signal | Ended::Done => session.take(closed).map(|_| ExitCode::SUCCESS),
        }
    }

    /// Never more than are wanted in all.
    fn most_at_once(&self) -> u32 {
        let wanted = self.max_tasks.map_or(u32::MAX, |most| u32::try_from(most).unwrap_or(u32::MAX));
        wanted.min(self.concurrency)
    }

    /// Takes tasks until there is a reason to end.
    async fn take(&self, crew: &mut Crew, consumer: &mut Consumer, session: &Session) -> Ended {
        let Crew { handler, running, tally, signals, output } = crew;
        let (admin, mut taken) = (session.admin(), 0);
        loop {
            if self.max_tasks == Some(taken) {
                return Ended::Done;
            }
            let is_idle = running.is_empty();
            tokio::select! {
                () = signals.next() => return Ended::Signal,
                // What the commands say would be lost.
                stop = output.unwritten() => return Ended::Failed(stop),
                Some(fate) = running.join_next(), if !is_idle => {
                    if let Err(stop) = tally.note(fate.unwrap_or(Fate::GivenBack)) {
                        return Ended::Failed(stop);
                    }
                }
                next = consumer.next() => match next {
                    Ok(Some(task)) => {
                        taken += 1;
                        running.spawn(Arc::clone(handler).work_on(task));
                    }
                    Ok(None) => return Ended::Done,
                    Err(error) if error.kind() == ErrorKind::Corrupt => tokio::select! {
                        () = output.say(error.to_string()) => {}
                        () = signals.next() => return Ended::Signal,
                    },
                    Err(error) => return Ended::Failed(session.explain(&error)),
                },
                () = empty(&admin, &self.queues), if self.until_empty && is_idle => return Ended::Done,
            }
        }
    }
}

/// Why no more tasks are taken.
enum Ended {
    /// There are none, or not more are wanted.
    Done,
    /// Somebody said so.
    Signal,
    /// It makes no sense to go on.
    Failed(Stop),
}

/// The commands that run, and what became of those before.
struct Crew {
    handler: Arc<Handler>,
    running: JoinSet<Fate>,
    tally: Tally,
    signals: Signals,
    output: Output,
}

impl Crew {
    /// Lets what runs come to its end, and says so to the server.
    async fn finish(
        &mut self,
        consumer: Consumer,
        ended: &Ended,
        grace: Duration,
        hurry: &watch::Sender<bool>,
    ) -> data_queue_client::Result<u64> {
        let Self { running, tally, signals, output, .. } = self;
        let impatience = async {
            if matches!(ended, Ended::Done) {
                signals.next().await;
            }
            let left = humantime::format_duration(grace);
            let line = format!("ends: commands that run may go on for {left}, or until the next signal");
            // It is no reason to wait for longer that nobody reads it.
            tokio::select! {
                _ = timeout(grace, signals.next()) => {}
                () = async { output.say(line).await; pending().await } => {}
            }
            hurry.send_replace(true);
            pending::<()>().await;
        };
        let finished = async {
            while let Some(fate) = running.join_next().await {
                // Why a command could not be run was told for the first one.
                let _ = tally.note(fate.unwrap_or(Fate::GivenBack));
            }
        };
        let closed = async { tokio::join!(consumer.close(), finished).0 };
        tokio::select! {
            closed = closed => closed,
            () = impatience => Ok(0),
        }
    }

    /// And where it goes. Nobody else writes any more.
    fn last_line(self) -> (Output, String) {
        (self.output, self.tally.line())
    }
}

/// How many tasks came to which end.
#[derive(Default)]
struct Tally {
    done: u64,
    failed: u64,
    rejected: u64,
    given_back: u64,
    lost: u64,
}

impl Tally {
    /// An error is one that the next tasks would meet too.
    fn note(&mut self, fate: Fate) -> Result<(), Stop> {
        let (count, ended) = match fate {
            Fate::Done => (&mut self.done, Ok(())),
            Fate::Failed => (&mut self.failed, Ok(())),
            Fate::Rejected => (&mut self.rejected, Ok(())),
            Fate::GivenBack => (&mut self.given_back, Ok(())),
            Fate::Lost => (&mut self.lost, Ok(())),
            Fate::NotRun(why) => (&mut self.given_back, Err(Stop(EXIT_FAILED, why))),
        };
        *count += 1;
        ended
    }

    fn line(&self) -> String {
        let Self { done, failed, rejected, given_back, lost } = self;
        format!("{done} done, {failed} failed, {rejected} rejected, {given_back} given back, {lost} lost")
    }
}

/// Waits until nothing is ready that could be delivered, and nothing is held that could come back.
async fn empty(admin: &Admin, queues: &[String]) {
    'again: loop {
        sleep(LULL).await;
        for queue in queues {
            match admin.get_queue(queue).await {
                Ok(queue) if queue.counts.leased > 0 || (queue.counts.ready > 0 && !queue.counts.paused) => {
                    continue 'again;
                }
                Err(error) if error.kind() != ErrorKind::NotFound => continue 'again,
                Ok(_) | Err(_) => {}
            }
        }
        return;
    }
}

/// It is waited for; whoever sits there should know.
async fn tell_if_away(admin: Admin, queue: String, address: String, output: Output) {
    if let Err(error) = admin.get_queue(&queue).await
        && error.kind() == ErrorKind::Unavailable
    {
        output.say(format!("waits for the server at {address}: {error}")).await;
    }
}

fn some_time(text: &str) -> Result<Duration, String> {
    match span(text)? {
        Duration::ZERO => Err("it is longer than 0s".to_owned()),
        time => Ok(time),
    }
}
