//! What more callers bring, one task a call: DataQueue beside those of its peers that have such calls. A picture comes of it.

use crate::{
    beanstalkd,
    compare::{Pass, compare_round},
    contender::Contender,
    fault::Result,
    nats,
    options::Options,
    ours::{Ours, Store, Way},
    picture::{Axis, Line, Panel, Picture},
    report::{Figure, Report, number},
    streams,
};

const NAME: &str = "callers";
const SIZE: usize = 12;
const CALLERS: [usize; 5] = [1, 4, 16, 64, 256];
const ROUNDS: u32 = 3;
const LEGS: [&str; 2] = ["Insert", "Pop and Ack"];

/// A contender with so many callers.
type With = fn(usize) -> Box<dyn Contender>;

const CONTENDERS: [With; 5] = [
    |callers| Box::new(Ours { store: Store::Redis, way: Way::Unary(callers) }),
    |callers| Box::new(Ours { store: Store::File("normal"), way: Way::Unary(callers) }),
    |callers| Box::new(streams::one_by_one(callers)),
    |callers| Box::new(nats::one_by_one(callers)),
    |callers| Box::new(beanstalkd::one_by_one(callers)),
];

/// What was found of one, with each number of callers.
struct Found {
    with: With,
    passes: Vec<(usize, Vec<Pass>)>,
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let callers = if options.smoke { &CALLERS[..2] } else { &CALLERS[..] };
    let mut found = Vec::new();
    let mut versions = Vec::new();
    for with in CONTENDERS {
        let contender = with(1);
        match contender.version() {
            Ok((name, version)) => {
                report.version(name, version);
                versions.push(name);
                found.push(Found { with, passes: callers.iter().map(|callers| (*callers, Vec::new())).collect() });
            }
            Err(missing) => report.missing(NAME, format!("{}: {}", contender.name(), missing.install)),
        }
    }
    for round in 1..=rounds(options) {
        for Found { with, passes } in &mut found {
            for (callers, passes) in passes {
                let contender = with(*callers);
                let what = format!("{}, callers: {callers}", contender.name());
                match compare_round(options, &*contender, SIZE, options.span()).await {
                    Ok(pass) => {
                        let [insert, take] = pass.rates().map(number);
                        eprintln!("round {round}: {what}: {insert} in, {take} out a second");
                        passes.push(pass);
                    }
                    // The other figures are good none the less.
                    Err(fault) => report.void(NAME, format!("{what}: {fault}")),
                }
            }
        }
    }
    let figures = found.iter().map(figures).collect::<Vec<_>>();
    let path =
        draw(options, report, &versions, &figures).write(&options.pictures(), "throughput-against-callers.svg")?;
    figures.into_iter().flat_map(|(_, figures)| figures).for_each(|(_, _, figure)| report.figure(figure));
    report.note(format!(
        "{NAME}: {SIZE} B, one task a call, each caller with one call at a time; DataQueue, Redis Streams and JetStream on one \
         connection, beanstalkd on one a caller; JetStream's callers are publishes not confirmed yet, and fetches of one under \
         way; drawn in {}",
        path.display()
    ));
    Ok(())
}

fn rounds(options: &Options) -> u32 {
    options.rounds().min(ROUNDS)
}

/// Which leg, with how many callers, and what was found.
type Points = Vec<(usize, usize, Figure)>;

fn figures(found: &Found) -> (String, Points) {
    let mut points = Points::new();
    let name = (found.with)(1).name();
    for (leg, call) in LEGS.into_iter().enumerate() {
        for (callers, passes) in found.passes.iter().filter(|(_, passes)| !passes.is_empty()) {
            let figure = Figure {
                measurement: NAME,
                what: format!("{name}: {call}, callers: {callers}"),
                unit: "tasks/s",
                values: passes.iter().map(|pass| pass.rates()[leg]).collect(),
                cpu: passes.iter().map(|pass| pass.cpu(leg)).collect(),
                durability: (found.with)(*callers).durability(),
                ..Figure::default()
            };
            points.push((leg, *callers, figure));
        }
    }
    (name, points)
}

fn draw(options: &Options, report: &Report, versions: &[&str], figures: &[(String, Points)]) -> Picture {
    let all = figures.iter().flat_map(|(_, points)| points).map(|(_, _, figure)| figure.median());
    let all = all.collect::<Vec<_>>();
    let panel = |(leg, call): (usize, &str)| Panel {
        title: call.to_owned(),
        x: Axis { label: "callers".to_owned(), ticks: CALLERS.map(|callers| callers as f64).to_vec(), unit: "" },
        y: Axis::around("tasks a second, logarithmic".to_owned(), all.iter().copied()),
        lines: figures
            .iter()
            .map(|(name, points)| {
                let points = points.iter().filter(|(of, ..)| *of == leg);
                let points = points.map(|(_, callers, figure)| [*callers as f64, figure.median()]);
                Line { name: name.clone(), points: points.collect() }
            })
            .collect(),
    };
    let mut foot = report.foot(versions);
    let durability = |(name, points): &(String, Points)| {
        points.first().map(|(_, _, figure)| format!("{name}: {}", figure.durability))
    };
    let durabilities = figures.iter().filter_map(durability).collect::<Vec<_>>();
    foot.push(format!(
        "Payload of {SIZE} B, one task a call; the median of {} rounds. {}.",
        rounds(options),
        durabilities.join("; ")
    ));
    Picture {
        title: "Throughput against callers".to_owned(),
        panels: LEGS.into_iter().enumerate().map(panel).collect(),
        foot,
    }
}
