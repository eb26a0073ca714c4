//! Tasks of another queue, put into this one with what they have behind them.

use std::collections::BTreeMap;

use data_queue_proto::reason;
use md5::{Digest, Md5};

use super::tasks::unless_first;
use crate::{
    queue::{
        Queues,
        error::{Error, Invalid},
        first_due,
        limits::{self, MAX_BATCH, Span},
        task::{self, Value},
        uncancelled::uncancelled,
    },
    store::{
        Cause, Clock, Due, Fingerprint, Insert, Inserted, Millis, NewTask as StoredTask, Past, Plan, QueueName,
        RECLAIM_STEP, RequestKey, State, StoreError, SystemClock, TaskId,
    },
};

/// The greatest number that a task's counters begin with: they go on for as long again, and more.
const MAX_COUNT: u32 = 1_000_000_000;

/// A task as another queue shows it. Times are since the Unix epoch.
#[derive(Clone, Debug, Default)]
pub struct ImportedTask {
    /// There.
    pub id: String,
    /// Required; unset is refused.
    pub value: Option<Value>,
    /// Of the value. Empty: not compared.
    pub md5: String,
    /// Text that travels along.
    pub headers: BTreeMap<String, String>,
    /// 0 to 9.
    pub priority: u32,
    /// Empty: none.
    pub unique_key: String,
    /// Required, and not leased.
    pub state: Option<State>,
    /// Of a scheduled one.
    pub due_at: Option<Span>,
    /// Unset: never.
    pub expires_at: Option<Span>,
    /// Unset: now.
    pub inserted_at: Option<Span>,
    /// So far.
    pub deliveries: u32,
    /// So far.
    pub failures: u32,
    /// So far.
    pub expiries: u32,
    /// Empty: never, or nothing.
    pub last_error: String,
    /// Of a dead one. Unset: now.
    pub died_at: Option<Span>,
    /// Of a dead one. Unset: rejected.
    pub cause: Option<Cause>,
}

impl ImportedTask {
    /// Checks all but the value and the headers, and packs it as an insert of its own. `at` is its position in the request.
    fn insert(self, at: usize, queue: &QueueName, now: Millis) -> Result<Insert, Box<Invalid>> {
        let field = |name: &str| format!("tasks[{at}].{name}");
        let own_id = limits::task_id(&field("task.id"), &self.id)?;
        let priority = limits::priority(at, self.priority).map_err(|invalid| in_task(at, invalid))?;
        let inserted_at = limits::past_moment(&field("task.inserted_at"), self.inserted_at, now)?;
        let (due, is_dead) = match self.state {
            Some(State::Ready) => (None, false),
            Some(State::Scheduled) => (self.due_at, false),
            Some(State::Dead) => (None, true),
            Some(State::Leased) | None => return Err(state_invalid(&field("state"))),
        };
        let due = due.map(|due| limits::moment(&field("due_at"), reason::DELAY_OUT_OF_RANGE, due)).transpose()?;
        let ends_at = self
            .expires_at
            .map(|end| limits::moment(&field("expires_at"), reason::TTL_OUT_OF_RANGE, end))
            .transpose()?;
        let died_at = limits::past_moment(&field("died_at"), self.died_at.filter(|_| is_dead), now)?;
        limits::reason_text(&field("last_error"), &self.last_error)?;
        let unique_key = limits::unique_key(at, self.unique_key)?;
        let value = self.value.ok_or_else(|| in_task(at, limits::value_missing(at)))?;
        if !self.md5.is_empty() && self.md5 != crate::store::hex(&task::md5_of(&value)) {
            let message = "is not the MD5 of the value, in lower-case hex: the task was changed on its way";
            return Err(Invalid::new(field("task.md5"), reason::MD5_MISMATCH, message));
        }

        let envelope = task::pack(value, self.headers, priority);
        let fingerprint = fingerprint(&envelope, unique_key.as_deref());
        let ttl = ends_at.map(|end| end.saturating_sub(inserted_at));
        let new =
            StoredTask::new(id_here(queue, own_id, fingerprint), envelope, Some(Plan { priority, ttl, unique_key }));
        let past = Past {
            inserted_at,
            deliveries: self.deliveries.min(MAX_COUNT),
            failures: self.failures.min(MAX_COUNT),
            expiries: self.expiries.min(MAX_COUNT),
            last_error: self.last_error,
            death: is_dead.then(|| (died_at, self.cause.unwrap_or(Cause::Rejected))),
        };
        let due = due.filter(|due| *due > now).map(Due::At);
        Ok(Insert {
            tasks: vec![StoredTask { due, past: Some(Box::new(past)), ..new }],
            request: Some(RequestKey { id: format!("import:{own_id}"), fingerprint }),
            ..Insert::default()
        })
    }
}

