//! Administration: what operators ask.

mod import;
mod settings;
mod tasks;
mod watch;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use data_queue_proto::reason;

pub use self::{
    import::ImportedTask,
    settings::{Given, SettingChange},
    tasks::{Redrive, RedriveDone, TaskDetails, TaskList},
    watch::{Activity, Watch},
};
use super::{
    Queues,
    error::{Error, Invalid},
    limits,
    uncancelled::uncancelled,
};
use crate::store::{Counts, Description, Millis, QueueName, Setting, Settings};

/// The most things on a page, where a request does not say.
const PAGE_DEFAULT: usize = 100;
/// The most queues on a page.
const PAGE_MAX: usize = 1_000;

/// Some queues, and where to go on.
#[derive(Debug)]
pub struct QueuePage {
    /// By name.
    pub queues: Vec<(QueueName, Counts)>,
    /// Empty on the last page.
    pub next_page_token: String,
}

impl Queues {
    /// Counts the tasks of a queue, and tells what is set for it.
    pub async fn show(&self, queue: &str) -> Result<(QueueName, Counts, Settings), Error> {
        let queue = limits::queue(queue)?;
        let counts = self.counts(&queue).await?;
        let settings = self.store.settings(&queue).await?.unwrap_or_default();
        Ok((queue, counts, settings))
    }

    async fn counts(&self, queue: &QueueName) -> Result<Counts, Error> {
        let counts = self.store.counts(std::slice::from_ref(queue)).await?.into_iter().next().flatten();
        counts.ok_or_else(|| Error::QueueNotFound(queue.clone()))
    }

    /// Counts the tasks of queue after queue.
    pub async fn list(&self, page_size: i32, page_token: &str) -> Result<QueuePage, Error> {
        let max = page_len(page_size, PAGE_MAX)?;
        let after = page_after(page_token)?;
        let mut names = self.store.queues(after.as_ref(), max + 1).await?;
        let more = names.len() > max;
        names.truncate(max);
        let last = names.last().filter(|_| more).map(|name| URL_SAFE_NO_PAD.encode(name.as_str()));
        let counts = self.store.counts_in_list(&names).await?;
        let known = names.into_iter().zip(counts).filter_map(|(name, counts)| Some((name, counts?)));
        Ok(QueuePage { queues: known.collect(), next_page_token: last.unwrap_or_default() })
    }

    /// Deletes a queue; one with tasks only if `force`.
    pub async fn delete_queue(&self, queue: &str, force: bool) -> Result<(), Error> {
        let queue = limits::queue(queue)?;
        let this = self.clone();
        // A store may have to do more than one thing, and not just the first of them.
        uncancelled(&self.background, async move {
            if this.store.drop_queue(&queue, force).await? { Ok(()) } else { Err(Error::QueueNotFound(queue)) }
        })
        .await
    }

    /// How long the tasks of a queue are held, where a request does not say.
    pub(super) async fn lease_of(&self, queue: &QueueName) -> Result<Millis, Error> {
        let settings = self.store.settings(queue).await?.unwrap_or_default();
        Ok(settings.get(Setting::Lease).unwrap_or(self.limits.default_lease.as_millis() as Millis))
    }

    /// What the store is.
    pub fn describe_store(&self) -> Description {
        self.store.describe()
    }
}

fn page_len(given: i32, max: usize) -> Result<usize, Box<Invalid>> {
    let refuse =
        |_| Invalid::new("page_size", reason::PAGE_SIZE_OUT_OF_RANGE, format!("is {given}; 0 or more is allowed"));
    match usize::try_from(given).map_err(refuse)? {
        0 => Ok(PAGE_DEFAULT.min(max)),
        given => Ok(given.min(max)),
    }
}

/// A page goes on behind the last name of the one before.
fn page_after(token: &str) -> Result<Option<QueueName>, Box<Invalid>> {
    if token.is_empty() {
        return Ok(None);
    }
    let name = URL_SAFE_NO_PAD.decode(token).ok().and_then(|name| String::from_utf8(name).ok());
    let name = name.and_then(|name| QueueName::parse(&name).ok());
    let refuse = || Invalid::new("page_token", reason::PAGE_TOKEN_INVALID, "is not a next_page_token of this call");
    name.ok_or_else(refuse).map(Some)
}
