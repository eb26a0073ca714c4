//! What can be asked for on the command line.

use std::{env, fmt, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};

/// Measures DataQueue, and other queues beside it. Without a name: everything.
#[derive(Parser)]
#[command(name = "tests/bench/run", bin_name = "tests/bench/run", max_term_width = 120)]
pub(crate) struct Options {
    /// What to measure.
    #[arg(value_enum)]
    names: Vec<Measurement>,

    /// Everything tiny, in two minutes or so: proves that the benchmarks work. Its figures mean nothing.
    #[arg(long)]
    pub(crate) smoke: bool,

    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    /// How often each measurement is repeated, the contenders in turn.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How long each round of a rate takes.
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0)]
    seconds: f64,

    /// How many tasks are ready in p9-head, start and memory.
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    ready: u64,

    /// How many tasks go through the queue in churn.
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    tasks: u64,

    /// How many tasks are ready in p8.
    #[arg(long, value_name = "N", default_value_t = 5_000_000)]
    deep: u64,

    /// The core that everything is pinned to, but for the rows that say otherwise.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) core: usize,

    /// Where the data directories are made. It should be on the disk in question. Default: beside the programs.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Where callers and load put their pictures; those that are kept are in tests/bench/pictures. Default: bench-pictures
    /// beside the programs.
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,

    /// With regression: writes the ratios to baseline.json, instead of comparing them.
    #[arg(long)]
    pub(crate) record: bool,

    /// Runs the echo server instead; the measurements start it.
    #[arg(long, hide = true)]
    pub(crate) echo: bool,

    /// What `cargo bench` adds.
    #[arg(long = "bench", hide = true)]
    _bench: bool,
}

/// How the figures are printed.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Output {
    /// A table in Markdown.
    Table,
    /// One JSON object, with the value of every round.
    Json,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measurement {
    /// Unary calls of 64 callers beside an echo server's: goals P1 and P2.
    #[value(name = "p1", alias = "p2")]
    Unary,
    /// Tasks in and out, DataQueue beside its peers: goals P3 and P4. And what a waiting task takes in memory with each.
    #[value(name = "p3", aliases = ["p4", "compare"])]
    Compare,
    /// How long calls take, of one caller and of 256.
    #[value(name = "p5")]
    P5,
    /// How fast a waiting pop is woken, and what waiting costs.
    #[value(name = "p6")]
    P6,
    /// What a task takes in Redis: waiting, leased, acked.
    #[value(name = "p7")]
    P7,
    /// Rates with millions waiting, a million leased, a thousand queues.
    #[value(name = "p8")]
    P8,
    /// Tasks in and out where an fsync comes before each answer.
    #[value(name = "p9-compare")]
    P9Compare,
    /// Unary inserts of 256 callers: each durability, and beanstalkd with an fsync a put.
    #[value(name = "p9-insert")]
    P9Insert,
    /// Pops of one caller: 1,000 tasks ready, a million, and 1,000 after a million were acked.
    #[value(name = "p9-head")]
    P9Head,
    /// Unary inserts with two cores free, and with one.
    #[value(name = "p10")]
    P10,
    /// What priorities, times to live, unique keys, delays, failures and heartbeats cost a task, and the tasks beside it.
    Features,
    /// What a task costs each process where one queue is spread over shards, and these over 1 to 3 masters of a cluster.
    Shards,
    /// What more callers bring, DataQueue beside its peers; draws throughput-against-callers.svg.
    Callers,
    /// How long inserts take at a share of the capacity; draws latency-against-load.svg.
    Load,
    /// Syncs of the disk an answered call.
    Syncs,
    /// From the server's start to its first answer with a million tasks in the file.
    Start,
    /// The server's memory with a million tasks ready.
    Memory,
    /// The size of the file while ten million tasks pass through it.
    Churn,
    /// Ratios to an echo server beside the recorded ones, in three minutes: not among everything, see regression.rs.
    Regression,
}

impl Measurement {
    /// As it is asked for.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unary => "p1",
            Self::Compare => "p3",
            Self::P5 => "p5",
            Self::P6 => "p6",
            Self::P7 => "p7",
            Self::P8 => "p8",
            Self::P9Compare => "p9-compare",
            Self::P9Insert => "p9-insert",
            Self::P9Head => "p9-head",
            Self::P10 => "p10",
            Self::Features => "features",
            Self::Shards => "shards",
            Self::Callers => "callers",
            Self::Load => "load",
            Self::Syncs => "syncs",
            Self::Start => "start",
            Self::Memory => "memory",
            Self::Churn => "churn",
            Self::Regression => "regression",
        }
    }
}

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Options {
    pub(crate) fn measurements(&self) -> Vec<Measurement> {
        let all = Measurement::value_variants().iter().copied();
        if self.names.is_empty() {
            // In the smoke test the regression's code is proved to work, but not its ratios.
            return all.filter(|name| self.smoke || *name != Measurement::Regression).collect();
        }
        all.filter(|name| self.names.contains(name)).collect()
    }

    /// How often a cheap measurement is repeated.
    pub(crate) fn rounds(&self) -> u32 {
        if self.smoke { 1 } else { self.rounds }
    }

    pub(crate) fn span(&self) -> Duration {
        Duration::from_secs_f64(if self.smoke { 0.1 } else { self.seconds })
    }

    /// Long enough for connections, files and caches to be there; short beside what is measured.
    pub(crate) fn warm_up(&self) -> Duration {
        self.span() / 4
    }

    pub(crate) fn ready(&self) -> u64 {
        if self.smoke { 5_000 } else { self.ready }
    }

    pub(crate) fn tasks(&self) -> u64 {
        if self.smoke { 20_000 } else { self.tasks }
    }

    /// A number of tasks, or what is enough to prove that they can be measured.
    pub(crate) fn many(&self, tasks: u64) -> u64 {
        if self.smoke { tasks.min(200) } else { tasks }
    }

    pub(crate) fn deep(&self) -> u64 {
        self.many(self.deep)
    }

    /// Where the data directories are made.
    pub(crate) fn directory(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| beside_programs("bench-data"))
    }

    /// Where the pictures are put.
    pub(crate) fn pictures(&self) -> PathBuf {
        self.pictures.clone().unwrap_or_else(|| beside_programs("bench-pictures"))
    }
}

fn beside_programs(name: &str) -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    program.ancestors().nth(2).map_or_else(|| PathBuf::from("target"), PathBuf::from).join(name)
}
