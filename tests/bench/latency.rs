//! How long calls take, beside what the transport and Redis take alone: goal P5.

use std::{path::Path, time::Instant};

use crate::{
    contender::insert_round,
    dataqueue::{self, Client},
    echo,
    fault::Result,
    ledger::Ledger,
    machine::micros,
    options::Options,
    ours::{self, Ours, Store, Used, Way},
    redis::{self, Redis},
    report::{Figure, Goal, Report, quantile},
    scratch::Scratch,
};

const NAME: &str = "p5";
const SIZE: usize = 12;
const CALLS: u64 = 5_000;
const CALLERS: usize = 256;
/// A script that does nothing: the round trip and the start of a script.
const SCRIPT: &str = "return ARGV[1]";

/// What is timed, in this order.
const LEGS: [&str; 6] = ["echo", "EVALSHA", "PING", "Insert", "Pop", "Ack"];

/// p50 and p99 of each, in microseconds.
type Times = [[f64; 2]; 6];

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    match redis::version() {
        Ok((name, version)) => report.version(name, version),
        Err(missing) => {
            report.missing(NAME, format!("DataQueue on Redis: {}", missing.install));
            return Ok(());
        }
    }
    let (mut rounds, mut crowds) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds() {
        let scratch = Scratch::new(options)?;
        let times = one_caller(scratch.path(), options.many(CALLS)).await?;
        let [medians, late] = [0, 1].map(|index| times.map(|times| times[index].round()));
        eprintln!("round {round}: {LEGS:?}: p50 {medians:?} µs, p99 {late:?} µs");
        rounds.push(times);
        let ours = Ours { store: Store::Redis, way: Way::Unary(ours::CALLERS) };
        crowds.push(insert_round(options, &ours, CALLERS, SIZE).await?.latency);
    }
    let mut ratio = |what: &str, of: fn(&Times) -> f64, goal| {
        let values = rounds.iter().map(of).collect();
        report.figure(figure(what.to_owned(), "×", values, Some(Goal::AtMost(goal))));
    };
    ratio("p50 of Insert ÷ (echo + EVALSHA)", |[echo, script, _, insert, ..]| insert[0] / (echo[0] + script[0]), 1.2);
    ratio("p50 of Ack ÷ (echo + EVALSHA)", |[echo, script, _, _, _, ack]| ack[0] / (echo[0] + script[0]), 1.2);
    ratio("p50 of Pop ÷ (echo + EVALSHA)", |[echo, script, _, _, pop, _]| pop[0] / (echo[0] + script[0]), 1.35);
    ratio("p99 of Pop ÷ p99 of PING", |[_, _, ping, _, pop, _]| pop[1] / ping[1], 6.0);
    let values = crowds.iter().map(|[p50, p99]| p99 / p50).collect();
    let what = format!("Insert, {CALLERS} callers: p99 ÷ p50");
    report.figure(Figure { latencies: crowds, ..figure(what, "×", values, Some(Goal::AtMost(2.5))) });
    for (index, leg) in LEGS.iter().enumerate() {
        let times = rounds.iter().map(|times| times[index]).collect::<Vec<_>>();
        let values = times.iter().map(|[p50, _]| *p50).collect();
        report.figure(Figure { latencies: times, ..figure(format!("one caller: {leg}, p50"), "µs", values, None) });
    }
    report.note(format!("{NAME}: {SIZE} B, DataQueue on Redis; EVALSHA is of a script that does nothing"));
    Ok(())
}

fn figure(what: String, unit: &'static str, values: Vec<f64>, goal: Option<Goal>) -> Figure {
    Figure { measurement: NAME, what, unit, values, goal, ..Figure::default() }
}

async fn one_caller(directory: &Path, calls: u64) -> Result<Times> {
    let server = echo::start(&directory.join("echo"))?;
    let mut echo = server.client().await?;
    let used = Used::start(Store::Redis, directory).await?;
    let redis = used.redis.as_ref().ok_or("there is no Redis")?;
    let warm = calls / 10;
    inserts(&mut echo, 0, warm).await?;
    let echo = inserts(&mut echo, 0, calls).await?;
    let [script, ping] = commands(redis, calls).await?;

    let mut client = used.client.clone();
    let mut ledger = Ledger::new(SIZE);
    inserts(&mut client, 0, warm).await?;
    pops(&mut client, warm, &mut ledger).await?;
    let insert = inserts(&mut client, warm, calls).await?;
    let [pop, ack] = pops(&mut client, calls, &mut ledger).await?;
    ledger.verify(warm + calls)?;
    used.server.is_empty_after(warm + calls).await?;
    Ok([echo, script, ping, insert, pop, ack].map(|times| [0.5, 0.99].map(|share| quantile(&times, share))))
}

async fn inserts(client: &mut Client, first: u64, count: u64) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for number in first..first + count {
        let start = Instant::now();
        dataqueue::insert(client, number..number + 1, SIZE).await?;
        times.push(micros(start.elapsed()));
    }
    Ok(times)
}

async fn pops(client: &mut Client, count: u64, ledger: &mut Ledger) -> Result<[Vec<f64>; 2]> {
    let (mut pops, mut acks) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let start = Instant::now();
        let task = dataqueue::pop(client).await?;
        pops.push(micros(start.elapsed()));
        ledger.deliver(dataqueue::data(&task))?;
        let start = Instant::now();
        ledger.acked(dataqueue::ack(client, vec![task.lease_token]).await?);
        acks.push(micros(start.elapsed()));
    }
    Ok([pops, acks])
}

/// Round trips of Redis alone: an EVALSHA, and a PING.
async fn commands(redis: &Redis, calls: u64) -> Result<[Vec<f64>; 2]> {
    let mut connection = redis.connection().await?;
    let script = redis::ask::<String>(&mut connection, &["SCRIPT", "LOAD", SCRIPT]).await?;
    let commands: [&[&str]; 2] = [&["EVALSHA", &script, "0", "012345678901"], &["PING"]];
    let mut found = [Vec::new(), Vec::new()];
    for (words, times) in commands.into_iter().zip(&mut found) {
        for _ in 0..calls {
            let start = Instant::now();
            redis::ask::<String>(&mut connection, words).await?;
            times.push(micros(start.elapsed()));
        }
    }
    Ok(found)
}
