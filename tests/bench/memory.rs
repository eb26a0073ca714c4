//! How much memory the server takes with many tasks ready.

use crate::{
    dataqueue::{Filled, Server},
    fault::Result,
    ledger::Ledger,
    options::Options,
    process::Memory,
    report::{Figure, Goal, Report, number},
};

const NAME: &str = "memory";
const SIZE: usize = 200;
const GOAL: Goal = Goal::AtMost(300.0);

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let tasks = options.ready();
    let mut found: [Vec<Memory>; 4] = Default::default();
    for _ in 0..options.rounds().min(3) {
        let empty = Filled::new(options, &[], 0, SIZE).await?;
        found[0].push(empty.server.process().memory()?);
        drop(empty);
        let Filled { server, client, scratch } = Filled::new(options, &[], tasks, SIZE).await?;
        drop(client);
        found[1].push(server.process().memory()?);
        server.stop().await?;
        let server = Server::start(&scratch.path().join("data"), &[])?;
        server.counts().await?;
        found[2].push(server.process().memory()?);
        let mut ledger = Ledger::new(SIZE);
        server.drain(None, &mut ledger).await?;
        ledger.verify(tasks)?;
        server.is_empty_after(tasks).await?;
        found[3].push(server.process().memory()?);
    }
    let ready = number(tasks as f64);
    for (memory, what, goal) in [
        (&found[0], "empty".to_owned(), None),
        (&found[1], format!("{ready} ready, just inserted"), Some(GOAL)),
        (&found[2], format!("{ready} ready, after a restart"), Some(GOAL)),
        (&found[3], "all of them popped and acked".to_owned(), None),
    ] {
        let mut figure = |field, values, goal| {
            let what = format!("{what}, {field}");
            report.figure(Figure { measurement: NAME, what, unit: "MiB", values, goal, ..Figure::default() });
        };
        figure("RSS", memory.iter().map(|memory| memory.resident).collect(), goal);
        figure("PSS", memory.iter().map(|memory| memory.proportional).collect(), None);
        figure("most RSS so far", memory.iter().map(|memory| memory.peak).collect(), None);
    }
    report.note(format!("{NAME}: tasks of {SIZE} B, inserted by thousands, durability full"));
    Ok(())
}
