//! The process that works on a task: it has a group of its own, and nothing of that group outlives it.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use data_queue_client::Task;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::lines::{Output, Place, Tail, pass};
use crate::Stop;

/// How long a group that was asked to end may take.
const PATIENCE: Duration = Duration::from_secs(5);
const HEADER: &str = "DATA_QUEUE_HEADER_";

/// Says what is wrong with a command that cannot be run.
pub(super) fn find(program: &OsStr) -> Result<(), Stop> {
    let name = Path::new(program);
    let is_program =
        |path: &Path| path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
    let path = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    let is_there = if program.as_encoded_bytes().contains(&b'/') {
        is_program(name)
    } else {
        !program.is_empty() && env::split_paths(&path).any(|folder| is_program(&folder.join(name)))
    };
    if is_there {
        return Ok(());
    }
    let name = name.display();
    Err(Stop::usage(format!(
        "{name} is no command that can be run: give a path, or a program that is in PATH; no task was taken"
    )))
}

/// A command that runs, or has run.
pub(super) struct Process {
    child: Child,
    /// Nothing once it is known to be empty: its number may be another's then.
    group: Option<Pid>,
    feeding: JoinSet<()>,
    listening: JoinSet<()>,
    has_ended: watch::Sender<bool>,
    tail: Tail,
}

impl Process {
    pub(super) fn start(command: &mut Command, task: &Task, output: &Output) -> io::Result<Self> {
        for name in env::vars_os().map(|(name, _)| name) {
            // Of a task that this program itself is the command of.
            if name.as_encoded_bytes().starts_with(HEADER.as_bytes()) {
                command.env_remove(name);
            }
        }
        let child = command
            .env("DATA_QUEUE_ID", task.id())
            .env("DATA_QUEUE_QUEUE", task.queue())
            .env("DATA_QUEUE_DELIVERIES", task.deliveries().to_string())
            .env("DATA_QUEUE_FAILURES", task.failures().to_string())
            .envs(variables(task.headers()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let (has_ended, ended) = watch::channel(false);
        let (feeding, listening) = (JoinSet::new(), JoinSet::new());
        let mut process = Self { child, group, feeding, listening, has_ended, tail: Tail::default() };
        if let Some(stdin) = process.child.stdin.take() {
            process.feeding.spawn(feed(stdin, task.bytes().to_vec()));
        }
        if let Some(stdout) = process.child.stdout.take() {
            let passing = pass(stdout, Place::Stdout, output.clone(), process.tail.clone(), ended.clone());
            process.listening.spawn(passing);
        }
        if let Some(stderr) = process.child.stderr.take() {
            let passing = pass(stderr, Place::Stderr, output.clone(), process.tail.clone(), ended);
            process.listening.spawn(passing);
        }
        Ok(process)
    }

    /// Waits until the command has ended; what it has started may go on.
    pub(super) async fn exited(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        if self.group.is_some_and(|group| test_kill_process_group(group).is_err()) {
            self.group = None;
        }
        Ok(status)
    }

    /// Asks the group to end, and ends it.
    pub(super) async fn end(&mut self) {
        self.signal(Signal::TERM);
        if timeout(PATIENCE, self.exited()).await.is_err() {
            self.signal(Signal::KILL);
            // Whom the kernel does not let go is not waited for.
            let _ = timeout(PATIENCE, self.exited()).await;
        }
    }

    /// After the command has ended: lets what it left behind in its group come to an end, and hears all that was said. Answers the
    /// end of what was said on stderr. In a hurry, what nobody reads is not waited for.
    pub(super) async fn finish(mut self, hurried: &mut watch::Receiver<bool>) -> String {
        self.feeding.abort_all();
        self.has_ended.send_replace(true);
        let mut listening = std::mem::take(&mut self.listening);
        let mut heard = std::pin::pin!(async { while listening.join_next().await.is_some() {} });
        let is_heard = timeout(PATIENCE, heard.as_mut()).await.is_ok();
        self.signal(Signal::KILL);
        self.group = None;
        if !is_heard {
            tokio::select! {
                () = heard => {}
                _ = hurried.wait_for(|hurried| *hurried) => {}
            }
        }
        self.tail.text()
    }

    fn signal(&self, signal: Signal) {
        // An error means that there is nobody left.
        self.group.map(|group| kill_process_group(group, signal));
    }
}

/// Whatever becomes of this program's own task, no command goes on without it.
impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// A command need not read what it is given.
async fn feed(mut stdin: ChildStdin, value: Vec<u8>) {
    let _ = stdin.write_all(&value).await;
}

/// The headers that have a name of their own as variables, and a value that one can have.
fn variables(headers: &BTreeMap<String, String>) -> impl Iterator<Item = (String, &str)> {
    let mut variables = BTreeMap::new();
    for (key, value) in headers {
        let plain = |one: char| if one.is_ascii_alphanumeric() { one.to_ascii_uppercase() } else { '_' };
        let name = HEADER.chars().chain(key.chars().map(plain)).collect::<String>();
        variables.entry(name).and_modify(|value| *value = None).or_insert(Some(value.as_str()));
    }
    variables.into_iter().filter_map(|(name, value)| Some((name, value?))).filter(|(_, value)| !value.contains('\0'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn headers_become_variables_unless_two_would_be_one() {
        let headers = [("trace-id", "7"), ("A.b", "1"), ("a_B", "2"), ("é=\n", "x y"), ("nul", "a\0b")];
        let headers = headers.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let variables: Vec<_> = variables(&headers).collect();
        assert_eq!(
            variables,
            [("DATA_QUEUE_HEADER_TRACE_ID".to_owned(), "7"), ("DATA_QUEUE_HEADER____".to_owned(), "x y")]
        );
    }

    #[test]
    fn a_command_is_found_by_its_path_or_in_the_path() {
        assert!(find(OsStr::new("sh")).is_ok() && find(OsStr::new("/bin/sh")).is_ok());
        for missing in ["", "no-such-command", "/bin/no-such-command", "/etc/passwd", "/", "./Cargo.toml"] {
            let Stop(code, line) = find(OsStr::new(missing)).unwrap_err();
            assert!(code == 64 && line.contains(missing), "{line}");
        }
    }
}
