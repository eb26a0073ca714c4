//! Whether a pop at the head costs the same whatever lies behind it, and whatever lay before it: goal P9.

use std::time::Instant;

use crate::{
    dataqueue::{self, Filled},
    fault::Result,
    ledger::Ledger,
    machine::micros,
    options::Options,
    report::{Figure, Goal, Report, number, quantile},
};

const NAME: &str = "p9-head";
const SIZE: usize = 200;
/// The depth that the others are compared with.
const SHALLOW: u64 = 1_000;
const FLAT: Goal = Goal::AtMost(1.5);

/// A queue in one of the states, and what was found of it.
struct State {
    what: String,
    filled: Filled,
    ledger: Ledger,
    /// The next task's number.
    next: u64,
    /// Microseconds of pops and of acks, p50 and p99 for each round.
    pops: Vec<[f64; 2]>,
    acks: Vec<[f64; 2]>,
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let many = options.ready();
    let pops = if options.smoke { 50 } else { 5_000 };
    let mut states = Vec::new();
    for (what, inserted, acked) in [
        (format!("{} ready", number(SHALLOW as f64)), SHALLOW, 0),
        (format!("{} ready", number(many as f64)), many, 0),
        (format!("{} ready after {} acked", number(SHALLOW as f64), number(many as f64)), many + SHALLOW, many),
    ] {
        let filled = Filled::new(options, &[], inserted, SIZE).await?;
        let mut ledger = Ledger::new(SIZE);
        filled.server.drain(Some(acked), &mut ledger).await?;
        states.push(State { what, filled, ledger, next: inserted, pops: Vec::new(), acks: Vec::new() });
    }
    for state in &mut states {
        state.work(pops / 10).await?;
    }
    for round in 0..options.rounds() {
        for state in &mut states {
            let (pop, ack) = state.work(pops).await?;
            eprintln!(
                "round {}: {}: pop {:.0} and {:.0} µs, ack {:.0} and {:.0} µs",
                round + 1,
                state.what,
                pop[0],
                pop[1],
                ack[0],
                ack[1]
            );
            state.pops.push(pop);
            state.acks.push(ack);
        }
    }
    let mut found = Vec::new();
    for mut state in states {
        state.filled.server.drain(None, &mut state.ledger).await?;
        state.ledger.verify(state.next)?;
        state.filled.server.is_empty_after(state.next).await?;
        for (call, index, times) in
            [("pop p50", 0, &state.pops), ("pop p99", 1, &state.pops), ("ack p50", 0, &state.acks)]
        {
            found.push(Figure {
                measurement: NAME,
                what: format!("{call}, {}", state.what),
                unit: "µs",
                values: times.iter().map(|times| times[index]).collect(),
                ..Figure::default()
            });
        }
    }
    for (state, name) in [(1, "many ready"), (2, "many acked")] {
        report.ratio(format!("pop p50, {name} ÷ {} ready", number(SHALLOW as f64)), &found[state * 3], &found[0], None);
        let what = format!("pop p99, {name} ÷ {} ready", number(SHALLOW as f64));
        report.ratio(what, &found[state * 3 + 1], &found[1], Some(FLAT));
    }
    for figure in found {
        report.figure(figure);
    }
    report.note(format!(
        "{NAME}: one caller, {SIZE} B, {pops} times a round: Pop, Ack, and an Insert that keeps the depth; the three \
         queues \
         are on servers of their own, asked in turn, durability full"
    ));
    Ok(())
}

impl State {
    /// Pops and acks so often, and keeps the depth. Microseconds of the pops and of the acks, p50 and p99.
    async fn work(&mut self, times: usize) -> Result<([f64; 2], [f64; 2])> {
        let (mut pops, mut acks) = (Vec::new(), Vec::new());
        let client = &mut self.filled.client;
        for _ in 0..times {
            let start = Instant::now();
            let task = dataqueue::pop(client).await?;
            pops.push(micros(start.elapsed()));
            self.ledger.deliver(dataqueue::data(&task))?;
            let start = Instant::now();
            let acked = dataqueue::ack(client, vec![task.lease_token]).await?;
            acks.push(micros(start.elapsed()));
            self.ledger.acked(acked);
            dataqueue::insert(client, self.next..self.next + 1, SIZE).await?;
            self.next += 1;
        }
        let both = |times: &[f64]| [quantile(times, 0.5), quantile(times, 0.99)];
        Ok((both(&pops), both(&acks)))
    }
}
