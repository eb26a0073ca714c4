//! The command line.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum, error::ErrorKind};

use crate::{EXIT_USAGE, Stop};

/// Validates a DataQueue server over gRPC: inserts values, pops them with workers of whom every second delivery fails
/// and comes back by its lease, acks the rest after a heartbeat, and judges from its own record. Exit code 0: nothing is
/// missing, doubled or unexpected, and at the end the queue stays empty for longer than the lease. 1: otherwise, or no
/// server. 64: bad usage.
#[derive(Debug, Parser)]
#[command(name = "data-queue-validate", version)]
pub(crate) struct Args {
    /// The server, with or without http://
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    pub(crate) addr: String,

    /// The queue, which must be empty and nobody else's [default: a fresh name, validate- and 32 hex characters]
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,

    /// How many numbers to insert
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: u64,

    /// A file to insert instead: each line is one JSON value, inserted as it stands; equal lines are tasks of their own
    #[arg(long, value_name = "FILE", conflicts_with = "count")]
    pub(crate) input: Option<PathBuf>,

    /// Pop one by one, or a batch at a time
    #[arg(long, value_enum, default_value_t = Mode::Single)]
    pub(crate) mode: Mode,

    /// How many tasks a batch pop asks for
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) batch: u32,

    /// How many workers pop at the same time, 0 to 1024; 0 needs --worker [default: 4, or 0 with --worker]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    workers: Option<u32>,

    /// A program to work as well, whose part is shown by the name: started as COMMAND work --addr ... --queue ..., split at
    /// spaces. It tells what it does by lines on stdout: "delivered ID TOKEN MD5" as it begins, "acked ID TOKEN" when the server
    /// has confirmed it, "lost ID TOKEN" if it came too late; ends at SIGTERM. May be given up to 64 times
    #[arg(long = "worker", value_name = "NAME=COMMAND", value_parser = program)]
    pub(crate) programs: Vec<Program>,

    /// How long a delivery is held, 100ms to 12h; what failed comes back after it
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = lease)]
    pub(crate) lease: Duration,

    /// Where to write the values, one line for each acked task, in the order of the acks
    #[arg(long, value_name = "FILE", conflicts_with = "programs")]
    pub(crate) log: Option<PathBuf>,

    /// How long the whole run may take
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = timeout)]
    pub(crate) timeout: Duration,
}

/// How many programs may work.
const MOST_PROGRAMS: usize = 64;

/// A program that works: what it is called in the table, and the words that start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
}

/// How the workers pop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// By `Pop`.
    Single,
    /// By `PopBatch`.
    Batch,
}

impl Args {
    /// The arguments, or what to exit with after help, version or one line about what is wrong.
    pub(crate) fn read() -> Result<Self, ExitCode> {
        Self::parse_from_line(std::env::args_os()).map_err(|error| {
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
                let _ = error.print();
                return ExitCode::SUCCESS;
            }
            eprintln!("data-queue-validate: {}", one_line(&error));
            ExitCode::from(EXIT_USAGE)
        })
    }

    fn parse_from_line(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let args = Self::try_parse_from(line)?;
        let wrong = |line: &str| Err(clap::Error::raw(ErrorKind::ValueValidation, line));
        if args.programs.len() > MOST_PROGRAMS {
            return wrong("--worker: there are more than 64");
        }
        if args.workers() == 0 && args.programs.is_empty() {
            return wrong("--workers: nobody would work; 0 needs --worker");
        }
        Ok(args)
    }

    /// How many workers of its own the run has.
    pub(crate) fn workers(&self) -> u32 {
        self.workers.unwrap_or(if self.programs.is_empty() { 4 } else { 0 })
    }

    /// The queue to use: the given one, or a name that no other run has.
    pub(crate) fn queue(&self) -> Result<String, Stop> {
        match &self.queue {
            Some(queue) => Ok(queue.clone()),
            None => Ok(format!("validate-{}", random_hex()?)),
        }
    }
}

/// 128 random bits.
pub(crate) fn random_hex() -> Result<String, Stop> {
    let half = || getrandom::u64().map_err(|error| Stop::failed(format!("the system gives no randomness: {error}")));
    Ok(format!("{:016x}{:016x}", half()?, half()?))
}

fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or("bad usage");
    format!("{} (see --help)", first.strip_prefix("error: ").unwrap_or(first))
}

fn program(text: &str) -> Result<Program, String> {
    let (name, command) = text.split_once('=').unwrap_or_default();
    let command: Vec<_> = command.split_whitespace().map(str::to_owned).collect();
    let is_named = !name.is_empty() && name.chars().all(|letter| letter.is_ascii_graphic());
    if is_named && !command.is_empty() {
        Ok(Program { name: name.to_owned(), command })
    } else {
        Err("it is a name and a command, such as python=./worker".into())
    }
}

fn lease(text: &str) -> Result<Duration, String> {
    let lease = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let range = Duration::from_millis(100)..=Duration::from_secs(12 * 60 * 60);
    if range.contains(&lease) { Ok(lease) } else { Err("a lease is 100ms to 12h".into()) }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if timeout.is_zero() { Err("it must be more than zero".into()) } else { Ok(timeout) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Args::parse_from_line(["data-queue-validate"].iter().chain(line).map(OsString::from))
    }

    #[test]
    fn defaults_hold_and_each_run_has_a_queue_of_its_own() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.count, args.workers(), args.batch, args.mode), (1000, 4, 10, Mode::Single));
        assert_eq!((args.lease, args.timeout), (Duration::from_secs(2), Duration::from_secs(600)));
        let (Ok(one), Ok(other)) = (args.queue(), args.queue()) else { panic!("no randomness") };
        assert!(one.starts_with("validate-") && one != other);
    }

    #[test]
    fn programs_work_instead_of_own_workers_unless_these_are_asked_for() {
        let args = parse(&["--worker", "a=/b c", "--worker", "d=e=f"]).unwrap();
        let program = |name: &str, command: &[&str]| Program {
            name: name.into(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
        };
        assert_eq!(args.programs, [program("a", &["/b", "c"]), program("d", &["e=f"])]);
        assert_eq!(args.workers(), 0);
        assert_eq!(parse(&["--worker", "a=b", "--workers", "2"]).unwrap().workers(), 2);
    }

    #[test]
    fn what_is_out_of_range_is_one_line() {
        for line in [
            &["--count", "0"][..],
            &["--count", "x"],
            &["--workers", "0"],
            &["--workers", "1025"],
            &["--worker", "python"],
            &["--worker", "=python"],
            &["--worker", "python= "],
            &["--worker", "a=b", "--log", "c"],
            &["--batch", "10001"],
            &["--lease", "99ms"],
            &["--lease", "13h"],
            &["--lease", "soon"],
            &["--timeout", "0s"],
            &["--mode", "all"],
            &["--input", "file", "--count", "2"],
            &["--nonsense"],
            &["stray"],
        ] {
            let text = one_line(&parse(line).unwrap_err());
            assert!(!text.contains('\n') && text.len() > 20, "{line:?}: {text}");
        }
    }
}
