//! System calls of a running server, seen and made to fail by `strace`.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, ErrorKind},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::{PATIENCE, poll_until};

const INSTALL: &str = "Debian and Ubuntu: apt-get install strace";

/// A tracer that is attached to every thread of a process. Dropped, it lets go of it.
#[derive(Debug)]
pub struct Strace {
    child: Child,
    pid: u32,
    output: PathBuf,
}

impl Strace {
    /// Attaches to a process, with these options besides: `["-e", "trace=fsync"]`. Writes to this file.
    pub fn attach(pid: u32, options: &[&str], output: PathBuf) -> Self {
        let _ = fs::remove_file(&output);
        // To trace a process that is not one's own child needs root.
        let words: &[&str] = if is_root() { &["strace"] } else { &["sudo", "-n", "strace"] };
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(options).arg("-f").arg("-o").arg(&output).args(["-p", &pid.to_string()]);
        // In a process group of its own, as sudo does not pass on signals that come from its own.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("{} is not on this machine. {INSTALL}", words[0])
            }
            Err(error) => panic!("{words:?}: {error}"),
        };
        let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let (send, said) = mpsc::channel();
        // Read to the end even when nobody listens any more: a full pipe would stop the tracer, and so the server.
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(send.send(line))));
        let strace = Self { child, pid, output };
        let mut all = Vec::new();
        loop {
            match said.recv_timeout(PATIENCE) {
                Ok(line) if line.contains("attached") => return strace,
                Ok(line) => all.push(line),
                Err(_) => panic!(
                    "strace does not attach to process {pid}; it needs root or sudo, and to be there ({INSTALL}):\n{}",
                    all.join("\n")
                ),
            }
        }
    }

    /// Each call that was traced so far and has come to its end, a line each, in the order in which they ended.
    pub fn calls(&self) -> Vec<String> {
        self.placed_calls().into_iter().map(|(_, call)| call).collect()
    }

    /// The same, each with [`Strace::place`] just behind it.
    pub fn placed_calls(&self) -> Vec<(u64, String)> {
        let text = fs::read(&self.output).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut begun = BTreeMap::new();
        let mut calls = Vec::new();
        let mut place = 0;
        for line in text.split_inclusive('\n') {
            place += line.len() as u64;
            let Some(line) = line.strip_suffix('\n') else { break };
            let (thread, call) = line.split_once(' ').unwrap_or_default();
            let call = call.trim_start();
            if let Some(begin) = call.strip_suffix(" <unfinished ...>") {
                begun.insert(thread, begin);
            } else if let Some(end) = call.strip_prefix("<... ") {
                let (_, end) = end.split_once(" resumed>").unwrap_or_default();
                calls.push((place, format!("{}{end}", begun.remove(thread).unwrap_or_default())));
            } else if call.contains('(') {
                calls.push((place, call.to_owned()));
            }
        }
        calls
    }

    /// How far the trace has come, in bytes: whatever came to its end before is in front of this.
    pub fn place(&self) -> u64 {
        fs::metadata(&self.output).map_or(0, |output| output.len())
    }

    /// How many calls were made to fail so far.
    pub fn injected(&self) -> usize {
        self.calls().iter().filter(|call| call.contains("(INJECTED)")).count()
    }

    /// Waits until so many calls were made to fail, and says how many there were in time.
    pub async fn bites(&self, wanted: usize, limit: Duration) -> usize {
        let deadline = tokio::time::Instant::now() + limit;
        let enough = async || (self.injected() >= wanted || tokio::time::Instant::now() > deadline).then_some(());
        poll_until("faults", limit + PATIENCE, enough).await;
        self.injected()
    }

    /// Lets go of the process, and gives all calls. The process may have been killed meanwhile.
    pub fn detach(mut self) -> Vec<String> {
        self.end();
        self.calls()
    }

    fn end(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status();
        }
        let _ = self.child.wait();
        let traced = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let tracer = traced.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        assert!(tracer.is_none_or(|tracer| tracer.trim() == "0") || thread::panicking(), "strace still holds on");
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        self.end();
        let _ = fs::remove_file(&self.output);
    }
}

/// Whether this process is root's.
pub fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}
