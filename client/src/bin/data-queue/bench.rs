//! `data-queue bench`: loads a server, checks that it did what it should, and tells how fast it was.
//!
//! `load` makes the calls, `stream` those over streams, `pace` says when they start, `measure` how long they took,
//! `ledger` whether each task came and was acked, and `report` what to say of it.

mod ledger;
mod load;
mod measure;
mod pace;
mod report;
mod stream;

use std::{future::Future, io::IsTerminal, process::ExitCode, sync::Arc, time::Duration};

use data_queue_proto::v1;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{sync::watch, time::timeout};
use tonic::Code;

use crate::{
    Stop,
    args::{Bench, Common, Extent, Mode, What},
    server::{Admin, Server, explain, queues, timed},
    signals::Signals,
};
use load::{Load, Part};
use measure::{Meters, Phase};
use pace::Pace;
use report::{Report, Verdict};

/// The bytes of values that a call of the unmeasured parts carries at the most: 2 MiB, half of what a server takes.
const PLAIN_BYTES: u32 = 2 << 20;
const PLAIN_CALLERS: u32 = 4;
/// How long a consumer's pop waits for a producer, before it asks again.
const WAIT: Duration = Duration::from_secs(1);
/// A task that was on its way to a stream when that was broken off is back after 2 s.
const STREAM_WAIT: Duration = Duration::from_secs(4);
/// How long a run that failed may still take what it put in.
const TIDY: Duration = Duration::from_secs(5);

/// Runs it to its end.
pub(crate) async fn run(common: &Common, options: &Bench) -> Result<ExitCode, Stop> {
    let server = Server::new(&common.addr)?;
    let queue = options.queue()?;
    let mut connections = Vec::new();
    for _ in 0..options.connections {
        connections.push(queues(server.connect().await?));
    }
    let mut admin = Admin::new(server.connect().await?);
    let before = counts(&mut admin, &queue).await?;
    if before.ready + before.leased + before.dead > 0 {
        return Err(Stop::failed(format!(
            "the queue {queue} is not empty: take another one, or none for a fresh name"
        )));
    }
    let info = admin.get_server_info(timed(v1::GetServerInfoRequest {})).await.ok().map(tonic::Response::into_inner);

    let load = Load::new(connections, queue, options.size as usize, options.lease, bar());
    let run = Run { options, load: Arc::new(load), interrupted: interrupted()? };
    let phases = run.phases().await;
    // After a run that failed as far as it goes: the queue is not left to others.
    let swept = timeout(if phases.is_ok() { Duration::MAX } else { TIDY }, run.sweep()).await;
    run.load.bar.finish_and_clear();
    let phases = phases?;
    swept.unwrap_or(Ok(()))?;
    let after = counts(&mut admin, &run.load.queue).await?;
    let verdict = Verdict::new(run.load.allotted(), run.load.counts(), &before, after);
    let report = Report {
        options,
        address: server.address(),
        queue: &run.load.queue,
        info,
        interrupted: *run.interrupted.borrow(),
        overloaded: run.load.overloaded(),
        phases,
        verdict,
    };
    Ok(report.write(common.output))
}

struct Run<'a> {
    options: &'a Bench,
    load: Arc<Load>,
    interrupted: watch::Receiver<bool>,
}

