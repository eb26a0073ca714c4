//! The calls of a run: one producer and many workers, who report what they see to the record. Workers of other programs report
//! by lines.
//!
//! A call that fails on its way is tried again, so that a run goes on over restarts of the server and its store.

use std::{
    fs::File,
    io::{BufWriter, Write},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_client::{Backoff, Client, Error, ErrorKind, NewTask, Outcome, Pop, PopBatch, Task};
use futures_util::future::try_join_all;
use indicatif::ProgressBar;
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};

use crate::{
    Stop,
    args::{Args, Mode, Program, random_hex},
    program::{self, Line},
    record::{Delivery, Known, Record, Share, Value, Verdict},
    source::{Batch, Source},
};

/// How long a call may take, its client's repeats included.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// How long an idle pop waits, unless half a lease is shorter.
const WAIT: Duration = Duration::from_secs(1);
/// The longest wait of a single pop at the end; the server takes up to 60 s.
const LAST_WAIT: Duration = Duration::from_secs(30);
/// How much longer than a lease the queue must stay empty at the end.
const QUIET: Duration = Duration::from_secs(1);
/// How long one insert is tried again: less than the 5 minutes for which the server remembers its request id.
const INSERT_PATIENCE: Duration = Duration::from_secs(240);
/// Inserts pause while the values that are not acked have so many bytes: 256 MiB.
const MAX_OPEN_BYTES: u64 = 256 << 20;

/// What the workers of the run itself are called beside programs.
const OWN: &str = "(its own)";

/// How a run ended.
pub(crate) enum Ending {
    /// All was acked, and the queue stayed empty.
    Quiet,
    /// All was acked, and then something was still delivered.
    NotQuiet,
    /// It could not go on.
    Stopped(String),
}

/// One run.
pub(crate) struct Run {
    client: Client,
    queue: String,
    /// Starts the request ids of the inserts.
    name: String,
    mode: Mode,
    batch: u32,
    workers: u32,
    programs: Vec<Program>,
    address: String,
    lease: Duration,
    wait: Duration,
    deliveries: AtomicU64,
    journal: Mutex<Journal>,
    acked: Notify,
    settled: watch::Sender<bool>,
    bar: ProgressBar,
}

/// What was seen, and the values as they were acked.
struct Journal {
    record: Record,
    log: Option<BufWriter<File>>,
    /// What the last call that failed said.
    last_failure: Option<String>,
}

impl Run {
    pub(crate) fn new(
        client: Client,
        queue: String,
        args: &Args,
        log: Option<BufWriter<File>>,
        bar: ProgressBar,
    ) -> Result<Self, Stop> {
        Ok(Self {
            client,
            queue,
            name: random_hex()?,
            mode: args.mode,
            batch: args.batch,
            workers: args.workers(),
            programs: args.programs.clone(),
            address: args.addr.clone(),
            lease: args.lease,
            wait: WAIT.min(args.lease / 2),
            deliveries: AtomicU64::new(0),
            journal: Mutex::new(Journal { record: Record::default(), log, last_failure: None }),
            acked: Notify::new(),
            settled: watch::Sender::new(false),
            bar,
        })
    }

    /// Inserts, pops and acks everything, then looks whether the queue stays empty.
    pub(crate) async fn all(&self, source: Source) -> Ending {
        let workers = try_join_all((0..self.workers).map(|_| self.work()));
        let programs = try_join_all(self.programs.iter().map(|program| self.run_program(program)));
        let done = tokio::try_join!(self.insert_all(source), workers, programs);
        let quiet = match done {
            Ok(_) => self.is_quiet().await,
            Err(stop) => Err(stop),
        };
        match quiet {
            Ok(true) => Ending::Quiet,
            Ok(false) => Ending::NotQuiet,
            Err(Stop(_, why)) => Ending::Stopped(why),
        }
    }

    /// Closes the log and judges.
    pub(crate) fn finish(self) -> Result<Verdict, Stop> {
        self.bar.finish_and_clear();
        let Journal { record, log, .. } = self.journal.into_inner().unwrap_or_else(PoisonError::into_inner);
        match log.map_or(Ok(()), |mut log| log.flush()) {
            Ok(()) => Ok(record.verdict()),
            Err(error) => Err(log_failed(&error)),
        }
    }

    async fn insert_all(&self, mut source: Source) -> Result<(), Stop> {
        let mut number = 0;
        while let Some(batch) = source.batch()? {
            while self.journal().record.open_bytes() > MAX_OPEN_BYTES {
                self.acked.notified().await;
            }
            number += 1;
            self.insert(&source, batch, format!("{}-{number}", self.name)).await?;
        }
        self.journal().record.complete();
        self.look();
        Ok(())
    }

