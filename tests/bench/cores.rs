//! What a second core brings: goal P10.

use crate::{
    contender::{Contender, insert_round},
    fault::Result,
    machine,
    options::Options,
    ours::{self, CALLERS, Ours, Store, Way},
    report::{Figure, Goal, Report},
};

const NAME: &str = "p10";
const SIZE: usize = 12;
const GOAL: Goal = Goal::AtLeast(1.4);

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    for (name, store) in ours::stores(report, NAME) {
        let ours = Ours { store, way: Way::Unary(CALLERS) };
        let mut found = [("one core", Vec::new()), ("all cores", Vec::new())];
        for _ in 0..options.rounds() {
            found[0].1.push(insert_round(options, &ours, CALLERS, SIZE).await?);
            if machine::free().is_err() {
                report.missing(NAME, "all cores: apt-get install util-linux".to_owned());
                return Ok(());
            }
            let round = insert_round(options, &ours, CALLERS, SIZE).await;
            machine::pin(options)?;
            found[1].1.push(round?);
        }
        let [one, all] = found.map(|(place, rounds)| Figure {
            measurement: NAME,
            what: format!("on {name}: Insert, {CALLERS} callers, {place}"),
            unit: "tasks/s",
            values: rounds.iter().map(|round| round.rate).collect(),
            latencies: rounds.iter().map(|round| round.latency).collect(),
            cpu: rounds.into_iter().map(|round| round.cpu).collect(),
            durability: ours.durability(),
            goal: None,
        });
        let goal = (store == Store::Redis).then_some(GOAL);
        report.ratio(format!("on {name}: Insert, all cores ÷ one"), &all, &one, goal);
        report.figure(one);
        report.figure(all);
    }
    report.note(format!("{NAME}: {SIZE} B; the client has one thread, the server one a core"));
    Ok(())
}