/// Of what never changes of a task: the rest may be different when it is imported again.
fn fingerprint(envelope: &[u8], unique_key: Option<&str>) -> Fingerprint {
    let of_envelope = Md5::digest(envelope);
    Fingerprint(Md5::new().chain_update(of_envelope).chain_update(unique_key.unwrap_or_default()).finalize().into())
}

/// The same whenever the same task is imported into the queue, so that the store finds it as long as it is there; and another one
/// in each queue, and for each content, so that no task is taken for another one.
fn id_here(queue: &QueueName, own_id: TaskId, fingerprint: Fingerprint) -> TaskId {
    let digest = Md5::new().chain_update(own_id.0).chain_update(fingerprint.0).chain_update(queue.as_str()).finalize();
    TaskId::of_digest(digest.into())
}

/// What limits say of a new task is said of a task within what is shown of it.
fn in_task(at: usize, mut invalid: Box<Invalid>) -> Box<Invalid> {
    invalid.field = invalid.field.replacen(&format!("tasks[{at}]."), &format!("tasks[{at}].task."), 1);
    invalid
}

fn state_invalid(field: &str) -> Box<Invalid> {
    let message = "is unset, unknown or LEASED; READY, SCHEDULED and DEAD are allowed";
    Invalid::new(field, reason::TASK_STATE_INVALID, message)
}

impl Queues {
    /// Puts tasks of another queue in, one after the other. Of those that are not done, the first says why.
    pub async fn import(&self, queue: &str, tasks: Vec<ImportedTask>) -> Result<Vec<Inserted>, Error> {
        let queue = limits::queue(queue)?;
        limits::batch("tasks", tasks.len(), MAX_BATCH, "tasks")?;
        let now = SystemClock::default().now();
        let check = |(at, task): (usize, ImportedTask)| {
            self.limits.value(at, task.value.as_ref()).map_err(|invalid| in_task(at, invalid))?;
            limits::headers(at, &task.headers).map_err(|invalid| in_task(at, invalid))?;
            task.insert(at, &queue, now)
        };
        let mut inserts = tasks.into_iter().enumerate().map(check).collect::<Result<Vec<_>, _>>()?;
        let mut all = Vec::with_capacity(inserts.len());
        while !inserts.is_empty() {
            let rest = inserts.split_off(inserts.len().min(RECLAIM_STEP));
            let step = std::mem::replace(&mut inserts, rest);
            for done in self.import_step(&queue, step, all.is_empty()).await? {
                all.push(done.map_err(|error| refused(all.len(), error))?);
            }
        }
        Ok(all)
    }

    async fn import_step(
        &self,
        queue: &QueueName,
        mut inserts: Vec<Insert>,
        is_first: bool,
    ) -> Result<Vec<Result<Inserted, StoreError>>, Error> {
        let waiting_here = self.waits.waiting(queue);
        inserts.iter_mut().for_each(|insert| insert.waiting_here = waiting_here);
        let due = inserts.iter().filter_map(|insert| first_due(&insert.tasks)).min();
        let (this, queue) = (self.clone(), queue.clone());
        // A caller who leaves must not keep the waiters from being woken.
        uncancelled(&self.background, async move {
            let done = this.store.import(&queue, inserts).await.map_err(|error| unless_first(error, is_first))?;
            let is_new = |one: &&Inserted| !one.replayed && one.duplicates.is_empty();
            this.wake_for(&queue, done.iter().flatten().filter(is_new).count(), due);
            Ok(done)
        })
        .await
    }
}

/// Others of the call may be done.
fn refused(at: usize, error: StoreError) -> Error {
    match error {
        StoreError::RequestIdReused => Error::ImportedOtherwise(format!("tasks[{at}].task.id")),
        error => error.after_others().into(),
    }
}
