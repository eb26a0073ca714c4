//! A process that was started here, and what the kernel knows about it.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::fault::{Fault, Result};

/// A running process; killed when dropped.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program that goes on running. What it says on standard error goes to `log`.
    pub(crate) fn start(name: &'static str, command: &mut Command, log: &Path) -> Result<Self> {
        let stderr = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line on standard output that begins so, without that beginning.
    pub(crate) fn line(&mut self, beginning: &str) -> Result<String> {
        let mut line = String::new();
        // Nothing is lost with the reader: a server says one line.
        let mut stdout = BufReader::new(self.child.stdout.take().ok_or("standard output was read before")?);
        while stdout.read_line(&mut line)? > 0 {
            if let Some(rest) = line.strip_prefix(beginning) {
                return Ok(rest.trim().to_owned());
            }
            line.clear();
        }
        Err(self.fault("ended without a word"))
    }

    /// Asks the process to end, and waits for it. Meanwhile connections that were dropped here are closed: the server
    /// waits for them.
    pub(crate) async fn stop(mut self) -> Result<()> {
        signal("TERM", self.pid())?;
        let (this, status) = tokio::task::spawn_blocking(move || {
            let status = self.child.wait();
            (self, status)
        })
        .await?;
        let status = status?;
        // A program that has no handler for the signal ends by it.
        if status.success() || status.code().is_none() { Ok(()) } else { Err(this.fault(&status.to_string())) }
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The time on a core that all its threads had so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu(&self.pid().to_string())
    }

    pub(crate) fn memory(&self) -> Result<Memory> {
        let pid = self.pid();
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(Memory {
            resident: kibibytes(&rollup, "Rss:")?,
            proportional: kibibytes(&rollup, "Pss:")?,
            peak: kibibytes(&status, "VmHWM:")?,
        })
    }

    fn fault(&self, what: &str) -> Fault {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        format!("{} {what}\n{log}", self.name).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has of the memory, in MiB.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    /// RSS.
    pub(crate) resident: f64,
    /// PSS: pages that it shares count in part.
    pub(crate) proportional: f64,
    /// The most it ever had resident.
    pub(crate) peak: f64,
}

fn kibibytes(text: &str, field: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")).map(str::trim);
    Ok(number.ok_or_else(|| format!("the kernel does not tell {field}"))?.parse::<f64>()? / 1024.0)
}

/// The time on a core that this process had so far.
pub(crate) fn own_cpu() -> Result<Duration> {
    cpu("self")
}

/// The kernel accounts for each thread; one that has ended takes its time with it, and none of those measured ends.
fn cpu(pid: &str) -> Result<Duration> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        let first = text.split(' ').next().unwrap_or_default();
        nanoseconds += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// Sends a signal, given by its name.
pub(crate) fn signal(name: &str, pid: u32) -> Result<()> {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status()?;
    if status.success() { Ok(()) } else { Err(format!("kill -s {name} {pid}: {status}").into()) }
}

/// The first line that a program prints when it is asked for its version; nothing if there is no such program.
pub(crate) fn version(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(|line| line.trim().to_owned())
}
