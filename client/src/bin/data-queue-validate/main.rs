//! Proves a DataQueue server: inserts values, pops them with many workers of whom every second delivery fails, acks the
//! rest, and judges from its own record whether each task was acked, once, and came back byte for byte.
//!
//! `args` is the command line, `source` the values, `work` the calls, `program` workers of other programs, and `record` the judge.

mod args;
mod program;
mod record;
mod source;
mod work;

use std::{
    fs::File,
    io::{BufWriter, IsTerminal, Write},
    process::ExitCode,
};

use args::Args;
use data_queue_client::{Client, ErrorKind};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use record::Verdict;
use source::Source;
use tokio::time::timeout;
use work::{CALL_DEADLINE, Ending, Run};

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 64;

/// Why there is no verdict: an exit code and one line.
struct Stop(u8, String);

impl Stop {
    fn failed(line: impl Into<String>) -> Self {
        Self(EXIT_FAILED, line.into())
    }

    fn usage(line: impl Into<String>) -> Self {
        Self(EXIT_USAGE, line.into())
    }
}

fn main() -> ExitCode {
    let args = match Args::read() {
        Ok(args) => args,
        Err(done) => return done,
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return stopped(&Stop::failed(format!("cannot start: {error}"))),
    };
    match runtime.block_on(validate(&args)) {
        Ok((verdict, ending)) => report(&verdict, &ending),
        Err(stop) => stopped(&stop),
    }
}

async fn validate(args: &Args) -> Result<(Verdict, Ending), Stop> {
    let source = match &args.input {
        Some(path) => Source::lines(path)?,
        None => Source::numbers(args.count),
    };
    let log = args.log.as_ref().map(|path| {
        let file =
            File::create(path).map_err(|error| Stop::failed(format!("cannot write {}: {error}", path.display())));
        file.map(BufWriter::new)
    });
    let log = log.transpose()?;
    let client = Client::builder().deadline(CALL_DEADLINE.min(args.timeout * 4 / 5)).connect(&args.addr);
    let client = client.map_err(|error| Stop::usage(format!("--addr: {error}")))?;
    let queue = args.queue()?;
    reach(&client, &queue, args).await?;

    let run = Run::new(client, queue, args, log, bar(source.len()))?;
    let ending = match timeout(args.timeout, run.all(source)).await {
        Ok(ending) => ending,
        Err(_) => {
            let after = humantime::format_duration(args.timeout);
            Ending::Stopped(format!("stopped after {after} (--timeout): {}", run.standing()))
        }
    };
    Ok((run.finish()?, ending))
}

/// Asks for something that changes nothing, so that a wrong address, queue or lease shows before anything is inserted.
async fn reach(client: &Client, queue: &str, args: &Args) -> Result<(), Stop> {
    let nobody = "0".repeat(32);
    let heartbeat = timeout(args.timeout, client.heartbeat_tokens(queue, [nobody], args.lease));
    let out_of_reach = |why: String| Stop::failed(format!("cannot reach a server at {}: {why}", args.addr));
    match heartbeat.await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == ErrorKind::InvalidArgument => Err(Stop::usage(error.to_string())),
        Ok(Err(error)) => Err(out_of_reach(error.to_string())),
        Err(_) => Err(out_of_reach("no answer within --timeout".into())),
    }
}

fn bar(tasks: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(tasks), ProgressDrawTarget::stderr());
    match ProgressStyle::with_template("{bar:40} {pos}/{len} acked, {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn report(verdict: &Verdict, ending: &Ending) -> ExitCode {
    let good = verdict.is_good() && matches!(ending, Ending::Quiet);
    let last = match (ending, good) {
        (_, true) => "ok: every task was acked, once, as it was inserted".to_owned(),
        (Ending::Quiet, false) => "failed: see the table".to_owned(),
        (Ending::NotQuiet, _) => "failed: the queue still delivered a task after all of this run were acked".to_owned(),
        (Ending::Stopped(why), _) => format!("failed: {why}"),
    };
    // Whether anyone reads it does not change the verdict.
    let _ = writeln!(std::io::stdout(), "{verdict}{last}");
    if good { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) }
}

fn stopped(Stop(code, line): &Stop) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "data-queue-validate: {}", line.replace('\n', " "));
    ExitCode::from(*code)
}
