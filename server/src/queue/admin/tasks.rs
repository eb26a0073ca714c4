//! Tasks as operators see them: looked at, deleted, redriven and purged.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use data_queue_proto::reason;
use md5::{Digest, Md5};

use super::page_len;
use crate::{
    queue::{
        Queues,
        error::{Error, Invalid},
        limits::{self, MAX_BATCH},
        task::{self, Content},
        uncancelled::uncancelled,
    },
    store::{Deleted, Place, QueueName, RECLAIM_STEP, Redriven, Seen, State, StoreError, TaskId},
};

/// The most tasks on a page.
const PAGE_MAX: usize = RECLAIM_STEP;

/// A task, and what is to be said of it.
#[derive(Debug)]
pub struct TaskDetails {
    /// As the store has it.
    pub seen: Seen,
    /// Its value and headers.
    pub content: Content,
}

/// Some tasks, and where to go on.
#[derive(Debug)]
pub struct TaskList {
    /// In the order of their state.
    pub tasks: Vec<TaskDetails>,
    /// Empty on the last page.
    pub next_page_token: String,
}

/// Which dead letters go back.
#[derive(Debug)]
pub enum Redrive {
    /// Those with these ids.
    Ids(Vec<String>),
    /// The oldest ones, so many at the most; 0: all that are there.
    Oldest(u64),
}

/// What became of them.
#[derive(Debug, Default)]
pub struct RedriveDone {
    /// With ids: one for each, in order.
    pub outcomes: Vec<Redriven>,
    /// How many are ready.
    pub redriven: u64,
    /// How many stay dead, because another task has their key.
    pub duplicates: u64,
}

impl RedriveDone {
    fn add(&mut self, outcomes: &[Redriven]) {
        let count = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count() as u64;
        self.redriven += count(Redriven::Ready);
        self.duplicates += count(Redriven::Duplicate);
    }
}

impl Queues {
    /// A page of the tasks in one state.
    pub async fn list_tasks(
        &self,
        queue: &str,
        state: Option<State>,
        page_size: i32,
        page_token: &str,
    ) -> Result<TaskList, Error> {
        let queue = limits::queue(queue)?;
        let state = state.ok_or_else(|| no_state("state"))?;
        let max = page_len(page_size, PAGE_MAX)?;
        let after = place(&queue, state, page_token)?;
        let page = self.store.list(&queue, state, after.as_ref(), max).await?;
        let page = page.ok_or_else(|| Error::QueueNotFound(queue.clone()))?;
        let next = page.next.map(|place| URL_SAFE_NO_PAD.encode([&list_of(&queue, state)[..], &place].concat()));
        let tasks = page.tasks.into_iter().map(details).collect::<Result<_, _>>()?;
        Ok(TaskList { tasks, next_page_token: next.unwrap_or_default() })
    }

    /// One task.
    pub async fn show_task(&self, queue: &str, id: &str) -> Result<TaskDetails, Error> {
        let queue = limits::queue(queue)?;
        let id = limits::task_id("id", id)?;
        match self.store.tasks(&queue, &[id]).await?.pop().flatten() {
            Some(seen) => details(seen),
            None => Err(Error::TaskNotFound(id)),
        }
    }

    /// Deletes tasks, or has their holders told.
    pub async fn delete_tasks(&self, queue: &str, ids: &[String]) -> Result<Vec<Deleted>, Error> {
        let queue = limits::queue(queue)?;
        let ids = task_ids("ids", ids)?;
        let mut all = Vec::with_capacity(ids.len());
        for step in ids.chunks(RECLAIM_STEP) {
            all.extend(self.store.delete(&queue, step).await.map_err(|error| unless_first(error, all.is_empty()))?);
        }
        Ok(all)
    }

    /// Makes dead letters ready again.
    pub async fn redrive(&self, queue: &str, which: Redrive) -> Result<RedriveDone, Error> {
        let queue = limits::queue(queue)?;
        let mut done = RedriveDone::default();
        match which {
            Redrive::Ids(ids) => {
                for step in task_ids("ids.ids", &ids)?.chunks(RECLAIM_STEP) {
                    let outcomes = self.redrive_step(&queue, step.to_vec(), done.outcomes.is_empty()).await?;
                    done.add(&outcomes);
                    done.outcomes.extend(outcomes);
                }
            }
            Redrive::Oldest(max) => self.redrive_oldest(&queue, max, &mut done).await?,
        }
        Ok(done)
    }

