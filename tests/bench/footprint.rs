//! What a task takes in Redis: goal P7.

use crate::{
    compare::waiting_task,
    contender::{Contender, Running},
    dataqueue,
    fault::Result,
    ledger::Ledger,
    options::Options,
    ours::{Shared, Store, Used, pop_batch},
    program::BULLMQ,
    redis::{self, Redis},
    report::{Figure, Goal, Report, count},
    scratch::Scratch,
};

const NAME: &str = "p7";
const SIZE: usize = 200;
const TASKS: u64 = 100_000;
/// Before anything is measured: what a queue needs once, it has after these.
const FIRST: u64 = 1_000;
const BATCH: u64 = 1_000;

/// With a value of 200 B.
const WAITING: Goal = Goal::AtMost(370.0);
const LEASED: Goal = Goal::AtMost(620.0);
const ACKED: Goal = Goal::AtMost(90.0);
const OF_BULLMQ: Goal = Goal::AtMost(0.45);

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    if let Err(missing) = redis::version() {
        report.missing(NAME, format!("DataQueue on Redis: {}", missing.install));
        return Ok(());
    }
    let bullmq = match BULLMQ.version() {
        Ok((name, version)) => {
            report.version(name, version);
            true
        }
        Err(missing) => {
            report.missing(NAME, format!("{}: {}", BULLMQ.name(), missing.install));
            false
        }
    };
    let tasks = options.many(TASKS);
    let (mut found, mut others) = ([const { Vec::new() }; 3], Vec::new());
    for _ in 0..options.rounds().min(3) {
        found.iter_mut().zip(stages(options, tasks).await?).for_each(|(values, value)| values.push(value));
        if bullmq {
            others.push(waiting_task(options, &BULLMQ, tasks).await?);
        }
    }
    let figure = |what: &str, values, goal| Figure {
        measurement: NAME,
        what: format!("{what}, of {}", count(tasks)),
        unit: "B",
        values,
        goal,
        ..Figure::default()
    };
    let [waiting, leased, acked] = found;
    let waiting = figure("a waiting task", waiting, Some(WAITING));
    if bullmq {
        let other = figure("a waiting task of BullMQ's", others, None);
        report.ratio("a waiting task ÷ BullMQ's".to_owned(), &waiting, &other, Some(OF_BULLMQ));
        report.figure(other);
    }
    report.figure(waiting);
    report.figure(figure("a leased task", leased, Some(LEASED)));
    report.figure(figure("an ack that is remembered", acked, Some(ACKED)));
    report.note(format!("{NAME}: used_memory of Redis, {SIZE} B with id, MD5 and times, inserted by hundreds"));
    Ok(())
}

/// Bytes of a task that waits, is leased, was acked.
async fn stages(options: &Options, tasks: u64) -> Result<[f64; 3]> {
    let scratch = Scratch::new(options)?;
    let used = Used::start(Store::Redis, scratch.path()).await?;
    let redis = used.redis.as_ref().ok_or("there is no Redis")?;
    let mut ledger = Ledger::new(SIZE);
    let first = options.many(FIRST);
    used.fill(0..first, SIZE).await?;
    used.drain(first, &mut ledger).await?;
    let before = redis.used().await?;
    let grown = async |redis: &Redis| Result::Ok((redis.used().await? - before) / tasks as f64);
    used.fill(first..first + tasks, SIZE).await?;
    let waiting = grown(redis).await?;

    let shared = Shared::new(&mut ledger);
    let mut client = used.client.clone();
    let mut held = Vec::new();
    for start in (0..tasks).step_by(BATCH as usize) {
        held.push(pop_batch(&mut client, BATCH.min(tasks - start), &shared).await?);
    }
    let leased = grown(redis).await?;
    for tokens in held {
        shared.acked(dataqueue::ack(&mut client, tokens).await?)?;
    }
    let acked = grown(redis).await?;
    shared.give_back(&mut ledger)?;
    ledger.verify(first + tasks)?;
    used.server.is_empty_after(first + tasks).await?;
    Ok([waiting, leased, acked])
}
