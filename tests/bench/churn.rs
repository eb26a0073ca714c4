//! Whether the file grows with the tasks that pass through it, or only with those that are in it.

use std::time::Instant;

use crate::{
    dataqueue::{BATCH, Filled, insert, take},
    fault::Result,
    ledger::Ledger,
    options::Options,
    report::{Figure, Goal, Report, number},
    scratch::size_of,
};

const NAME: &str = "churn";
const SIZE: usize = 200;
/// Tasks that are ready all the time.
const DEPTH: u64 = 1_000;
/// After so many the size is taken that the others are compared with.
const FIRST: u64 = 100_000;
const GOAL: Goal = Goal::AtMost(3.0);
/// How often the size is taken after that.
const MARKS: u64 = 20;

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let settings: [(&str, &[&str]); 2] =
        [("default settings", &[]), ("--memory-entries 50000", &["--memory-entries", "50000"])];
    for (what, flags) in settings {
        churn(options, report, what, flags).await?;
    }
    report.note(format!(
        "{NAME}: {} tasks of {SIZE} B through a queue {DEPTH} deep, Insert, PopBatch and Ack of {BATCH} at a time, \
         durability \
         full; the size is of the database and its log, as they are while the server works. By default a queue \
         remembers up \
         to 1,000,000 acked tokens, which are in the file",
        number(options.tasks() as f64)
    ));
    Ok(())
}

async fn churn(options: &Options, report: &mut Report, settings: &str, flags: &[&str]) -> Result<()> {
    let tasks = options.tasks();
    let first = FIRST.min(tasks / 4);
    let step = ((tasks - first) / MARKS).max(BATCH);
    let Filled { server, mut client, scratch } = Filled::new(options, flags, DEPTH, SIZE).await?;
    let directory = scratch.path().join("data");
    let mut ledger = Ledger::new(SIZE);
    let mut next = DEPTH;
    // Tasks that were through, the size then, and the rate since the mark before.
    let mut marks: Vec<(u64, f64, f64)> = Vec::new();
    let (mut mark, mut since, mut before) = (first, Instant::now(), 0);
    let cpu = server.process().cpu()?;
    while next < tasks {
        insert(&mut client, next..next + BATCH, SIZE).await?;
        next += BATCH;
        take(&mut client, u32::try_from(BATCH)?, &mut ledger).await?;
        let done = ledger.delivered();
        if done >= mark || next >= tasks {
            let size = size_of(&directory)? as f64 / f64::from(1 << 20);
            let rate = (done - before) as f64 / since.elapsed().as_secs_f64();
            eprintln!("{settings}: {} tasks, {size:.1} MiB, {} tasks/s", number(done as f64), number(rate));
            marks.push((done, size, rate));
            (mark, since, before) = (done + step, Instant::now(), done);
        }
    }
    let cpu = (server.process().cpu()? - cpu).as_secs_f64() * 1e6 / ledger.delivered() as f64;
    server.drain(None, &mut ledger).await?;
    ledger.verify(next)?;
    server.is_empty_after(next).await?;

    let sizes = marks.iter().map(|(_, size, _)| *size).collect::<Vec<_>>();
    let rates = marks.iter().map(|(_, _, rate)| *rate).collect::<Vec<_>>();
    let (Some(small), Some(last)) = (sizes.first(), sizes.last()) else { return Err("no size was taken".into()) };
    let largest = sizes.iter().copied().fold(0.0, f64::max);
    let figure = |what: String, unit, values, goal| Figure {
        measurement: NAME,
        what: format!("{what}, {settings}"),
        unit,
        values,
        goal,
        ..Figure::default()
    };
    report.figure(figure("largest size ÷ first".to_owned(), "×", vec![largest / small], Some(GOAL)));
    report.figure(figure("last size ÷ first".to_owned(), "×", vec![last / small], None));
    report.figure(figure(format!("after {} tasks", number(marks[0].0 as f64)), "MiB", vec![*small], None));
    report.figure(figure(format!("largest of {} marks", marks.len()), "MiB", vec![largest], None));
    report.figure(figure(format!("after {} tasks", number(before as f64)), "MiB", vec![*last], None));
    let cpu = vec![vec![("server", cpu)]];
    report.figure(Figure { cpu, ..figure("through, each mark".to_owned(), "tasks/s", rates, None) });
    let list = marks.iter().map(|(done, size, _)| format!("{} {size:.0}", number(*done as f64))).collect::<Vec<_>>();
    report.note(format!("{NAME}, {settings}: tasks and MiB at each mark: {}", list.join("; ")));
    Ok(())
}
