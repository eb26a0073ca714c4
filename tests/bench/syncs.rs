//! How often the disk is synced for what is answered, counted by strace: what durability claims, and what sharing
//! saves.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    beanstalkd::SYNCED,
    contender::{Contender, Load, Running},
    dataqueue::{self, Filled},
    fault::Result,
    ledger::Ledger,
    options::Options,
    process::{self, Process, signal},
    report::{Figure, Goal, Report},
    scratch::Scratch,
};

const NAME: &str = "syncs";
const SIZE: usize = 200;
/// Tasks that are there before anything is counted.
const READY: u64 = 1_000;

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let Some(version) = process::version("strace", "-V") else {
        report.missing(NAME, "strace: apt-get install strace".to_owned());
        return Ok(());
    };
    report.version("strace", version);
    let calls = if options.smoke { 20 } else { 500 };
    let span = Duration::from_secs_f64(if options.smoke { 0.1 } else { 2.0 });
    for durability in ["full", "normal", "memory"] {
        let full = durability == "full";
        let mut filled = Filled::new(options, &["--durability", durability], READY, SIZE).await?;
        let mut ledger = Ledger::new(SIZE);
        let mut next = READY;
        let mut found = Vec::new();

        let trace = Trace::attach(filled.server.process(), filled.scratch.path())?;
        for _ in 0..calls {
            dataqueue::insert(&mut filled.client, next..next + 1, SIZE).await?;
            next += 1;
        }
        found.push(("insert, 1 caller", trace.end()?, calls, full.then_some(Goal::AtLeast(1.0))));

        let numbers = Arc::new(AtomicU64::new(next));
        let load = Load { callers: 256, size: SIZE, span, numbers: Arc::clone(&numbers) };
        let trace = Trace::attach(filled.server.process(), filled.scratch.path())?;
        let answered = dataqueue::produce(&filled.server, 1, &load).await?.len() as u64;
        next = numbers.load(Ordering::Relaxed);
        found.push(("insert, 256 callers", trace.end()?, answered, full.then_some(Goal::AtMost(0.2))));

        let trace = Trace::attach(filled.server.process(), filled.scratch.path())?;
        let mut tokens = Vec::new();
        for _ in 0..calls {
            let task = dataqueue::pop(&mut filled.client).await?;
            ledger.deliver(dataqueue::data(&task))?;
            tokens.push(task.lease_token);
        }
        found.push(("pop alone, 1 caller", trace.end()?, calls, None));

        let trace = Trace::attach(filled.server.process(), filled.scratch.path())?;
        for token in tokens {
            ledger.acked(dataqueue::ack(&mut filled.client, vec![token]).await?);
        }
        found.push(("ack, 1 caller", trace.end()?, calls, full.then_some(Goal::AtLeast(1.0))));

        filled.server.drain(None, &mut ledger).await?;
        ledger.verify(next)?;
        filled.server.is_empty_after(next).await?;
        for (call, syncs, calls, goal) in found {
            report.figure(figure(format!("DataQueue {durability}, {call}"), syncs, calls, goal));
        }
    }
    match SYNCED.version() {
        Ok((name, version)) => {
            report.version(name, version);
            let scratch = Scratch::new(options)?;
            let running = SYNCED.start(scratch.path()).await?;
            let load = Load { callers: 256, size: SIZE, span, numbers: Arc::default() };
            let (syncs, calls) = traced(&*running, &load, scratch.path()).await?;
            report.figure(figure(format!("{}, put, 256 callers", SYNCED.name()), syncs, calls, None));
        }
        Err(missing) => report.missing(NAME, format!("{}: {}", SYNCED.name(), missing.install)),
    }
    report.note(format!(
        "{NAME}: one task a call; strace -f -c -e trace=fsync,fdatasync on the server, checkpoints \
         of the file included; strace slows each call \
         down, so with 256 callers more of them share a sync than without it"
    ));
    Ok(())
}

async fn traced(running: &dyn Running, load: &Load, directory: &Path) -> Result<(u64, u64)> {
    let processes = running.processes();
    let trace = Trace::attach(processes.first().ok_or("nothing to trace")?, directory)?;
    let answered = running.produce(load).await?.len() as u64;
    Ok((trace.end()?, answered))
}

fn figure(what: String, syncs: u64, calls: u64, goal: Option<Goal>) -> Figure {
    let values = vec![syncs as f64 / calls as f64];
    Figure { measurement: NAME, what, unit: "syncs a call", values, goal, ..Figure::default() }
}

/// strace on a running process.
struct Trace {
    strace: Child,
    summary: PathBuf,
}

impl Trace {
    /// Counts from now on.
    fn attach(process: &Process, directory: &Path) -> Result<Self> {
        let summary = directory.join("strace");
        let mut strace = Command::new("strace")
            .args(["-f", "-c", "-e", "trace=fsync,fdatasync", "-p", &process.pid().to_string(), "-o"])
            .arg(&summary)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        let mut stderr = BufReader::new(strace.stderr.take().ok_or("strace has no standard error")?);
        while !said.contains(" attached") {
            if stderr.read_line(&mut said)? == 0 {
                return Err(format!("strace did not attach: {said}").into());
            }
        }
        Ok(Self { strace, summary })
    }

    /// How many syncs there were.
    fn end(mut self) -> Result<u64> {
        signal("INT", self.strace.id())?;
        self.strace.wait()?;
        let summary = fs::read_to_string(&self.summary)?;
        let counted = |name: &str| {
            let line = summary.lines().find(|line| line.split_whitespace().last() == Some(name))?;
            line.split_whitespace().nth(3)?.parse::<u64>().ok()
        };
        Ok(["fsync", "fdatasync"].into_iter().filter_map(counted).sum())
    }
}
