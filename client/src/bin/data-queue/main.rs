//! `data-queue`: what people do with a DataQueue server from the command line.
//!
//! `args` is the command line; verbs that belong together have a module of their own. `session` is what they work with, `out` how
//! they say what came of it, `ask` whether it is meant. `server` is how `bench` reaches a server, past the client that repeats calls.

mod args;
mod ask;
mod bench;
mod copy;
mod health;
mod insert;
mod manual;
mod out;
mod pop;
mod queues;
mod remove;
mod server;
mod session;
mod settings;
mod signals;
mod tasks;
mod top;
mod work;

use std::{io::Write, process::ExitCode};

use args::{Args, Verb};

const EXIT_FAILED: u8 = 1;
/// There was nothing to take.
const EXIT_NOTHING: u8 = 3;
const EXIT_USAGE: u8 = 64;

/// Why a verb ended without what it was asked for: an exit code and one line.
#[derive(Clone, Debug)]
struct Stop(u8, String);

impl Stop {
    fn failed(line: impl Into<String>) -> Self {
        Self(EXIT_FAILED, line.into())
    }

    fn usage(line: impl Into<String>) -> Self {
        Self(EXIT_USAGE, line.into())
    }

    /// Nobody reads any more what is written: all is well, and there is nothing to say.
    fn unread() -> Self {
        Self(0, String::new())
    }

    fn is_unread(&self) -> bool {
        self.1.is_empty()
    }

    /// Writes the line; answers what to exit with.
    fn tell(self) -> ExitCode {
        let Self(code, line) = self;
        if !line.is_empty() {
            let _ = writeln!(std::io::stderr(), "data-queue: {}", line.replace('\n', " "));
        }
        ExitCode::from(code)
    }
}

fn main() -> ExitCode {
    let args = match Args::read() {
        Ok(args) => args,
        Err(done) => return done,
    };
    let threads = if let Verb::Bench(options) = &args.verb { options.threads } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(run(args));
            // A thread that waits for stdin would wait on.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(Stop::failed(format!("cannot start: {error}"))),
    };
    ended.unwrap_or_else(Stop::tell)
}

async fn run(Args { common, verb }: Args) -> Result<ExitCode, Stop> {
    match verb {
        Verb::Insert(verb) => verb.run(&common).await,
        Verb::Pop(verb) => verb.run(&common).await,
        Verb::Ack(verb) => verb.run(&common).await,
        Verb::Queues(verb) => verb.run(&common).await,
        Verb::Top(verb) => verb.run(&common).await,
        Verb::Set(verb) => verb.run(&common).await,
        Verb::Pause(verb) => verb.run(&common).await,
        Verb::Resume(verb) => verb.run(&common).await,
        Verb::Tasks(verb) => verb.run(&common).await,
        Verb::Task(verb) => verb.run(&common).await,
        Verb::Dead(verb) => verb.run(&common).await,
        Verb::Redrive(verb) => verb.run(&common).await,
        Verb::Delete(verb) => verb.run(&common).await,
        Verb::Purge(verb) => verb.run(&common).await,
        Verb::DeleteQueue(verb) => verb.run(&common).await,
        Verb::Health(verb) => verb.run(&common).await,
        Verb::Work(verb) => verb.run(&common).await,
        Verb::Copy(verb) => verb.run(&common).await,
        Verb::Bench(verb) => bench::run(&common, &verb).await,
        Verb::Completions(verb) => verb.run(),
        Verb::Man(verb) => verb.run(),
    }
}
