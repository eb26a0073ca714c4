//! The command line.

use std::{ffi::OsString, io::Write, process::ExitCode, time::Duration};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum, error::ErrorKind};

use crate::{
    EXIT_USAGE, Stop,
    copy::CopyQueues,
    health::Health,
    insert::Insert,
    manual::{Completions, Man},
    out,
    pop::{Ack, Pop},
    queues::Queues,
    remove::{Delete, DeleteQueue, Purge, Redrive},
    settings::{Pause, Resume, Set},
    tasks::{Dead, One, Tasks},
    top::Top,
    work::Work,
};

/// Works with a DataQueue server over gRPC.
#[derive(Debug, Parser)]
#[command(name = "data-queue", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

// clap breaks the lines.
const EXIT_CODES: &str = "\
Results go to stdout: tables on a terminal; elsewhere lines whose columns are separated by tabs and named in the --help of each \
verb. In both a backslash is \\\\, a tab \\t, a line end \\n, and what is no text \\xNN; a JSON value is as it is, in one line; - is \
nothing. -o json writes an object for each task or queue, with times in RFC 3339 and lengths of time in seconds (..._seconds). \
NO_COLOR is heeded. What cannot be undone (delete, delete-queue, purge, redrive --all) asks on a terminal, and takes --yes elsewhere.

Exit codes:
  0   done
  1   the server refused, was not reached, or (health) does not serve; or a part was not done
  3   pop found nothing
  64  bad usage, or --yes is missing";

/// What every verb takes.
#[derive(Debug, ClapArgs)]
pub(crate) struct Common {
    /// The server, with or without http://
    #[arg(long, global = true, value_name = "HOST:PORT", env = "DATA_QUEUE_ADDR", default_value = "127.0.0.1:50051")]
    pub(crate) addr: String,

    /// How results are written to stdout [default: table on a terminal, and of bench; plain elsewhere]
    #[arg(short, long, global = true, value_enum)]
    pub(crate) output: Option<Output>,
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// Lines with tabs, without a head.
    Plain,
    /// An object a line.
    Json,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Insert(Insert),
    Pop(Pop),
    Ack(Ack),
    Queues(Queues),
    Top(Top),
    Set(Set),
    Pause(Pause),
    Resume(Resume),
    Tasks(Tasks),
    Task(One),
    Dead(Dead),
    Redrive(Redrive),
    Delete(Delete),
    Purge(Purge),
    DeleteQueue(DeleteQueue),
    Health(Health),
    Work(Work),
    Copy(CopyQueues),
    Bench(Bench),
    Completions(Completions),
    Man(Man),
}

/// Loads a server, and tells how fast it was
///
/// Inserts tasks, pops and acks them, and measures every call. It also checks the server: each task must be delivered and
/// acked, once, as it was inserted, and the queue must be empty after. A run in which that does not hold is void: it shows
/// no figures. Exit code 0: it holds, also after Ctrl-C, which ends the run early. 1: it does not, or a call failed.
/// 64: bad usage.
///
/// Closed loop, without --rate: each caller makes its next call when the last one was answered. Open loop, with --rate:
/// calls start on a fixed schedule, and the time of a call counts from when it should have started, so that a server
/// that stalls is charged for every call that it held up.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = AFTER_HELP)]
pub(crate) struct Bench {
    /// What is measured
    #[arg(long, value_enum, default_value_t = What::Each)]
    pub(crate) what: What,

    /// How tasks are inserted and taken
    #[arg(long, value_enum, default_value_t = Mode::Unary)]
    pub(crate) mode: Mode,

    /// How many tasks an insert has, and a batch pop asks for, 1 to 1000 [default: 100 with --mode batch, 1 with stream]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    batch: Option<u32>,

    /// With --mode stream: how many inserts a stream has under way, and how many tasks it holds that are not acked, at the
    /// most, 1 to 1000 [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    window: Option<u32>,

    /// How many callers there are, 1 to 4096, each with one call under way (or one stream open) at the most; with --what both so many
    /// producers and so many consumers
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) callers: u32,

    /// How many connections the callers share, 1 to 1024
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) connections: u32,

    /// How many threads this program works with, 1 to 256: more, if it takes all of a core
    #[arg(long, value_name = "N", default_value = "1", value_parser = threads)]
    pub(crate) threads: usize,

    /// The size of a task's value in bytes, 8 to 1048576; at least 16 with --what both
    #[arg(long, value_name = "BYTES", default_value_t = 200, value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    pub(crate) size: u32,

    /// How many tasks to insert, 1 or more, instead of --duration
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub(crate) count: Option<u64>,

    /// How long to insert, 1ms to 7days; then all of it is taken, however long that takes [default: 10s, without --count]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    duration: Option<Duration>,

    /// Open loop: so many tasks a second over all callers, 0.001 to 10000000, on a fixed schedule. Holds for inserts, and for the pops of
    /// --what each and drain (not with --mode stream). At most --callers calls are under way; if that is too few for the
    /// rate, the result says so
    #[arg(long, value_name = "TASKS")]
    pub(crate) rate: Option<f64>,

    /// The queue, which must be empty and nobody else's [default: a fresh name, bench- and 32 hex characters]
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,

    /// How long deliveries are held, 100ms to 12h
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = lease)]
    pub(crate) lease: Duration,
}

