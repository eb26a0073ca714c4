//! `data-queue`: what people do with a DataQueue server from the command line.
//!
//! `args` is the command line, `server` how a server is reached; each verb has a module of its own.

mod args;
mod bench;
mod server;

use std::{io::Write, process::ExitCode};

use args::{Args, Verb};

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 64;

/// Why a verb ended without what it was asked for: an exit code and one line.
#[derive(Debug)]
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
    let Verb::Bench(options) = &args.verb;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(options.threads).enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(bench::run(&args.common, options)),
        Err(error) => Err(Stop::failed(format!("cannot start: {error}"))),
    };
    match ended {
        Ok(code) => code,
        Err(Stop(code, line)) => {
            let _ = writeln!(std::io::stderr(), "data-queue: {}", line.replace('\n', " "));
            ExitCode::from(code)
        }
    }
}