    /// Inserts until the server says that it did, always under the same request id.
    async fn insert(&self, source: &Source, batch: Batch, request_id: String) -> Result<(), Stop> {
        let start = Instant::now();
        let mut backoff = Backoff::new();
        let inserted = loop {
            let tasks = batch.values.iter().map(NewTask::json_text);
            match self.client.insert_as(&self.queue, tasks, &request_id).await {
                Ok(inserted) => break inserted.tasks,
                Err(error) if start.elapsed() > INSERT_PATIENCE => {
                    let patience = humantime::format_duration(INSERT_PATIENCE);
                    return Err(Stop::failed(format!("an insert did not get through for {patience}: {error}")));
                }
                Err(error) => self.pause(&error, &mut backoff).await.map_err(|_| refused(source, &batch, &error))?,
            }
        };
        let mut journal = self.journal();
        for (task, value) in inserted.iter().zip(batch.values) {
            journal.record.inserted(&task.id, value);
        }
        drop(journal);
        self.look();
        Ok(())
    }

    /// Pops and handles until everything is acked.
    async fn work(&self) -> Result<(), Stop> {
        let mut backoff = Backoff::new();
        while !self.journal().record.is_settled() {
            let start = Instant::now();
            let got = match self.mode {
                Mode::Single => self.pop_one().await?,
                Mode::Batch => self.pop_many().await?,
            };
            match got {
                // A server that answers before the wait is over, as one does that stops, is not asked again at once.
                Ok(0) if start.elapsed() < self.wait / 2 => sleep(backoff.pause()).await,
                Ok(_) => backoff.reset(),
                Err(error) => self.bear(&error, &mut backoff).await?,
            }
        }
        Ok(())
    }

    async fn pop_one(&self) -> Result<Result<u64, Error>, Stop> {
        let asked = Instant::now();
        let pop = Pop::new().lease(self.lease).wait(self.wait);
        let task = match self.client.pop(&self.queue, pop).await {
            Ok(popped) => popped.task,
            Err(error) => return Ok(Err(error)),
        };
        match task {
            Some(task) => self.handle(&task, asked).await.map(|()| Ok(1)),
            None => Ok(Ok(0)),
        }
    }

    async fn pop_many(&self) -> Result<Result<u64, Error>, Stop> {
        let asked = Instant::now();
        let pop = PopBatch::new(self.batch).lease(self.lease).wait(self.wait);
        let mut tasks = match self.client.pop_batch(&self.queue, pop).await {
            Ok(tasks) => tasks,
            Err(error) => return Ok(Err(error)),
        };
        let mut got = 0;
        while let Some(task) = tasks.next().await {
            match task {
                Ok(task) => self.handle(&task, asked).await?,
                Err(error) if error.kind() == ErrorKind::Corrupt => self.damaged(&error),
                Err(error) => return Ok(Err(error)),
            }
            got += 1;
        }
        Ok(Ok(got))
    }

    /// Every second delivery fails: it is left to its lease. The others are acked, if a heartbeat says that they are held.
    async fn handle(&self, task: &Task, asked: Instant) -> Result<(), Stop> {
        match self.delivered(task, asked) {
            // Another's task is not acked. One of ours, which came before its insert was answered, comes again.
            Known::No => return Ok(()),
            Known::Inserted if self.deliveries.fetch_add(1, Ordering::Relaxed) % 2 == 1 => return Ok(()),
            Known::Inserted => {
                if self.heartbeat(task).await? {
                    self.ack(task).await?;
                }
            }
            // Held or not: the record learns it from the heartbeat, and it is not acked again.
            Known::Acked => drop(self.heartbeat(task).await?),
        }
        Ok(())
    }

    /// Whether the task is still held.
    async fn heartbeat(&self, task: &Task) -> Result<bool, Stop> {
        let asked = Instant::now();
        match self.client.heartbeat(task, self.lease).await {
            Ok(_) => {
                self.journal().record.extended(task.id(), task.lease_token(), asked, self.lease);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::AlreadyAcked) => {
                self.journal().record.lease_lost();
                Ok(false)
            }
            // Unknown: then it is not acked, and comes back.
            Err(error) => self.pause(&error, &mut Backoff::new()).await.map(|()| false),
        }
    }