const AFTER_HELP: &str = "\
Examples:
  data-queue bench
      ten seconds of inserts, then all is popped and acked, one by one
  data-queue bench --mode batch --count 1000000
      a million tasks, a hundred a call
  data-queue bench --what both --rate 500 --duration 1m
      500 tasks a second: how long does it take from insert to delivery?
  data-queue bench --callers 256 --connections 4 -o json
      for a script

Result:
  The time of a call is from its start (with --rate: its intended start) to its answer; that of
  a delivery from the start of the task's insert to its receipt. Percentiles are exact to three
  digits. Pops that found nothing do not count.

  -o json writes one object, unless the run breaks off; times are in microseconds (_us) or seconds:
    server       version, store, survives_note: as the server tells them; null if it does not
    address, queue, what, mode, callers, connections, threads, size_bytes, batch, window,
    lease_seconds
    valid        false: the run is void, and phases is empty
    interrupted  true: Ctrl-C ended it early
    overloaded   calls that were made again, since an overloaded server had refused them
    phases[]     what was measured, in order
      name       insert, drain or both
      seconds, tasks, tasks_per_second
                 tasks: inserted; or acked, in drain and both
      open_loop  null without --rate; otherwise
                 intended_per_second: tasks
                 kept: 99 of 100 calls began, and in time
                 calls_begun, calls_late (more than 1 ms), calls_not_begun, latest_start_us
      calls[]    call: insert, pop, ack or delivery
                 count
                 latency: mean_us, p50_us, p90_us, p99_us, p99_9_us, max_us
                 histogram[]: up_to_us, count (of those that took longer than the step before)
    verified     inserted, delivered, acked, missing, doubled, unexpected, damaged: tasks
                 expired: deliveries after a lease ran out; lease_lost: acks that came too late
                 empty_after: whether the queue is empty";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Inserts; then, when all are in, pops and acks.
    Each,
    /// Inserts alone; what is in is taken unmeasured.
    Insert,
    /// Pops and acks alone; --count tasks are put in unmeasured before.
    Drain,
    /// Producers and consumers at once, and the time from the insert of a task to its delivery.
    Both,
}

/// How tasks are inserted and taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Insert, Pop, Ack: one task a call.
    Unary,
    /// Insert of many, PopBatch, Ack of all that it gave.
    Batch,
    /// Produce and Consume: each caller has a stream open.
    Stream,
}

/// When a run has inserted enough.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    Count(u64),
    Duration(Duration),
}

impl Args {
    /// The arguments, or what to exit with after help, version or one line about what is wrong.
    pub(crate) fn read() -> Result<Self, ExitCode> {
        let wrong = |line: &str| {
            let _ = writeln!(std::io::stderr(), "data-queue: {line} (see --help)");
            ExitCode::from(EXIT_USAGE)
        };
        let args = Self::parse_from_line(std::env::args_os()).map_err(|error| match error.kind() {
            // In colours, if they are wanted: clap looks at stdout and NO_COLOR.
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match out::written(error.print()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(stop) => stop.tell(),
            },
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
                wrong("what to do is missing, such as: data-queue queues")
            }
            _ => wrong(&one_line(&error)),
        })?;
        if let Verb::Bench(bench) = &args.verb {
            bench.check().map_err(wrong)?;
        }
        Ok(args)
    }

    fn parse_from_line(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(line)
    }
}

impl Bench {
    pub(crate) fn batch(&self) -> u32 {
        self.batch.unwrap_or(if self.mode == Mode::Batch { 100 } else { 1 })
    }

    pub(crate) fn window(&self) -> u32 {
        self.window.unwrap_or(100)
    }

    pub(crate) fn extent(&self) -> Extent {
        match (self.count, self.duration) {
            (Some(count), _) => Extent::Count(count),
            (None, duration) => Extent::Duration(duration.unwrap_or(Duration::from_secs(10))),
        }
    }

