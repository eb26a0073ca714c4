//! What a second core brings: goal P10.

use crate::{
    contender::{Contender, Round, insert_round},
    fault::Result,
    machine,
    options::Options,
    ours::{self, CALLERS, Ours, Store, Way},
    report::{Figure, Goal, Report, number},
};

const NAME: &str = "p10";
const SIZE: usize = 12;
const GOAL: Goal = Goal::AtLeast(1.4);

/// Where and how a rate is measured.
struct Leg {
    what: &'static str,
    way: Way,
    all_cores: bool,
}

/// The server serves a connection with one thread, so a connection a core is the least that can make use of them all. On one core
/// that is one connection and one thread of the client too.
const ONE: Leg = Leg { what: "one core, one connection", way: Way::Spread(CALLERS), all_cores: false };
const ALL: Leg = Leg { what: "all cores, a connection a core", way: Way::Spread(CALLERS), all_cores: true };
const ALL_BY_ONE: Leg = Leg { what: "all cores, one connection", way: Way::Unary(CALLERS), all_cores: true };

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    if machine::free().is_err() {
        report.missing(NAME, "all cores: apt-get install util-linux".to_owned());
        return Ok(());
    }
    machine::pin(options)?;
    for (name, store) in ours::stores(report, NAME) {
        let mut found = [ONE, ALL, ALL_BY_ONE].map(|leg| (leg, Vec::new()));
        for _ in 0..options.rounds() {
            for (leg, rounds) in &mut found {
                rounds.push(leg.round(options, store).await?);
            }
        }
        let [one, all, by_one] = found.map(|(leg, rounds)| figure(name, store, &leg, rounds));
        let goal = (store == Store::Redis).then_some(GOAL);
        report.ratio(format!("on {name}: Insert, all cores, a connection a core ÷ one core"), &all, &one, goal);
        report.ratio(format!("on {name}: Insert, all cores, one connection ÷ one core"), &by_one, &one, None);
        [one, all, by_one].into_iter().for_each(|figure| report.figure(figure));
    }
    report.note(format!(
        "{NAME}: {SIZE} B, {CALLERS} callers in all; the server has a thread a core, the client one a connection, and both share the \
         cores with the store"
    ));
    Ok(())
}

impl Leg {
    async fn round(&self, options: &Options, store: Store) -> Result<Round> {
        if self.all_cores {
            machine::free()?;
        }
        let round = insert_round(options, &Ours { store, way: self.way }, CALLERS, SIZE).await;
        machine::pin(options)?;
        let round = round?;
        eprintln!("{}: {} tasks/s", self.what, number(round.rate));
        Ok(round)
    }
}

fn figure(name: &str, store: Store, leg: &Leg, rounds: Vec<Round>) -> Figure {
    Figure {
        measurement: NAME,
        what: format!("on {name}: Insert, {}", leg.what),
        unit: "tasks/s",
        values: rounds.iter().map(|round| round.rate).collect(),
        latencies: rounds.iter().map(|round| round.latency).collect(),
        cpu: rounds.into_iter().map(|round| round.cpu).collect(),
        durability: Ours { store, way: leg.way }.durability(),
        goal: None,
    }
}