    /// Acks until the server says what became of it: only then is it known whether the task may come again.
    async fn ack(&self, task: &Task) -> Result<(), Stop> {
        let asked = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            match self.client.ack_tokens(&self.queue, [task.lease_token()]).await {
                Ok(outcomes) => return self.acked(task, asked, &outcomes),
                Err(error) => self.pause(&error, &mut backoff).await?,
            }
        }
    }

    fn acked(&self, task: &Task, asked: Instant, outcomes: &[Outcome]) -> Result<(), Stop> {
        let mut journal = self.journal();
        let before = match outcomes {
            [Outcome::Applied] => false,
            [Outcome::AlreadyAcked] => true,
            _ => {
                journal.record.lease_lost();
                return Ok(());
            }
        };
        let is_first = journal.record.acked(task.id(), task.lease_token(), asked, Instant::now(), before);
        self.note(&mut journal, |share| share.acked += u64::from(is_first));
        if let Some(log) = &mut journal.log {
            let written = log.write_all(task.bytes()).and_then(|()| log.write_all(b"\n"));
            written.map_err(|error| log_failed(&error))?;
        }
        drop(journal);
        self.bar.inc(1);
        self.look();
        Ok(())
    }

    /// Has a program work until all is acked, and takes down what it tells.
    async fn run_program(&self, program: &Program) -> Result<(), Stop> {
        let started = Instant::now();
        let said = |line: Line<'_>| self.told(&program.name, line, started);
        program::run(program, &self.address, &self.queue, self.settled.subscribe(), said).await
    }

    /// A line of a program came in. When what it tells of happened is not known: at any time since the program was started.
    fn told(&self, name: &str, line: Line<'_>, started: Instant) {
        let mut journal = self.journal();
        let record = &mut journal.record;
        let (asked, answered) = (started, Instant::now());
        match line {
            Line::Delivered { id, lease_token, md5 } => {
                // It may have failed the task since.
                let (value, lease) = (Value::Md5(md5), Duration::ZERO);
                record.delivered(&Delivery { id, lease_token, value, asked, answered, lease });
                record.share(name).deliveries += 1;
            }
            Line::Acked { id, lease_token } => {
                let is_first = record.acked(id, lease_token, asked, answered, true);
                record.share(name).acked += u64::from(is_first);
                self.bar.inc(u64::from(is_first));
            }
            Line::Lost => record.lease_lost(),
        }
        drop(journal);
        self.look();
    }

    /// Tells whoever waits that something was acked, and that everything is.
    fn look(&self) {
        self.acked.notify_one();
        let is_settled = self.journal().record.is_settled();
        self.settled.send_if_modified(|settled| std::mem::replace(settled, is_settled) != is_settled);
    }

    fn delivered(&self, task: &Task, asked: Instant) -> Known {
        let mut journal = self.journal();
        self.note(&mut journal, |share| share.deliveries += 1);
        journal.record.delivered(&Delivery {
            id: task.id(),
            lease_token: task.lease_token(),
            value: task.text().map_or(Value::Other, Value::Json),
            asked,
            answered: Instant::now(),
            lease: self.lease,
        })
    }

    /// Beside other programs the run's own workers have a part too.
    fn note(&self, journal: &mut Journal, change: impl FnOnce(&mut Share)) {
        if !self.programs.is_empty() {
            change(journal.record.share(OWN));
        }
    }

    fn damaged(&self, error: &Error) {
        self.journal().record.damaged(error.task_id().unwrap_or_default());
        self.look();
    }

    /// Whether nothing is delivered for longer than a lease.
    async fn is_quiet(&self) -> Result<bool, Stop> {
        let mut backoff = Backoff::new();
        let mut quiet_until = Instant::now() + self.lease + QUIET;
        while let Some(left) = quiet_until.checked_duration_since(Instant::now()) {
            let asked = Instant::now();
            let pop = Pop::new().lease(self.lease).wait(left.min(LAST_WAIT));
            match self.client.pop(&self.queue, pop).await.map(|popped| popped.task) {
                Ok(Some(task)) => {
                    self.delivered(&task, asked);
                    return Ok(false);
                }
                Ok(None) if asked.elapsed() < left.min(LAST_WAIT) / 2 => sleep(backoff.pause()).await,
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    self.damaged(&error);
                    return Ok(false);
                }
                Err(error) => {
                    self.pause(&error, &mut backoff).await?;
                    quiet_until = Instant::now() + self.lease + QUIET;
                }
            }
        }
        Ok(true)
    }

    /// Takes an error of a pop as it is: a damaged task for the record, a failure to wait out, or the end.
    async fn bear(&self, error: &Error, backoff: &mut Backoff) -> Result<(), Stop> {
        if error.kind() == ErrorKind::Corrupt {
            self.damaged(error);
            return Ok(());
        }
        self.pause(error, backoff).await
    }

    /// Says where an unfinished run stands.
    pub(crate) fn standing(&self) -> String {
        let last = match &self.journal().last_failure {
            Some(failure) => format!("; the last call that failed: {failure}"),
            None => String::new(),
        };
        format!("what is missing was not done by then, and is in the queue {}{last}", self.queue)
    }

    /// Waits if the call may go through later, else says why it does not.
    async fn pause(&self, error: &Error, backoff: &mut Backoff) -> Result<(), Stop> {
        let passing = matches!(
            error.kind(),
            ErrorKind::Unavailable
                | ErrorKind::DeadlineExceeded
                | ErrorKind::Overloaded
                | ErrorKind::StoreFull
                | ErrorKind::QueueFull
        );
        if !passing && !error.is_retriable() {
            return Err(Stop::failed(error.to_string()));
        }
        self.journal().last_failure = Some(error.to_string());
        sleep(error.retry_after().unwrap_or_default() + backoff.pause()).await;
        Ok(())
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names the value that was refused, if the server named its field.
fn refused(source: &Source, batch: &Batch, error: &Error) -> Stop {
    let index = error.field().and_then(|field| field.strip_prefix("tasks[")?.split_once(']')?.0.parse::<u64>().ok());
    let what = match index {
        Some(index) => source.name(batch.first + index),
        None => format!("the insert from {} on", source.name(batch.first)),
    };
    Stop::failed(format!("{what} was refused: {error}"))
}

fn log_failed(error: &std::io::Error) -> Stop {
    Stop::failed(format!("cannot write the log: {error}"))
}
