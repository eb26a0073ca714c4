//! What is asked of a queue that is measured beside others.
//!
//! Each brings a client of its own, as strong as its protocol allows: the load is stated, how it is sent is not.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;

use crate::{
    fault::Result,
    ledger::Ledger,
    machine::micros,
    options::Options,
    process::{Process, own_cpu},
    report::quantile,
    scratch::Scratch,
};

/// A queue, with the settings that it is measured with.
#[async_trait(?Send)]
pub(crate) trait Contender {
    /// Its name in the table, with what tells it from the others.
    fn name(&self) -> String;

    /// Its version; if it is not on this machine, how it gets there.
    fn version(&self) -> std::result::Result<(&'static str, String), Missing>;

    /// What an answer of it survives, as it is set up here: in the table beside its figures.
    fn durability(&self) -> &'static str;

    /// How it inserts, and how it takes and acks, in the table of those that are compared; nothing if another contender
    /// shows the same.
    fn ways(&self) -> Ways {
        Ways::default()
    }

    /// Starts it on this empty directory.
    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>>;
}

/// What a contender's client does.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ways {
    pub(crate) insert: &'static str,
    pub(crate) take: &'static str,
}

impl Ways {
    /// What tells it from others of its name.
    pub(crate) fn name(&self) -> &'static str {
        if self.take.is_empty() { self.insert } else { self.take }
    }
}

/// A queue that is not on this machine.
pub(crate) struct Missing {
    /// The command that installs it.
    pub(crate) install: &'static str,
}

/// A queue that runs.
#[async_trait(?Send)]
pub(crate) trait Running {
    /// Its processes, by which its time on the core is told from the client's; a client of its own is called so.
    fn processes(&self) -> Vec<&Process>;

    /// Inserts until the time is over, one task a call; an insert counts once it is answered.
    async fn produce(&self, _load: &Load) -> Result<Vec<Call>> {
        Err("there is no client for many callers".into())
    }

    /// Inserts these, in its strongest way; all are confirmed when it returns.
    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()>;

    /// Takes and acks so many, which are there, and counts only acks that were confirmed.
    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()>;

    /// How many tasks are left, held ones included.
    async fn left(&self) -> Result<u64>;

    /// What it has in memory, in bytes. Of a server on Redis: what Redis says that it uses.
    async fn memory(&self) -> Result<f64> {
        let servers = self.processes().into_iter().filter(|process| process.name() != "client");
        servers.map(Process::resident).sum()
    }
}

/// What producers do.
#[derive(Clone)]
pub(crate) struct Load {
    /// How many of them, each with one insert at a time.
    pub(crate) callers: usize,
    /// Of a payload, in bytes.
    pub(crate) size: usize,
    pub(crate) span: Duration,
    /// The next task's number.
    pub(crate) numbers: Arc<AtomicU64>,
}

impl Load {
    /// One of the producers, from now on.
    pub(crate) fn caller(&self) -> Caller {
        let now = Instant::now();
        Caller { numbers: Arc::clone(&self.numbers), end: now + self.span, since: now, calls: Vec::new() }
    }
}

/// A producer: one insert after the other, each timed.
pub(crate) struct Caller {
    numbers: Arc<AtomicU64>,
    end: Instant,
    since: Instant,
    calls: Vec<Call>,
}

impl Caller {
    /// The task to insert now; nothing once the time is over.
    pub(crate) fn next(&mut self) -> Option<u64> {
        self.since = Instant::now();
        (self.since < self.end).then(|| self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// Notes that it was answered.
    pub(crate) fn answered(&mut self) {
        self.calls.push(Call { took: self.since.elapsed() });
    }

    pub(crate) fn into_calls(self) -> Vec<Call> {
        self.calls
    }
}

/// A call that was answered.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    took: Duration,
}

/// What a round found.
pub(crate) struct Round {
    /// Tasks a second.
    pub(crate) rate: f64,
    /// Microseconds of a call, p50 and p99.
    pub(crate) latency: [f64; 2],
    /// Microseconds on the core that a task cost, by process.
    pub(crate) cpu: Vec<(&'static str, f64)>,
}

/// A fresh start, a warm-up, the load, and the proof that nothing was lost.
pub(crate) async fn insert_round(
    options: &Options,
    contender: &dyn Contender,
    callers: usize,
    size: usize,
) -> Result<Round> {
    let scratch = Scratch::new(options)?;
    let running = contender.start(scratch.path()).await?;
    let numbers = Arc::new(AtomicU64::new(0));
    let load = Load { callers, size, span: options.span(), numbers: Arc::clone(&numbers) };
    running.produce(&Load { span: options.warm_up(), ..load.clone() }).await?;

    let before = cpu_times(&*running)?;
    let start = Instant::now();
    let calls = running.produce(&load).await?;
    let took = start.elapsed();
    let after = cpu_times(&*running)?;

    let mut ledger = Ledger::new(size);
    let inserted = numbers.load(Ordering::Relaxed);
    running.drain(inserted, &mut ledger).await?;
    verify_empty(contender, &*running, &ledger, inserted).await?;
    let tasks = calls.len() as f64;
    let times = calls.iter().map(|call| micros(call.took)).collect::<Vec<_>>();
    Ok(Round {
        rate: tasks / took.as_secs_f64(),
        latency: [quantile(&times, 0.5), quantile(&times, 0.99)],
        cpu: cpu_between(&before, &after, tasks),
    })
}

/// Each task was delivered and acked once, and nothing is left.
pub(crate) async fn verify_empty(
    contender: &dyn Contender,
    running: &dyn Running,
    ledger: &Ledger,
    inserted: u64,
) -> Result<()> {
    ledger.verify(inserted)?;
    match running.left().await? {
        0 => Ok(()),
        left => Err(format!("{}: {left} tasks are left", contender.name()).into()),
    }
}

/// The time on the core so far, by process.
pub(crate) type Times = Vec<(&'static str, Duration)>;

pub(crate) fn cpu_times(running: &dyn Running) -> Result<Times> {
    let mut times = vec![("client", own_cpu()?)];
    for process in running.processes() {
        let cpu = process.cpu()?;
        match times.iter_mut().find(|(name, _)| *name == process.name()) {
            Some((_, time)) => *time += cpu,
            None => times.push((process.name(), cpu)),
        }
    }
    Ok(times)
}

/// Microseconds on the core that a task cost between these two, by process.
pub(crate) fn cpu_between(before: &Times, after: &Times, tasks: f64) -> Vec<(&'static str, f64)> {
    let spent = before.iter().zip(after).map(|((name, before), (_, after))| (*name, after.saturating_sub(*before)));
    spent.map(|(name, time)| (name, micros(time) / tasks)).collect()
}
