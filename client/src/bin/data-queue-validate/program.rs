//! Workers of other programs: how they are started, what they tell, and how they are stopped.

use std::{
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};

use crate::{Stop, args::Program};

/// Of its deliveries a program fails every so many.
const FAIL_EVERY: &str = "10";
/// How many tasks it works on at once.
const CONCURRENCY: &str = "16";
/// How long it may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What a program tells.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Line<'a> {
    /// It begins with a task.
    Delivered { id: &'a str, lease_token: &'a str, md5: &'a str },
    /// The server confirmed an ack, this one or an earlier try of it.
    Acked { id: &'a str, lease_token: &'a str },
    /// An ack or a putback came too late.
    Lost,
}

/// Runs the program until `settled` says that all is acked, then stops it.
pub(crate) async fn run(
    program: &Program,
    address: &str,
    queue: &str,
    mut settled: watch::Receiver<bool>,
    mut told: impl FnMut(Line<'_>),
) -> Result<(), Stop> {
    let failed = |what: String| Stop::failed(format!("--worker {}: {what}", program.name));
    let mut child = start(program, address, queue).map_err(|error| failed(format!("cannot start: {error}")))?;
    let stdout = child.stdout.take().ok_or_else(|| failed("has no stdout".into()))?;
    let mut lines = BufReader::new(stdout).lines();
    let mut is_told_to_stop = false;
    loop {
        let next = async {
            if is_told_to_stop {
                let limit = humantime::format_duration(STOP_LIMIT);
                timeout(STOP_LIMIT, lines.next_line()).await.map_err(|_| format!("it did not stop within {limit}"))
            } else {
                Ok(lines.next_line().await)
            }
        };
        tokio::select! {
            line = next => match line.map_err(failed)? {
                Ok(Some(line)) => match read(&line) {
                    Ok(Some(line)) => told(line),
                    Ok(None) => {}
                    Err(()) => return Err(failed(format!("it said what is not understood: {line:?}"))),
                },
                Ok(None) => break,
                Err(error) => return Err(failed(format!("cannot read its stdout: {error}"))),
            },
            done = settled.wait_for(|settled| *settled), if !is_told_to_stop => {
                drop(done);
                is_told_to_stop = true;
                terminate(&child);
            }
        }
    }
    let status = timeout(STOP_LIMIT, child.wait()).await;
    let status = status.map_err(|_| failed("its stdout is closed, and it runs on".into()))?;
    let status = status.map_err(|error| failed(error.to_string()))?;
    match (is_told_to_stop, status.success()) {
        (true, true) => Ok(()),
        (true, false) => Err(failed(format!("when it was stopped it ended with {status}"))),
        (false, _) => Err(failed(format!("it ended by itself, with {}", plain(status)))),
    }
}

fn start(program: &Program, address: &str, queue: &str) -> std::io::Result<Child> {
    let (name, arguments) = program.command.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    Command::new(name)
        .args(arguments)
        .args(["work", "--addr", address, "--queue", queue])
        .args(["--concurrency", CONCURRENCY, "--fail-every", FAIL_EVERY])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}

/// SIGTERM, unless it has ended.
fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    if let Some(pid) = pid {
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn plain(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("code {code}"))
}

/// A line; nothing if it tells nothing of a task.
fn read(line: &str) -> Result<Option<Line<'_>>, ()> {
    let mut words = line.split(' ');
    let line = match (words.next(), words.next(), words.next(), words.next()) {
        (Some("delivered"), Some(id), Some(lease_token), Some(md5)) => Line::Delivered { id, lease_token, md5 },
        (Some("acked"), Some(id), Some(lease_token), None) => Line::Acked { id, lease_token },
        (Some("lost"), Some(_), Some(_), None) => Line::Lost,
        (Some("stopped"), None, ..) => return Ok(None),
        _ => return Err(()),
    };
    if words.next().is_none() { Ok(Some(line)) } else { Err(()) }
}
