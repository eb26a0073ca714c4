//! What a sync of the disk before each answer costs, with many callers to share it: goal P9.

use std::collections::BTreeMap;

use crate::{
    beanstalkd::SYNCED,
    contender::{Contender, Round, insert_round},
    dataqueue::DataQueue,
    fault::Result,
    machine,
    options::Options,
    report::{Figure, Goal, Report, number},
};

const NAME: &str = "p9-insert";
const CALLERS: usize = 256;
/// The payloads, in bytes.
const SIZES: [usize; 2] = [12, 200];
/// Of an insert with an fsync, beside one without.
const OF_NO_SYNC: Goal = Goal::AtLeast(0.8);
/// Of an insert with an fsync, beside beanstalkd's.
const OF_BEANSTALKD: Goal = Goal::AtLeast(5.0);

/// DataQueue's durabilities, and the same server with a connection a caller.
const FULL: DataQueue = DataQueue { name: "full", durability: "full", connections: 1 };
const NORMAL: DataQueue = DataQueue { name: "normal", durability: "normal", connections: 1 };
const MEMORY: DataQueue = DataQueue { name: "memory", durability: "memory", connections: 1 };
const APART: DataQueue = DataQueue { name: "full, a connection a caller", connections: 0, ..FULL };

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    for size in SIZES {
        compare(options, report, &[&FULL, &NORMAL, &MEMORY, &APART, &SYNCED], size, "").await?;
    }
    report.note(format!(
        "{NAME}: one task an insert, {CALLERS} callers with one call at a time each, for {:.1} s after a warm-up; \
         DataQueue's on one connection unless said, beanstalkd's on one each. full, normal and memory are \
         --durability; \
         memory is SQLite with synchronous=OFF. Each round ends with every task delivered once and acked, and an empty \
         store; only the inserts are timed. Ratios are taken round by round",
        options.span().as_secs_f64()
    ));
    // What somebody sees who does not pin anything; it wanders.
    if machine::free().is_err() {
        report.missing(NAME, "all cores: apt-get install util-linux".to_owned());
        return Ok(());
    }
    let compared = compare(options, report, &[&FULL, &MEMORY, &SYNCED], SIZES[0], ", all cores").await;
    machine::pin(options)?;
    compared?;
    Ok(())
}

/// Measures these in turn, and compares those of them that goals are about.
async fn compare(
    options: &Options,
    report: &mut Report,
    contenders: &[&dyn Contender],
    size: usize,
    place: &str,
) -> Result<()> {
    let mut found = Vec::new();
    for contender in contenders {
        match contender.version() {
            Ok((name, version)) => {
                report.version(name, version);
                found.push((*contender, Vec::new()));
            }
            Err(missing) => report.missing(NAME, format!("{}: {}", contender.name(), missing.install)),
        }
    }
    for round in 1..=options.rounds() {
        for (contender, rounds) in &mut found {
            let one = insert_round(options, *contender, CALLERS, size).await?;
            eprintln!("round {round}: {size} B{place}, {}: {} tasks/s", contender.name(), number(one.rate));
            rounds.push(one);
        }
    }
    let figures =
        found.into_iter().map(|(contender, rounds)| (contender.name(), figure(contender, size, place, rounds)));
    let figures: BTreeMap<String, Figure> = figures.collect();
    let mut ratio = |what: &str, above: &dyn Contender, below: &dyn Contender, goal| {
        if let (Some(above), Some(below)) = (figures.get(&above.name()), figures.get(&below.name())) {
            report.ratio(format!("{what}, {size} B{place}"), above, below, goal);
        }
    };
    // The goals are for one core.
    let goal = |goal| place.is_empty().then_some(goal);
    ratio("full ÷ memory", &FULL, &MEMORY, goal(OF_NO_SYNC));
    ratio("normal ÷ memory", &NORMAL, &MEMORY, None);
    ratio("full ÷ beanstalkd", &FULL, &SYNCED, goal(OF_BEANSTALKD));
    ratio("full, a connection a caller ÷ beanstalkd", &APART, &SYNCED, goal(OF_BEANSTALKD));
    if let (Some(full), Some(memory)) = (figures.get(&FULL.name()), figures.get(&MEMORY.name())) {
        report.ratio_of_cpu(format!("full ÷ memory by time on the core alone, {size} B{place}"), full, memory);
    }
    figures.into_values().for_each(|figure| report.figure(figure));
    Ok(())
}

fn figure(contender: &dyn Contender, size: usize, place: &str, rounds: Vec<Round>) -> Figure {
    Figure {
        measurement: NAME,
        what: format!("{}, {size} B{place}", contender.name()),
        unit: "tasks/s",
        values: rounds.iter().map(|round| round.rate).collect(),
        latencies: rounds.iter().map(|round| round.latency).collect(),
        cpu: rounds.into_iter().map(|round| round.cpu).collect(),
        durability: contender.durability(),
        goal: None,
    }
}
