//! What a sync of the disk before each answer costs, with many callers to share it: goal P9.

use crate::{
    beanstalkd::Beanstalkd,
    contender::{Contender, Round, insert_round},
    dataqueue::DataQueue,
    fault::Result,
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

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let full = DataQueue { name: "full", flags: &["--durability", "full"], connections: 1 };
    let normal = DataQueue { name: "normal", flags: &["--durability", "normal"], connections: 1 };
    let memory = DataQueue { name: "memory", flags: &["--durability", "memory"], connections: 1 };
    let apart = DataQueue { name: "full, a connection a caller", connections: 0, ..full };
    let all: [&dyn Contender; 5] = [&full, &normal, &memory, &apart, &Beanstalkd];
    let mut contenders = Vec::new();
    for contender in all {
        match contender.version() {
            Ok((name, version)) => {
                report.version(name, version);
                contenders.push(contender);
            }
            Err(missing) => {
                report.missing(NAME, format!("{}: {}", contender.name(), missing.install));
            }
        }
    }
    for size in SIZES {
        let mut rounds: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
        for round in 0..options.rounds() {
            for (contender, rounds) in contenders.iter().zip(&mut rounds) {
                let found = insert_round(options, *contender, CALLERS, size).await?;
                let (name, rate) = (contender.name(), number(found.rate));
                options.progress(format_args!("round {}: {size} B, {name}: {rate} tasks/s", round + 1));
                rounds.push(found);
            }
        }
        let figures = contenders
            .iter()
            .zip(rounds)
            .map(|(contender, rounds)| (contender.name(), figure(*contender, size, rounds)));
        let figures = figures.collect::<Vec<_>>();
        let of = |contender: &dyn Contender| {
            figures.iter().find(|(name, _)| *name == contender.name()).map(|(_, figure)| figure)
        };
        let mut compare = |what: &str, above: &dyn Contender, below: &dyn Contender, goal| {
            if let (Some(above), Some(below)) = (of(above), of(below)) {
                report.ratio(format!("{what}, {size} B"), above, below, goal);
            }
        };
        compare("full ÷ memory", &full, &memory, Some(OF_NO_SYNC));
        compare("normal ÷ memory", &normal, &memory, None);
        compare("full ÷ beanstalkd", &full, &Beanstalkd, Some(OF_BEANSTALKD));
        compare("full, a connection a caller ÷ beanstalkd", &apart, &Beanstalkd, Some(OF_BEANSTALKD));
        for (_, figure) in figures {
            report.figure(figure);
        }
    }
    report.note(format!(
        "{NAME}: one task an insert, {CALLERS} callers with one call at a time each, for {:.1} s after a warm-up; DataQueue's on \
         one connection unless said, beanstalkd's on one each. memory is SQLite with synchronous=OFF. Each round ends with every \
         task delivered once and acked, and an empty store",
        options.span().as_secs_f64()
    ));
    Ok(())
}

fn figure(contender: &dyn Contender, size: usize, rounds: Vec<Round>) -> Figure {
    Figure {
        measurement: NAME,
        what: format!("{}, {size} B", contender.name()),
        unit: "tasks/s",
        values: rounds.iter().map(|round| round.rate).collect(),
        latencies: rounds.iter().map(|round| round.latency).collect(),
        cpu: rounds.into_iter().map(|round| round.cpu).collect(),
        goal: None,
    }
}
