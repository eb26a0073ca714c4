//! A process that was started here, and what the kernel knows about it.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    process::{ChildStdin, ChildStdout},
    time,
};

use crate::fault::{Fault, Result};

/// How often it is asked whether a server listens yet, and for how long.
const ASK: Duration = Duration::from_millis(5);
const ASK_TIMES: u32 = 24_000;

/// A running process; killed when dropped.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    /// Whether what it starts is in a group with it, and counts and ends with it.
    group: bool,
}

impl Process {
    /// Starts a program that goes on running and says at most one line. What it says on standard error goes to `log`.
    pub(crate) fn start(name: &'static str, command: &mut Command, log: &Path) -> Result<Self> {
        Self::spawn(name, command.stdin(Stdio::null()).stdout(Stdio::piped()), log, false)
    }

    /// Starts a program that starts others, and writes what they say to `log`.
    pub(crate) fn start_group(name: &'static str, command: &mut Command, log: &Path) -> Result<Self> {
        let stdout = File::options().create(true).append(true).open(log)?;
        Self::spawn(name, command.process_group(0).stdin(Stdio::null()).stdout(stdout), log, true)
    }

    /// Starts a program that is told what to do line by line, and answers so.
    pub(crate) fn converse(
        name: &'static str,
        command: &mut Command,
        log: &Path,
    ) -> Result<(Self, ChildStdin, ChildStdout)> {
        let mut process = Self::spawn(name, command.stdin(Stdio::piped()).stdout(Stdio::piped()), log, false)?;
        let stdin = process.child.stdin.take().ok_or("no standard input")?;
        let stdout = process.child.stdout.take().ok_or("no standard output")?;
        Ok((process, ChildStdin::from_std(stdin)?, ChildStdout::from_std(stdout)?))
    }

    fn spawn(name: &'static str, command: &mut Command, log: &Path, group: bool) -> Result<Self> {
        command.stderr(File::options().create(true).append(true).open(log)?);
        let child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        Ok(Self { name, child, log: log.to_owned(), group })
    }

    /// Waits until it listens there.
    pub(crate) async fn listens(&mut self, address: SocketAddr) -> Result<()> {
        let mut ticks = time::interval(ASK);
        for _ in 0..ASK_TIMES {
            ticks.tick().await;
            if TcpStream::connect(address).await.is_ok() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(self.fault(&status.to_string()));
            }
        }
        Err(self.fault("does not listen"))
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
        let mut time = Duration::ZERO;
        for pid in self.pids()? {
            match cpu(&pid) {
                Ok(cpu) => time += cpu,
                // One of a group may have ended since.
                Err(_) if self.group => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(time)
    }

    /// This process, and those of its group.
    fn pids(&self) -> Result<Vec<String>> {
        let own = self.pid().to_string();
        if !self.group {
            return Ok(vec![own]);
        }
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            // After the name, which may contain anything, come the state, the parent and the group.
            let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
            if fields.split_whitespace().nth(2) == Some(&own) {
                pids.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(pids)
    }

    /// Bytes that it has resident, with its group.
    pub(crate) fn resident(&self) -> Result<f64> {
        let mut bytes = 0.0;
        for pid in self.pids()? {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            match kibibytes(&status, "VmRSS:") {
                Ok(resident) => bytes += resident * f64::from(1 << 20),
                // One of a group may have ended since.
                Err(_) if self.group => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(bytes)
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

    pub(crate) fn fault(&self, what: &str) -> Fault {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        format!("{} {what}\n{log}", self.name).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.group {
            let _ = Command::new("kill").args(["-s", "KILL", "--", &format!("-{}", self.pid())]).status();
        }
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

/// A port of the loopback that was free a moment ago: for servers that cannot be asked which one they took.
pub(crate) async fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0").await?.local_addr()?)
}

/// Where `tests/bench/run` puts the peers that are in no system package: under Cargo's target directory.
pub(crate) fn peers() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    program.ancestors().nth(3).map_or_else(PathBuf::new, |target| target.join("bench-peers"))
}
