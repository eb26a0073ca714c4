//! The benchmarks of DataQueue: the load generator, and what starts, measures and checks the queues under it.
//!
//! `tests/bench/run` builds and runs this. A measurement is a module with a `run`; what it finds are figures, one value
//! a round, in one [`report::Report`]. A queue that others are compared with is a [`contender::Contender`]: a new one
//! is a file with that trait and a line in the measurement that it belongs to.
//!
//! A rate counts only if the queue did its work: every run ends with a [`ledger::Ledger`] in which each task was
//! delivered once and as it was inserted, as many acks as tasks, and an empty store. Anything else voids the run.

mod baseline;
mod beanstalkd;
mod callers;
mod churn;
mod compare;
mod contender;
mod cores;
mod dataqueue;
mod depth;
mod echo;
mod fault;
mod features;
mod flow;
mod footprint;
mod handles;
mod head;
mod insert;
mod latency;
mod ledger;
mod load;
mod machine;
mod memory;
mod nats;
mod options;
mod ours;
mod picture;
mod process;
mod program;
mod rabbitmq;
mod redis;
mod regression;
mod report;
mod scratch;
mod shards;
mod start;
mod streams;
mod syncs;
mod unary;
mod waiting;
mod wire;

use std::{collections::BTreeSet, process::ExitCode, time::Duration};

use clap::Parser;
use mimalloc::MiMalloc;
use tokio::signal::{
    ctrl_c,
    unix::{SignalKind, signal},
};

use fault::Result;
use options::{Measurement, Options, Output};
use report::Report;

/// As in the server, so that clients and the echo server are no worse off.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Longer than any round.
const KEEP_THREADS: Duration = Duration::from_secs(3_600);

fn main() -> ExitCode {
    let options = Options::parse();
    // One thread, as the headline figures have one core for everybody. Where a row has more, they stay: one that ended would take its
    // time on the core with it.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = match builder.enable_all().thread_keep_alive(KEEP_THREADS).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    if options.echo {
        return match runtime.block_on(echo::serve()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(fault) => {
                eprintln!("bench: {fault}");
                ExitCode::FAILURE
            }
        };
    }
    let mut report = Report::default();
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        // Whoever is interrupted stops the servers that it started: they are dropped with what runs.
        tokio::select! {
            ended = run(&options, &mut report) => ended,
            _ = terminate.recv() => Err("stopped".into()),
            _ = ctrl_c() => Err("stopped".into()),
        }
    });
    match options.output {
        Output::Table => println!("{report}"),
        Output::Json => println!("{:#}", report.json()),
    }
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("bench: {fault}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what was asked for. A measurement that fails does not keep the others from being run.
async fn run(options: &Options, report: &mut Report) -> Result<()> {
    machine::describe(options, report).await?;
    for measurement in options.measurements() {
        eprintln!("== {measurement}");
        let ended = match measurement {
            Measurement::Unary => unary::run(options, report).await,
            Measurement::Regression => regression::run(options, report).await,
            Measurement::Compare => compare::run(options, report).await,
            Measurement::P5 => latency::run(options, report).await,
            Measurement::P6 => waiting::run(options, report).await,
            Measurement::P7 => footprint::run(options, report).await,
            Measurement::P8 => depth::run(options, report).await,
            Measurement::P10 => cores::run(options, report).await,
            Measurement::Features => features::run(options, report).await,
            Measurement::Shards => shards::run(options, report).await,
            Measurement::P9Compare => compare::synced(options, report).await,
            Measurement::P9Insert => insert::run(options, report).await,
            Measurement::P9Head => head::run(options, report).await,
            Measurement::Syncs => syncs::run(options, report).await,
            Measurement::Start => start::run(options, report).await,
            Measurement::Memory => memory::run(options, report).await,
            Measurement::Callers => callers::run(options, report).await,
            Measurement::Load => load::run(options, report).await,
            Measurement::Churn => churn::run(options, report).await,
        };
        if let Err(fault) = ended {
            report.void(measurement.name(), fault.to_string());
        }
    }
    let voids = report.voids().iter().map(|(measurement, _)| *measurement).collect::<BTreeSet<_>>();
    match (report.failures(), voids.is_empty()) {
        ([], true) => Ok(()),
        ([], false) => Err(format!("void: {voids:?}").into()),
        (failures, _) => Err(failures.join("\n").into()),
    }
}
