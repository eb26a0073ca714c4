//! Both servers. What they are asked is asked again for a while: one may be restarted, or the target be full.

use std::time::Duration;

use data_queue_client::{
    Admin, Backoff, Client, DeleteOutcome, Error, ErrorKind, Imported, Page, Paged, QueueInfo, QueueSettings,
    SettingsUpdate, TaskInfo, TaskState,
};
use tokio::time::{Instant, sleep};

use crate::Stop;

/// How long a server may be away, or have no room.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many tasks are moved together: as many as a list gives.
pub(super) const PAGE: u32 = 200;

/// Why it does not go on.
pub(super) struct Trouble {
    pub(super) why: String,
    /// Some tasks may be at both servers.
    pub(super) is_in_doubt: bool,
}

impl Trouble {
    pub(super) fn clear(why: impl Into<String>) -> Self {
        Self { why: why.into(), is_in_doubt: false }
    }

    pub(super) fn stop(self) -> Stop {
        Stop::failed(self.why)
    }
}

/// A server.
struct End {
    admin: Admin,
    address: String,
}

impl End {
    fn new(flag: &str, address: &str) -> Result<Self, Stop> {
        let client = Client::builder().deadline(PATIENCE / 2).connect(address);
        let client = client.map_err(|error| Stop::usage(format!("{flag}: {error}")))?;
        let address = address.split_once("://").map_or(address, |(_, rest)| rest.trim_end_matches('/'));
        Ok(Self { admin: client.admin(), address: address.to_owned() })
    }

    /// Asks until there is an answer, or a refusal that stays one.
    async fn ask<T>(&self, call: impl AsyncFn(&Admin) -> Result<T, Error>) -> Result<T, Error> {
        let (limit, mut backoff) = (Instant::now() + PATIENCE, Backoff::new());
        loop {
            let error = match call(&self.admin).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = error.retry_after().unwrap_or_default() + backoff.pause();
            let may_pass =
                error.is_retriable() || error.retry_after().is_some() || error.kind() == ErrorKind::Overloaded;
            if !may_pass || Instant::now() + pause > limit {
                return Err(error);
            }
            sleep(pause).await;
        }
    }

    fn trouble(&self, error: &Error) -> Trouble {
        Trouble::clear(match error.kind() {
            ErrorKind::Unavailable if error.reason().is_none() => {
                format!("cannot reach a server at {}: {error}", self.address)
            }
            _ => format!("{}: {error}", self.address),
        })
    }
}

pub(super) struct Ends {
    from: End,
    to: End,
}

impl Ends {
    pub(super) fn new(from: &str, to: &str) -> Result<Self, Stop> {
        let (from, to) = (End::new("--from", from)?, End::new("--to", to)?);
        if from.address.eq_ignore_ascii_case(&to.address) {
            return Err(Stop::usage("--from and --to are the same server"));
        }
        Ok(Self { from, to })
    }

    pub(super) fn source(&self) -> &str {
        &self.from.address
    }

    pub(super) fn target(&self) -> &str {
        &self.to.address
    }

    pub(super) async fn names(&self, page: &Page) -> Result<Paged<QueueInfo>, Stop> {
        let listed = self.from.ask(async |admin| admin.list_queues(page).await).await;
        listed.map_err(|error| self.from.trouble(&error).stop())
    }

    /// The queue at the source.
    pub(super) async fn known(&self, queue: &str) -> Result<QueueInfo, Trouble> {
        let known = self.from.ask(async |admin| admin.get_queue(queue).await).await;
        known.map_err(|error| match error.kind() {
            ErrorKind::NotFound => Trouble::clear(format!("there is no queue {queue} at {}", self.from.address)),
            _ => self.from.trouble(&error),
        })
    }

    /// The queue at the target, if it is there.
    pub(super) async fn taken(&self, queue: &str) -> Result<Option<QueueInfo>, Trouble> {
        match self.to.ask(async |admin| admin.get_queue(queue).await).await {
            Ok(taken) => Ok(Some(taken)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.to.trouble(&error)),
        }
    }

    pub(super) async fn set(&self, queue: &str, settings: &QueueSettings) -> Result<(), Trouble> {
        let update = SettingsUpdate::new()
            .lease(settings.lease)
            .max_failures(settings.max_failures)
            .max_expiries(settings.max_expiries)
            .backoff_min(settings.backoff_min)
            .backoff_max(settings.backoff_max)
            .max_tasks(settings.max_tasks)
            .max_bytes(settings.max_bytes)
            .dead_letter_retention(settings.dead_letter_retention);
        let set = self.to.ask(async |admin| admin.update_queue(queue, update.clone()).await).await;
        set.map(drop).map_err(|error| self.to.trouble(&error))
    }

    pub(super) async fn pause(&self, queue: &str) -> Result<(), Trouble> {
        let paused = self.from.ask(async |admin| admin.pause(queue).await).await;
        paused.map_err(|error| self.from.trouble(&error))
    }

    pub(super) async fn resume(&self, queue: &str) -> Result<(), Trouble> {
        let resumed = self.from.ask(async |admin| admin.resume(queue).await).await;
        resumed.map_err(|error| self.from.trouble(&error))
    }

    pub(super) async fn list(
        &self,
        queue: &str,
        state: TaskState,
        page: &Page,
    ) -> Result<(Vec<TaskInfo>, Option<Page>), Trouble> {
        let listed = self.from.ask(async |admin| admin.list_tasks(queue, state, page).await).await;
        listed.map(|listed| (listed.items, listed.next)).map_err(|error| self.from.trouble(&error))
    }

    /// Whether the target has a task of this id. Ids are random, and what is imported gets another one: then both have one store.
    pub(super) async fn is_shared(&self, queue: &str, id: &str) -> Result<bool, Trouble> {
        match self.to.ask(async |admin| admin.get_task(queue, id).await).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.to.trouble(&error)),
        }
    }

    pub(super) async fn import(&self, queue: &str, tasks: &[TaskInfo]) -> Result<Vec<Imported>, Error> {
        self.to.ask(async |admin| admin.import(queue, tasks.iter().cloned()).await).await
    }

    /// An import that was not answered, or not all of it.
    pub(super) fn doubt(&self, error: &Error) -> Trouble {
        // It was checked, or not even known, before anything was done.
        let is_clear =
            matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::MessageTooLarge | ErrorKind::Refused);
        Trouble { is_in_doubt: !is_clear, ..self.to.trouble(error) }
    }

    /// Deletes what the target has. Answers how many of these somebody holds nevertheless.
    pub(super) async fn delete(&self, queue: &str, ids: &[String]) -> Result<usize, Trouble> {
        if ids.is_empty() {
            return Ok(0);
        }
        let deleted = self.from.ask(async |admin| admin.delete_tasks(queue, ids).await).await;
        match deleted {
            Ok(outcomes) => Ok(outcomes.iter().filter(|outcome| **outcome == DeleteOutcome::Cancelled).count()),
            Err(error) => Err(Trouble { is_in_doubt: true, ..self.from.trouble(&error) }),
        }
    }
}
