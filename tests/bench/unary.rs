//! Unary calls beside those of a bare echo server, which is all that the transport allows: goals P1 and P2.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    contender::{Load, Running, Times, cpu_between, cpu_times},
    dataqueue::{self, Server},
    echo,
    fault::Result,
    ledger::Ledger,
    options::Options,
    ours::{self, CALLERS, Store, Used, pop_all},
    process::own_cpu,
    report::{Figure, Goal, Report, number},
    scratch::Scratch,
};

const NAME: &str = "p1";
const COST: &str = "p2";
const SIZE: usize = 12;

/// A rate, and what it cost.
pub(crate) struct Leg {
    pub(crate) rate: f64,
    /// Microseconds on the core that a task cost, by process.
    pub(crate) cpu: Vec<(&'static str, f64)>,
}

impl Leg {
    /// Times work on so many tasks.
    pub(crate) async fn of<T>(
        times: impl Fn() -> Result<Times>,
        work: impl Future<Output = Result<T>>,
        tasks: impl FnOnce(&T) -> u64,
    ) -> Result<Self> {
        let (before, start) = (times()?, Instant::now());
        let done = work.await?;
        let (took, after) = (start.elapsed(), times()?);
        let tasks = tasks(&done) as f64;
        Ok(Self { rate: tasks / took.as_secs_f64(), cpu: cpu_between(&before, &after, tasks) })
    }

    /// Microseconds on the core that a task cost all processes together.
    pub(crate) fn cost(&self) -> f64 {
        self.cpu.iter().map(|(_, micros)| micros).sum()
    }
}

/// The time on the core so far, of this process and a server.
pub(crate) fn times_with(server: &Server) -> Result<Times> {
    Ok(vec![("client", own_cpu()?), ("server", server.process().cpu()?)])
}

/// Inserts that an echo server answers.
pub(crate) async fn echo_round(options: &Options, span: Duration) -> Result<Leg> {
    let scratch = Scratch::new(options)?;
    let server = echo::start(&scratch.path().join("echo"))?;
    let load = Load { callers: CALLERS, size: SIZE, span, numbers: Arc::default() };
    dataqueue::produce(&server, 1, &Load { span: span / 4, ..load.clone() }).await?;
    Leg::of(|| times_with(&server), dataqueue::produce(&server, 1, &load), |calls| calls.len() as u64).await
}

/// Inserts, then pops and acks of half of the tasks, then pops of the others that carry the acks.
pub(crate) async fn our_round(options: &Options, store: Store, span: Duration) -> Result<[Leg; 3]> {
    let scratch = Scratch::new(options)?;
    let used = Used::start(store, scratch.path()).await?;
    let load = Load { callers: CALLERS, size: SIZE, span, numbers: Arc::default() };
    let mut ledger = Ledger::new(SIZE);
    used.produce(&Load { span: span / 4, ..load.clone() }).await?;
    let warm = load.numbers.load(Ordering::Relaxed);
    pop_all(&used.client, CALLERS, warm, false, &mut ledger).await?;

    let insert = Leg::of(|| cpu_times(&used), used.produce(&load), |calls| calls.len() as u64).await?;
    let tasks = load.numbers.load(Ordering::Relaxed) - warm;
    let half = tasks / 2;
    let two_calls =
        Leg::of(|| cpu_times(&used), pop_all(&used.client, CALLERS, half, false, &mut ledger), |()| half).await?;
    let fused = Leg::of(
        || cpu_times(&used),
        pop_all(&used.client, CALLERS, tasks - half, true, &mut ledger),
        |()| tasks - half,
    )
    .await?;
    ledger.verify(warm + tasks)?;
    used.server.is_empty_after(warm + tasks).await?;
    Ok([insert, two_calls, fused])
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let stores = ours::stores(report, NAME);
    let mut echoes = Vec::new();
    let mut found = stores.iter().map(|_| [const { Vec::new() }; 3]).collect::<Vec<_>>();
    for round in 1..=options.rounds() {
        let echo = echo_round(options, options.span()).await?;
        eprintln!("round {round}: echo: {} calls/s", number(echo.rate));
        echoes.push(echo);
        for ((name, store), legs) in stores.iter().zip(&mut found) {
            let round_of = our_round(options, *store, options.span()).await?;
            let rates = round_of.each_ref().map(|leg| number(leg.rate));
            eprintln!("round {round}: {name}: Insert, Pop and Ack, fused: {rates:?} tasks/s");
            legs.iter_mut().zip(round_of).for_each(|(legs, leg)| legs.push(leg));
        }
    }
    let echo = figure("echo: Insert, 64 callers".to_owned(), &echoes);
    for ((name, store), legs) in stores.iter().zip(&found) {
        let goal = |goal| (*store == Store::Redis).then_some(goal);
        let [insert, two, fused] = [("Insert", 0), ("Pop and Ack", 1), ("Pop with the ack of the last", 2)]
            .map(|(call, leg)| figure(format!("on {name}: {call}, {CALLERS} callers"), &legs[leg]));
        report.ratio(format!("on {name}: Insert ÷ echo"), &insert, &echo, goal(Goal::AtLeast(0.85)));
        report.ratio(format!("on {name}: Pop and Ack ÷ echo"), &two, &echo, goal(Goal::AtLeast(0.4)));
        report.ratio(format!("on {name}: fused ÷ Pop and Ack"), &fused, &two, goal(Goal::AtLeast(1.6)));
        let server = |legs: &[Leg]| cost(legs, "server");
        let what = |call: &str| format!("on {name}: the server's time of {call} ÷ the echo server's");
        let own = server(&echoes);
        ratio(report, what("an Insert"), &server(&legs[0]), &own, 1.0, Some(Goal::AtMost(1.2)));
        ratio(report, what("a Pop or an Ack"), &server(&legs[1]), &own, 2.0, Some(Goal::AtMost(1.2)));
        if *store == Store::Redis {
            for (what, legs, goal) in [("an insert", &legs[0], 0.8), ("a pop and its ack", &legs[1], 3.5)] {
                let (what, values) = (format!("Redis' time of {what}"), cost(legs, "store"));
                report.figure(Figure {
                    measurement: COST,
                    what,
                    unit: "µs",
                    values,
                    goal: Some(Goal::AtMost(goal)),
                    ..Figure::default()
                });
            }
        }
        [insert, two, fused].into_iter().for_each(|figure| report.figure(figure));
    }
    report.figure(echo);
    report.note(format!(
        "{NAME}, {COST}: {SIZE} B, {CALLERS} callers on one connection; the echo server answers an Insert as DataQueue does, and keeps \
         nothing; the goals are for the store in Redis, of Pop and Ack as two calls"
    ));
    Ok(())
}

fn figure(what: String, legs: &[Leg]) -> Figure {
    Figure {
        measurement: NAME,
        what,
        unit: "tasks/s",
        values: legs.iter().map(|leg| leg.rate).collect(),
        cpu: legs.iter().map(|leg| leg.cpu.clone()).collect(),
        ..Figure::default()
    }
}

/// Microseconds of this process in each round.
fn cost(legs: &[Leg], process: &str) -> Vec<f64> {
    let of = |leg: &Leg| leg.cpu.iter().find(|(name, _)| *name == process).map_or(f64::NAN, |(_, micros)| *micros);
    legs.iter().map(of).collect()
}

fn ratio(report: &mut Report, what: String, above: &[f64], below: &[f64], calls: f64, goal: Option<Goal>) {
    let values = above.iter().zip(below).map(|(above, below)| above / below / calls).collect();
    report.figure(Figure { measurement: COST, what, unit: "×", values, goal, ..Figure::default() });
}