    /// The queue to use: the given one, or a name that no other run has.
    pub(crate) fn queue(&self) -> Result<String, Stop> {
        match &self.queue {
            Some(queue) => Ok(queue.clone()),
            None => Ok(format!("bench-{}", random_hex()?)),
        }
    }

    /// What clap does not see: flags that do not go together.
    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self { mode: Mode::Unary, batch: Some(_), .. } => Err("--batch is for --mode batch and stream"),
            Self { mode: Mode::Unary | Mode::Batch, window: Some(_), .. } => Err("--window is for --mode stream"),
            Self { what: What::Both, size: ..16, .. } => Err("--what both needs a --size of at least 16"),
            Self { what: What::Drain, count: None, .. } => Err("--what drain needs --count: how many tasks to take"),
            Self { what: What::Drain, mode: Mode::Stream, rate: Some(_), .. } => {
                Err("--rate does not hold for --what drain with --mode stream: the server sends what there is")
            }
            Self { rate: Some(rate), .. } if !(0.001..=10_000_000.0).contains(rate) => {
                Err("--rate is 0.001 to 10000000 tasks a second")
            }
            Self { callers, connections, .. } if connections > callers => {
                Err("--connections is at most --callers: each caller uses one connection")
            }
            _ => Ok(()),
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
    // Arguments that are missing are named on lines of their own, up to an empty one.
    let first: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let first = first.join(" ");
    first.strip_prefix("error: ").unwrap_or(&first).to_owned()
}

/// A length of time of any size: the server says what is too much.
pub(crate) fn span(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}: it is a length of time such as 90s or 2h"))
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=256) => Ok(threads),
        _ => Err("it is 1 to 256".into()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let range = Duration::from_millis(1)..=Duration::from_secs(7 * 24 * 60 * 60);
    if range.contains(&duration) { Ok(duration) } else { Err("it is 1ms to 7days".into()) }
}

fn lease(text: &str) -> Result<Duration, String> {
    let lease = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let range = Duration::from_millis(100)..=Duration::from_secs(12 * 60 * 60);
    if range.contains(&lease) { Ok(lease) } else { Err("a lease is 100ms to 12h".into()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn parse(line: &[&str]) -> Result<Bench, clap::Error> {
        let line = ["data-queue", "bench"].iter().chain(line).map(OsString::from);
        Args::parse_from_line(line).map(|args| match args.verb {
            Verb::Bench(bench) => bench,
            other => panic!("not bench: {other:?}"),
        })
    }

    #[test]
    fn defaults_hold_and_each_run_has_a_queue_of_its_own() {
        let bench = parse(&[]).unwrap();
        assert_eq!((bench.what, bench.mode, bench.callers, bench.connections), (What::Each, Mode::Unary, 16, 1));
        assert_eq!((bench.size, bench.batch(), bench.extent()), (200, 1, Extent::Duration(Duration::from_secs(10))));
        assert_eq!(bench.check(), Ok(()));
        let (Ok(one), Ok(other)) = (bench.queue(), bench.queue()) else { panic!("no randomness") };
        assert!(one.starts_with("bench-") && one != other);
        assert_eq!(parse(&["--mode", "batch"]).unwrap().batch(), 100);
        assert_eq!(parse(&["--count", "7"]).unwrap().extent(), Extent::Count(7));
    }

    #[test]
    fn what_is_out_of_range_is_one_line() {
        for line in [
            &["--count", "0"][..],
            &["--count", "1", "--duration", "1s"],
            &["--duration", "0s"],
            &["--duration", "soon"],
            &["--callers", "0"],
            &["--connections", "0"],
            &["--threads", "0"],
            &["--batch", "1001"],
            &["--window", "0"],
            &["--size", "7"],
            &["--lease", "99ms"],
            &["--rate", "many"],
            &["--mode", "all"],
            &["--what", "all"],
            &["--nonsense"],
            &["stray"],
        ] {
            let text = one_line(&parse(line).unwrap_err());
            assert!(!text.contains('\n') && text.len() > 20, "{line:?}: {text}");
        }
    }

    #[test]
    fn flags_that_do_not_go_together_are_refused() {
        for line in [
            &["--batch", "10"][..],
            &["--mode", "batch", "--window", "10"],
            &["--what", "both", "--size", "15"],
            &["--what", "drain"],
            &["--what", "drain", "--count", "1", "--mode", "stream", "--rate", "1"],
            &["--rate", "0"],
            &["--rate", "NaN"],
            &["--callers", "2", "--connections", "3"],
        ] {
            assert!(parse(line).unwrap().check().is_err(), "{line:?}");
        }
    }
}