impl Run<'_> {
    async fn phases(&self) -> Result<Vec<Phase>, Stop> {
        match self.options.what {
            What::Each => {
                let inserts = self.insert().await?;
                if *self.interrupted.borrow() { Ok(vec![inserts]) } else { Ok(vec![inserts, self.drain().await?]) }
            }
            What::Insert => Ok(vec![self.insert().await?]),
            What::Drain => {
                self.fill().await?;
                if *self.interrupted.borrow() { Ok(Vec::new()) } else { Ok(vec![self.drain().await?]) }
            }
            What::Both => Ok(vec![self.both().await?]),
        }
    }

    async fn insert(&self) -> Result<Phase, Stop> {
        let part = Arc::new(self.part(self.inserts()?, Pace::free()?)?);
        self.until_interrupted(&part.inserts, part.insert()).await?;
        Ok(self.phase("insert", &part, &part.inserts, self.load.allotted()))
    }

    async fn drain(&self) -> Result<Phase, Stop> {
        let rate = self.calls_per_second().filter(|_| self.options.mode != Mode::Stream);
        let part = Arc::new(self.part(Pace::free()?, Pace::start(rate, None)?)?);
        self.until_interrupted(&part.takes, part.take()).await?;
        Ok(self.phase("drain", &part, &part.takes, self.load.counts().acked))
    }

    async fn both(&self) -> Result<Phase, Stop> {
        let part = self.part(self.inserts()?, Pace::free()?)?;
        let part = Arc::new(Part { flow: true, wait: WAIT, ..part });
        let both = async { tokio::try_join!(part.insert(), part.take()).map(|_| ()) };
        self.until_interrupted(&part.inserts, both).await?;
        Ok(self.phase("both", &part, &part.inserts, self.load.counts().acked))
    }

    /// Puts the tasks of a drain in, fast.
    async fn fill(&self) -> Result<(), Stop> {
        let part = Arc::new(self.plain()?);
        self.until_interrupted(&part.inserts, part.insert()).await
    }

    /// Takes what is left, unmeasured.
    async fn sweep(&self) -> Result<(), Stop> {
        // After a run that broke off, not every insert was answered, and none will be any more.
        self.load.inserted();
        // What was on its way to a stream comes back only after a while.
        let waits = [Some(Duration::ZERO), (self.options.mode == Mode::Stream).then_some(STREAM_WAIT)];
        for wait in waits.into_iter().flatten() {
            if !self.load.is_settled() {
                Arc::new(Part { wait, ..self.plain()? }).take().await?;
            }
        }
        Ok(())
    }

    /// A part that is not measured: in batches, as fast as it goes.
    fn plain(&self) -> Result<Part, Stop> {
        let part = self.part(Pace::free()?, Pace::free()?)?;
        let batch = (PLAIN_BYTES / self.options.size).clamp(1, 1000);
        Ok(Part { mode: Mode::Batch, callers: PLAIN_CALLERS, batch, ..part })
    }

    fn part(&self, inserts: Pace, takes: Pace) -> Result<Part, Stop> {
        Ok(Part {
            load: Arc::clone(&self.load),
            mode: self.options.mode,
            callers: self.options.callers,
            batch: self.options.batch(),
            window: self.options.window(),
            flow: false,
            wait: Duration::ZERO,
            limit: self.options.count.unwrap_or(u64::MAX),
            inserts,
            takes,
            meters: Meters::new()?,
        })
    }

    /// The pace of the inserts that are measured.
    fn inserts(&self) -> Result<Pace, Stop> {
        let length = match self.options.extent() {
            Extent::Count(_) => None,
            Extent::Duration(length) => Some(length),
        };
        Pace::start(self.calls_per_second(), length)
    }

    fn calls_per_second(&self) -> Option<f64> {
        self.options.rate.map(|rate| rate / f64::from(self.options.batch()))
    }

    /// Ctrl-C ends the pace; what is under way is finished.
    async fn until_interrupted(&self, pace: &Pace, work: impl Future<Output = Result<(), Stop>>) -> Result<(), Stop> {
        let mut interrupted = self.interrupted.clone();
        tokio::pin!(work);
        tokio::select! {
            ended = &mut work => return ended,
            // An error: nobody listens for it any more.
            Ok(_) = interrupted.wait_for(|interrupted| *interrupted) => pace.stop(),
        }
        work.await
    }

    fn phase(&self, name: &'static str, part: &Part, pace: &Pace, tasks: u64) -> Phase {
        let planned = self.options.count.map(|count| count.div_ceil(u64::from(part.batch)));
        let mut kept = pace.kept(planned);
        // What was not begun then is nobody's fault.
        if let Some(kept) = kept.as_mut().filter(|_| *self.interrupted.borrow()) {
            kept.not_begun = 0;
        }
        let schedule = self.options.rate.zip(kept);
        Phase { name, length: part.meters.length(pace.started()), tasks, schedule, times: part.meters.times() }
    }
}

/// Turns true at the first Ctrl-C. The second one ends the program.
fn interrupted() -> Result<watch::Receiver<bool>, Stop> {
    const EXIT_INTERRUPTED: i32 = 130;
    let (mut signals, (send, receive)) = (Signals::listen()?, watch::channel(false));
    tokio::spawn(async move {
        signals.next().await;
        send.send_replace(true);
        signals.next().await;
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(receive)
}

/// What the queue has; nothing if nobody ever inserted into it.
async fn counts(admin: &mut Admin, queue: &str) -> Result<v1::QueueCounts, Stop> {
    match admin.get_queue(timed(v1::GetQueueRequest { queue: queue.to_owned() })).await {
        Ok(answer) => Ok(answer.into_inner().queue.and_then(|queue| queue.counts).unwrap_or_default()),
        Err(status) if status.code() == Code::NotFound => Ok(v1::QueueCounts::default()),
        Err(status) if status.code() == Code::InvalidArgument => Err(Stop::usage(explain(status))),
        Err(status) => Err(Stop::failed(format!("cannot tell what is in the queue: {}", explain(status)))),
    }
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template("{spinner} {pos} tasks inserted or acked, {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