    async fn redrive_oldest(&self, queue: &QueueName, max: u64, done: &mut RedriveDone) -> Result<(), Error> {
        let dead = self.counts(queue).await?.dead;
        let mut left = if max == 0 { dead } else { max.min(dead) };
        let (mut after, mut is_first): (Option<Place>, bool) = (None, true);
        while left > 0 {
            let step = usize::try_from(left).unwrap_or(RECLAIM_STEP).min(RECLAIM_STEP);
            let page = self.store.list(queue, State::Dead, after.as_ref(), step).await;
            let Some(page) = page.map_err(|error| unless_first(error, is_first))? else { break };
            let ids: Vec<TaskId> = page.tasks.iter().map(|task| task.id).collect();
            left -= ids.len() as u64;
            done.add(&self.redrive_step(queue, ids, is_first).await?);
            is_first = false;
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        Ok(())
    }

    async fn redrive_step(&self, queue: &QueueName, ids: Vec<TaskId>, is_first: bool) -> Result<Vec<Redriven>, Error> {
        let (this, queue) = (self.clone(), queue.clone());
        // A caller who leaves must not keep the waiters from being woken.
        uncancelled(&self.background, async move {
            let redriven = this.store.redrive(&queue, &ids).await;
            let outcomes = redriven.map_err(|error| unless_first(error, is_first))?;
            this.waits.wake(&queue, outcomes.iter().filter(|outcome| **outcome == Redriven::Ready).count());
            Ok(outcomes)
        })
        .await
    }

    /// Refuses a redrive that names neither ids nor a number.
    pub fn nothing_to_redrive(queue: &str) -> Error {
        if let Err(invalid) = limits::queue(queue) {
            return invalid.into();
        }
        let message = "neither ids nor max_tasks is set";
        Error::Invalid(Invalid::new("selection", reason::REDRIVE_SELECTION_MISSING, message))
    }

    /// Removes the tasks that are in these states when it begins, more or less.
    pub async fn purge(&self, queue: &str, states: &[Option<State>]) -> Result<u64, Error> {
        let queue = limits::queue(queue)?;
        if states.is_empty() {
            return Err(no_state("states"));
        }
        let states = states.iter().copied().collect::<Option<Vec<State>>>().ok_or_else(|| no_state("states"))?;
        let counts = self.counts(&queue).await?;
        let mut purged = 0;
        for state in states {
            let mut left = match state {
                State::Ready => counts.ready,
                State::Scheduled => counts.scheduled,
                State::Leased => counts.leased,
                State::Dead => counts.dead,
            };
            while left > 0 {
                let step = self.store.purge(&queue, state).await.map_err(|error| unless_first(error, purged == 0))?;
                if step == 0 {
                    break;
                }
                purged += step;
                left = left.saturating_sub(step);
            }
        }
        Ok(purged)
    }
}

fn details(seen: Seen) -> Result<TaskDetails, Error> {
    Ok(TaskDetails { content: task::read(seen.id, &seen.envelope)?, seen })
}

/// Of a call of several steps, some may be done.
pub(super) fn unless_first(error: StoreError, is_first: bool) -> StoreError {
    if is_first { error } else { error.after_others() }
}

fn task_ids(field: &str, texts: &[String]) -> Result<Vec<TaskId>, Error> {
    limits::batch(field, texts.len(), MAX_BATCH, "ids")?;
    let parse = |(at, text): (usize, &String)| limits::task_id(&format!("{field}[{at}]"), text);
    Ok(texts.iter().enumerate().map(parse).collect::<Result<_, _>>()?)
}

fn no_state(field: &str) -> Error {
    let message = "is unset or unknown; READY, SCHEDULED, LEASED and DEAD are allowed";
    Error::Invalid(Invalid::new(field, reason::TASK_STATE_INVALID, message))
}

/// What a page's token begins with, so that the token of one list is none of another.
fn list_of(queue: &QueueName, state: State) -> [u8; 5] {
    let letter = match state {
        State::Ready => b'r',
        State::Scheduled => b's',
        State::Leased => b'l',
        State::Dead => b'd',
    };
    let digest = Md5::digest(queue.as_str());
    [letter, digest[0], digest[1], digest[2], digest[3]]
}

fn place(queue: &QueueName, state: State, token: &str) -> Result<Option<Place>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).ok();
    let place = bytes.and_then(|bytes| bytes.strip_prefix(&list_of(queue, state)).map(<[u8]>::to_vec));
    Ok(Some(place.ok_or(StoreError::PlaceUnknown)?))
}
