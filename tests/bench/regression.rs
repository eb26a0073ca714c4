//! Whether a change made calls dearer: their time on the core beside an echo server's of the same run, beside the recorded ratios.
//!
//! `tests/bench/run regression` takes less than three minutes. When the median of a ratio is more than 25 % below the recorded one,
//! everything is measured once more, and what is below in both tries is the end with exit code 1. A ratio is the time on the core that a call costs client and echo server, divided by what it costs
//! client, server and store: on one core that is the ratio of their rates, but for what others do to the machine meanwhile, which
//! CI cannot help. What is waited for, for a disk or a timer, does not show here: p1, p5 and p9-insert show it.
//!
//! It has a build of its own, the profile bench-ci in Cargo.toml, and ratios of another build are no baseline for it.
//!
//! To record a new baseline, after a change that is meant to cost what it costs, or on a machine of another kind: on a quiet
//! machine, `tests/bench/run regression --record`, and commit `tests/bench/baseline.json` with the reason. A ratio that is not in
//! that file is shown and not judged.

use std::time::Duration;

use crate::{
    baseline::{BOUND, Baseline, Ratios, medians},
    contender::{Running, cpu_times},
    echo,
    fault::Result,
    flow::{self, Served},
    ledger::Ledger,
    options::Options,
    ours::{self, Store, Used, Way},
    report::{Figure, Goal, Report},
    scratch::Scratch,
    unary::{Leg, echo_round, our_round, times_with},
};

const NAME: &str = "regression";
const ROUNDS: u32 = 7;
const SPAN: Duration = Duration::from_millis(700);
/// Tasks of a stream a round; and before it, to warm up.
const STREAMED: u64 = 60_000;
const SIZE: usize = 12;

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let baseline = Baseline::read()?;
    let mut tries = vec![measure(options, report).await?];
    // The smoke test's build is not the one that was recorded.
    let judged = !options.smoke && !options.record;
    if judged && let Err(verdict) = baseline.judge(&[medians(&tries[0])]) {
        eprintln!("{NAME}: {verdict}");
        eprintln!("{NAME}: once more, in case somebody else used the machine");
        tries.push(measure(options, report).await?);
    }
    let found = tries.iter().map(medians).collect::<Vec<_>>();
    for (number, ratios) in tries.into_iter().enumerate() {
        for (ratio, values) in ratios {
            let goal = baseline.bound(&ratio).filter(|_| judged).map(Goal::AtLeast);
            let what = if number == 0 { ratio } else { format!("once more: {ratio}") };
            report.figure(Figure { measurement: NAME, what, unit: "×", values, goal, ..Figure::default() });
        }
    }
    report.note(format!("{NAME}: by the time on the core, of all processes together; 64 callers, {SIZE} B; goals are {BOUND} × the ratios in tests/bench/baseline.json"));
    if options.record {
        Baseline::new(found.into_iter().next().unwrap_or_default()).write()?;
    } else if judged {
        match baseline.judge(&found) {
            Ok(verdict) => report.note(format!("{NAME}: {verdict}")),
            Err(verdict) => report.fail(format!("{NAME}: {verdict}")),
        }
    }
    Ok(())
}

/// All ratios, as often as there are rounds.
async fn measure(options: &Options, report: &mut Report) -> Result<Ratios> {
    let stores = ours::stores(report, NAME);
    let served = flow::served(options, report, NAME).await?;
    let (rounds, span) = if options.smoke { (1, options.span()) } else { (ROUNDS, SPAN) };
    let mut ratios = Ratios::new();
    for round in 1..=rounds {
        let echo = echo_round(options, span).await?.cost();
        for (name, store) in &stores {
            let legs = our_round(options, *store, span).await?;
            for (call, leg) in ["Insert", "Pop and Ack", "Pop with the ack of the last"].into_iter().zip(legs) {
                ratios.entry(format!("{call}, on {name} ÷ echo")).or_default().push(echo / leg.cost());
            }
        }
        if served.produce || served.consume {
            streams(options, served, &stores, &mut ratios).await?;
        }
        eprintln!("round {round} of {rounds}");
    }
    Ok(ratios)
}

/// Produce and Consume beside an echo of Produce: a task a message, and a thousand in flight.
async fn streams(
    options: &Options,
    served: Served,
    stores: &[(&'static str, Store)],
    ratios: &mut Ratios,
) -> Result<()> {
    let tasks = options.many(STREAMED);
    let scratch = Scratch::new(options)?;
    let server = echo::start(&scratch.path().join("echo"))?;
    let client = server.client().await?;
    flow::produce(&client, 0..tasks / 4, SIZE, 1, 1_000).await?;
    let produce = flow::produce(&client, 0..tasks, SIZE, 1, 1_000);
    let echo = Leg::of(|| times_with(&server), produce, |()| tasks).await?.cost();
    for (name, store) in stores {
        let scratch = Scratch::new(options)?;
        let mut used = Used::start(*store, scratch.path()).await?;
        let mut ledger = Ledger::new(SIZE);
        let (warm, all) = (tasks / 4, tasks / 4 + tasks);
        let mut legs = Vec::new();
        for numbers in [0..warm, warm..all] {
            let count = numbers.end - numbers.start;
            legs.clear();
            used.way = if served.produce { Way::Produce } else { Way::Batch };
            legs.push(Leg::of(|| cpu_times(&used), used.fill(numbers, SIZE), |()| count).await?);
            used.way = if served.consume { Way::Consume } else { Way::Batch };
            legs.push(Leg::of(|| cpu_times(&used), used.drain(count, &mut ledger), |()| count).await?);
        }
        ledger.verify(all)?;
        used.server.is_empty_after(all).await?;
        for ((call, there), leg) in [("Produce", served.produce), ("Consume", served.consume)].into_iter().zip(legs) {
            if !there {
                continue;
            }
            ratios.entry(format!("{call}, on {name} ÷ echo of a stream")).or_default().push(echo / leg.cost());
        }
    }
    Ok(())
}
