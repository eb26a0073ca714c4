//! `data-queue-server`: parses, wires, runs.

use std::{
    env,
    io::{IsTerminal, Write, stderr, stdout},
    process::ExitCode,
};

use clap::{Arg, CommandFactory, FromArgMatches, builder::Resettable, error::ErrorKind};
use data_queue_server::{
    config::{Config, LogFormat, LogLevel, StoreProblem},
    serve,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{filter::Targets, fmt, prelude::*};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A wrong flag or setting, as in BSD's sysexits.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let config = match parse() {
        Ok(config) => config,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let _ = write!(stdout(), "{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return usage(&one_line(&error.to_string())),
    };
    log_to_stderr(&config);
    if let Some(command) = &config.command {
        return match config.run(command) {
            Ok(message) => {
                let _ = writeln!(stdout(), "{message}");
                ExitCode::SUCCESS
            }
            Err(problem) => problem_with_store(problem),
        };
    }
    let backend = match config.backend() {
        Ok(backend) => backend,
        Err(problem) => return problem_with_store(problem),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let ended = runtime.block_on(async {
        let listen = config.listen;
        let cannot_listen =
            |error| format!("cannot listen on {listen}: {error}; give a free address of this machine with --listen");
        let listener = TcpListener::bind(listen).await.map_err(cannot_listen)?;
        let address = listener.local_addr().map_err(cannot_listen)?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "listening beyond this machine, without encryption and authentication");
        }
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        if config.store.as_deref() == Some("memory") {
            tracing::warn!("tasks are kept in memory only: nothing survives the end of this server");
        }
        let folder = config.data_folder();
        let ready = || {
            // Whoever started this may have closed its end already.
            if let Some(folder) = folder {
                let _ = writeln!(stdout(), "data in {}", folder.display());
            }
            let _ = writeln!(stdout(), "listening on {address}").and_then(|()| stdout().flush());
        };
        serve(listener, backend, config, ready, shutdown).await.map_err(|error| error.to_string())
    });
    // A thread that hangs must not keep the process: what could be put back has been.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&message),
    }
}

fn parse() -> Result<Config, clap::Error> {
    // An empty variable, as compose files make them, is as good as none.
    let empty = |arg: &Arg| arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty());
    let command = Config::command().mut_args(|arg| if empty(&arg) { arg.env(Resettable::Reset) } else { arg });
    let matches = command.try_get_matches()?;
    let config = Config::from_arg_matches(&matches)?;
    config.settle_place(&matches).map_err(|problem| clap::Error::raw(ErrorKind::ArgumentConflict, problem))
}

fn problem_with_store(problem: StoreProblem) -> ExitCode {
    match problem {
        StoreProblem::Usage(message) => usage(&message),
        StoreProblem::Failed(message) => fail(&message),
    }
}

fn usage(message: &str) -> ExitCode {
    let _ = writeln!(stderr(), "data-queue-server: {message}; see --help");
    ExitCode::from(EXIT_USAGE)
}

fn fail(message: &str) -> ExitCode {
    let _ = writeln!(stderr(), "data-queue-server: {message}");
    ExitCode::FAILURE
}

/// clap explains over several paragraphs; the first says what is wrong.
fn one_line(message: &str) -> String {
    let first = message.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().map(without_address).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

/// An address that was given in the wrong place may have a password in it.
fn without_address(word: &str) -> &str {
    if word.contains("://") { "an address" } else { word }
}

fn log_to_stderr(config: &Config) {
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Libraries could log what passes through them.
    let targets = Targets::new().with_target("data_queue_server", level).with_default(LevelFilter::ERROR.min(level));
    let layer = fmt::layer().with_writer(stderr);
    let registry = tracing_subscriber::registry().with(targets);
    match config.log_format {
        LogFormat::Human => registry.with(layer.with_ansi(stderr().is_terminal())).init(),
        LogFormat::Json => registry.with(layer.json()).init(),
    }
}
