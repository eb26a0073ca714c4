//! How long a start takes with many tasks in the file.

use std::{path::Path, process::Command, time::Instant};

use crate::{
    dataqueue::{self, Filled, Server},
    fault::Result,
    ledger::Ledger,
    options::Options,
    report::{Figure, Goal, Report, number},
    scratch::size_of,
};

const NAME: &str = "start";
const SIZE: usize = 200;
const GOAL: Goal = Goal::AtMost(10.0);

/// How the server before ended, and what is left of the file in memory.
#[derive(Clone, Copy)]
enum After {
    Stop,
    Kill,
    KillCold,
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let tasks = options.ready();
    let Filled { mut server, client, scratch } = Filled::new(options, &[], tasks, SIZE).await?;
    drop(client);
    let directory = scratch.path().join("data");
    let mut ledger = Ledger::new(SIZE);
    let mut next = tasks;
    let size = size_of(&directory)? as f64 / f64::from(1 << 20);
    for (after, what) in [
        (After::Stop, "SIGTERM"),
        (After::Kill, "kill -9 after an insert"),
        (After::KillCold, "kill -9, nothing of the file in the page cache"),
    ] {
        let (mut listening, mut answered, mut cores) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.rounds() {
            if let After::Stop = after {
                server.stop().await?;
            } else {
                // What was answered last has to be found in the log of the file, whatever else was in it.
                server.fill(next..next + dataqueue::BATCH, SIZE).await?;
                next += dataqueue::BATCH;
                server.kill()?;
            }
            if let After::KillCold = after {
                forget(&directory)?;
            }
            let start = Instant::now();
            server = Server::start(&directory, &[])?;
            listening.push(server.started_in.as_secs_f64());
            cores.push(server.process().cpu()?.as_secs_f64());
            let mut client = server.client().await?;
            let task = dataqueue::pop(&mut client).await?;
            answered.push(start.elapsed().as_secs_f64());
            ledger.deliver(dataqueue::data(&task))?;
            ledger.acked(dataqueue::ack(&mut client, vec![task.lease_token]).await?);
        }
        for (until, values, goal) in [
            ("until listening", listening, Some(GOAL)),
            ("time on the core until then", cores, None),
            ("until the first pop is answered", answered, None),
        ] {
            let what = format!("after {what}, {until}");
            report.figure(Figure { measurement: NAME, what, unit: "s", values, goal, ..Figure::default() });
        }
    }
    server.drain(None, &mut ledger).await?;
    ledger.verify(next)?;
    server.is_empty_after(next).await?;
    report.note(format!(
        "{NAME}: {} tasks of {SIZE} B ready, {size:.0} MiB; after all starts each task was delivered once",
        number(tasks as f64)
    ));
    Ok(())
}

/// Takes the files out of the page cache; the machine below may still have them.
fn forget(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let mut file = std::ffi::OsString::from("if=");
        file.push(entry?.path());
        let output = Command::new("dd").arg(file).args(["iflag=nocache", "count=0"]).output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
    }
    Ok(())
}
