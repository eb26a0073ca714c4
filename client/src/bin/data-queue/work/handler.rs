//! What becomes of a task: its command runs, and how that ends is told to the server.

use std::{
    ffi::OsString, future::pending, os::unix::process::ExitStatusExt, process::ExitStatus, sync::Arc, time::Duration,
};

use data_queue_client::{Delivered, Putback};
use tokio::{process::Command, sync::watch, time::sleep};

use super::{Work, command::Process, lines::Output};

/// How often a lease is extended, at least.
const SHORTEST: Duration = Duration::from_millis(30);

/// How a task ended.
pub(super) enum Fate {
    Done,
    Failed,
    Rejected,
    GivenBack,
    /// It is delivered again, whatever the command did.
    Lost,
    /// There was no command, and why. The task was given back.
    NotRun(String),
}

/// How a command ended.
enum End {
    Exited(ExitStatus),
    Late(Duration),
    Cancelled,
    Lost,
    Hurried,
}

/// What works on tasks.
pub(super) struct Handler {
    command: Vec<OsString>,
    address: String,
    deadline: Option<Duration>,
    reject_codes: Vec<u8>,
    output: Output,
    hurried: watch::Receiver<bool>,
}

impl Handler {
    pub(super) fn new(work: &Work, address: &str, output: Output, hurried: watch::Receiver<bool>) -> Self {
        let Work { command, deadline, reject_codes, .. } = work;
        let (command, reject_codes) = (command.clone(), reject_codes.clone());
        Self { command, address: address.to_owned(), deadline: *deadline, reject_codes, output, hurried }
    }

    pub(super) async fn work_on(self: Arc<Self>, task: Delivered) -> Fate {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).env("DATA_QUEUE_ADDR", &self.address);
        let mut process = match Process::start(&mut command, &task, &self.output) {
            Ok(process) => process,
            Err(error) => {
                // That is no fault of the task's. If it cannot be given back now, its lease does.
                let _ = task.putback().await;
                return Fate::NotRun(format!("cannot run {}: {error}", self.command[0].display()));
            }
        };
        let mut hurried = self.hurried.clone();
        let end = self.wait(&mut process, &task, &mut hurried).await;
        if !matches!(end, End::Exited(_)) {
            process.end().await;
        }
        let said = process.finish(&mut hurried).await;
        self.tell(task, &end, &said).await
    }

    async fn wait(&self, process: &mut Process, task: &Delivered, hurried: &mut watch::Receiver<bool>) -> End {
        let late = async {
            match self.deadline {
                Some(deadline) => sleep(deadline).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            Ok(status) = process.exited() => End::Exited(status),
            () = late => End::Late(self.deadline.unwrap_or_default()),
            () = task.cancelled() => End::Cancelled,
            () = lost(task) => End::Lost,
            _ = hurried.wait_for(|hurried| *hurried) => End::Hurried,
        }
    }

    /// Only what ended by itself is done.
    async fn tell(&self, task: Delivered, end: &End, said: &str) -> Fate {
        let name = format!("{} {}", task.queue(), task.id());
        let (fate, what, told) = match end {
            End::Exited(status) if status.success() => (Fate::Done, "done".to_owned(), task.ack().await),
            End::Exited(status) if status.code().is_some_and(|code| self.rejects(code)) => {
                let what = how(*status);
                let putback = Putback::new().dead_letter(true).reason(reason(&what, said));
                (Fate::Rejected, format!("rejected: {what}"), task.put_back_with(putback).await)
            }
            End::Exited(status) => {
                let what = how(*status);
                (Fate::Failed, format!("failed: {what}"), task.fail(reason(&what, said)).await)
            }
            End::Late(deadline) => {
                let what = format!("deadline of {} passed", humantime::format_duration(*deadline));
                (Fate::Failed, format!("failed: {what}"), task.fail(reason(&what, said)).await)
            }
            End::Cancelled => (Fate::GivenBack, "ended, since the task was deleted".to_owned(), task.putback().await),
            End::Hurried => (Fate::GivenBack, "ended and given back".to_owned(), task.putback().await),
            End::Lost => (Fate::Lost, "ended, since its lease was lost: it may be delivered again".to_owned(), Ok(())),
        };
        match (told, &fate) {
            (Ok(()), Fate::Done) => {}
            (Ok(()), _) => self.output.say(format!("{name}: {what}")).await,
            (Err(error), _) => {
                self.output.say(format!("{name}: {what}, but the server did not take that: {error}")).await;
                return Fate::Lost;
            }
        }
        fate
    }

    fn rejects(&self, code: i32) -> bool {
        self.reject_codes.iter().any(|reject| i32::from(*reject) == code)
    }
}

/// Extends the lease for as long as it takes, also past what the server does by itself; ends when it is lost.
async fn lost(task: &Delivered) {
    loop {
        sleep((task.lease() / 3).max(SHORTEST)).await;
        if task.heartbeat(None).await.is_err() {
            return;
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        // The name is in it.
        (None, Some(_)) => format!("killed by {status}"),
        (None, None) => status.to_string(),
    }
}

fn reason(what: &str, said: &str) -> String {
    if said.is_empty() { what.to_owned() } else { format!("{what}: {said}") }
}
