//! A server of a test's own, and `data-queue` runs against it.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use data_queue_client::Client;
use serde_json::Value;

/// Only ever waited out by a test that fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Server {
    process: Child,
    pub(crate) address: String,
}

impl Server {
    /// On a store in memory, until it listens.
    pub(crate) fn start(flags: &[&str]) -> Self {
        Self::start_on("127.0.0.1:0", "memory", flags)
    }

    /// At this address, on this store.
    pub(crate) fn start_on(address: &str, store: &str, flags: &[&str]) -> Self {
        let test = env::current_exe().unwrap();
        let binary = test.parent().unwrap().parent().unwrap().join("data-queue-server");
        assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
        let mut command = Command::new(binary);
        command.args(["--listen", address, "--store", store]).args(flags);
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
        thread::spawn(move || lines.for_each(drop));
        Self { process, address: address.expect("it listens") }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.address).unwrap()
    }

    pub(crate) fn command(&self, line: &[&str]) -> Command {
        command(&self.address, line)
    }

    pub(crate) fn run(&self, line: &[&str]) -> Ran {
        Ran::of(self.command(line).stdin(Stdio::null()).output().unwrap())
    }

    pub(crate) fn run_with(&self, line: &[&str], stdin: &[u8]) -> Ran {
        let mut command = self.command(line);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let stdin = stdin.to_vec();
        // It may end before it has read all.
        let writing = thread::spawn(move || drop(pipe.write_all(&stdin)));
        let output = child.wait_with_output().unwrap();
        writing.join().unwrap();
        Ran::of(output)
    }

    /// What a run that goes well writes.
    #[track_caller]
    pub(crate) fn good(&self, line: &[&str]) -> String {
        self.run(line).good()
    }

    /// The objects that it writes with `-o json`.
    #[track_caller]
    pub(crate) fn objects(&self, line: &[&str]) -> Vec<Value> {
        self.run(&[line, &["-o", "json"]].concat()).objects()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn binary() -> PathBuf {
    env!("CARGO_BIN_EXE_data-queue").into()
}

pub(crate) fn command(address: &str, line: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.env("DATA_QUEUE_ADDR", address).env_remove("NO_COLOR").args(line);
    command
}

/// Waits for the end of a program, of which nobody reads what it writes; answers its exit code.
#[track_caller]
pub(crate) fn ended(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(ended) = child.try_wait().unwrap() {
            return ended.code();
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it does not end");
        }
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    #[track_caller]
    pub(crate) fn good(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    #[track_caller]
    pub(crate) fn objects(self) -> Vec<Value> {
        self.good().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// One line on stderr that has these words, and nothing on stdout.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str(), self.stderr.lines().count()), (Some(code), "", 1), "{self:?}");
        for words in words {
            assert!(self.stderr.contains(words), "{words}: {self:?}");
        }
    }

    /// Nothing is said.
    #[track_caller]
    pub(crate) fn refused_quietly(&self, code: i32) {
        assert_eq!((self.code, self.stdout.as_str(), self.stderr.as_str()), (Some(code), "", ""), "{self:?}");
    }
}

/// The columns of the lines.
pub(crate) fn columns(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split('\t').collect()).collect()
}
