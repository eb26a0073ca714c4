//! What administration does.

use async_trait::async_trait;

use super::{MemoryStore, Queue, Spot, Task};
use crate::store::{
    Admin, Counts, Deleted, Description, Insert, Inserted, Millis, PAGE_BYTES, Place, QueueName, RECLAIM_STEP,
    Redriven, Seen, Setting, Settings, State, StoreError, Survives, TaskId, TaskPage,
};

/// What the tasks of a state are ordered by.
type Key = (u64, u128);

/// How long a key is as a place.
const PLACE: usize = 24;

fn place((first, second): Key) -> Place {
    [&first.to_be_bytes()[..], &second.to_be_bytes()[..]].concat()
}

fn key_at(place: &Place) -> Result<Key, StoreError> {
    let place: [u8; PLACE] = place.as_slice().try_into().map_err(|_| StoreError::PlaceUnknown)?;
    let number = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all << 8 | u128::from(*byte));
    let (first, second) = place.split_at(8);
    Ok((number(first) as u64, number(second)))
}

impl Queue {
    /// The tasks of a state, in their order.
    fn in_state(&self, state: State) -> Vec<(Key, TaskId)> {
        match state {
            State::Ready => {
                let lines = self.ready.iter().enumerate().rev();
                let from_head = |place: i64| u128::from(place.wrapping_sub(i64::MIN) as u64);
                let key = |rank: usize, place| ((self.ready.len() - rank) as u64, from_head(place));
                lines.flat_map(|(rank, line)| line.0.iter().map(move |(place, id)| (key(rank, *place), *id))).collect()
            }
            State::Scheduled => {
                self.scheduled.iter().map(|(due, order, id)| ((*due, u128::from(*order)), *id)).collect()
            }
            State::Dead => self.dead.iter().map(|(died_at, id)| ((*died_at, u128::from_be_bytes(id.0)), *id)).collect(),
            State::Leased => {
                let of = |token| self.leases.get(token).map(|lease| lease.id);
                let held = self.deadlines.iter();
                held.filter_map(|(deadline, order, token)| Some(((*deadline, u128::from(*order)), of(token)?)))
                    .collect()
            }
        }
    }

    fn list(&self, state: State, after: Option<Key>, max: usize) -> TaskPage {
        let mut all =
            self.in_state(state).into_iter().filter(|(key, _)| after.is_none_or(|after| *key > after)).peekable();
        let (mut page, mut bytes) = (TaskPage::default(), 0);
        while page.tasks.len() < max
            && bytes < PAGE_BYTES
            && let Some((key, id)) = all.next()
        {
            bytes += self.tasks.get(&id).map_or(0, |task| task.task.envelope.len());
            page.tasks.extend(self.seen(id));
            page.next = all.peek().is_some().then(|| place(key));
        }
        page
    }

    fn seen(&self, id: TaskId) -> Option<Seen> {
        let task = self.tasks.get(&id)?;
        let (state, at) = match task.spot {
            Spot::Ready(_) => (State::Ready, None),
            Spot::Scheduled(due, _) => (State::Scheduled, Some(due)),
            Spot::Leased(token) => (State::Leased, self.leases.get(&token).map(|lease| lease.deadline)),
            Spot::Dead(died_at) => (State::Dead, Some(died_at)),
        };
        Some(Seen {
            id,
            state,
            at,
            envelope: task.task.envelope.clone(),
            inserted_at: task.inserted_at,
            ends_at: task.ends_at(),
            plan: task.plan(),
            deliveries: task.deliveries + u32::from(state == State::Leased),
            failures: task.failures,
            expiries: task.expiries,
            last_error: task.last_error.clone(),
            cause: task.cause,
            cancelled: task.cancelled,
        })
    }

    fn delete(&mut self, id: TaskId) -> Deleted {
        match self.seen(id).map(|seen| seen.state) {
            None => Deleted::Unknown,
            Some(State::Leased) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.cancelled = true;
                }
                Deleted::Cancelled
            }
            Some(_) => {
                self.deleted_count += 1;
                self.remove(id);
                Deleted::Gone
            }
        }
    }

    fn redrive(&mut self, id: TaskId, now: Millis) -> Redriven {
        let Some(task @ Task { spot: Spot::Dead(died_at), .. }) = self.tasks.get(&id) else { return Redriven::Unknown };
        let key = task.plan().unique_key;
        let is_kept = self.settings.get(Setting::DeadLetterRetention).is_none_or(|kept| died_at + kept > now);
        if !is_kept || task.ends_at().is_some_and(|at| at <= now) {
            self.expire(id);
            return Redriven::Expired;
        }
        if key.as_ref().is_some_and(|key| self.holder_of_key(key, now).is_some()) {
            return Redriven::Duplicate;
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            (task.failures, task.expiries, task.cause) = (0, 0, None);
        }
        self.take_out(id);
        self.unique.extend(key.map(|key| (key, id)));
        self.put_at_tail(id);
        Redriven::Ready
    }

    fn purge(&mut self, state: State) -> u64 {
        let tasks: Vec<TaskId> = self.in_state(state).into_iter().take(RECLAIM_STEP).map(|(_, id)| id).collect();
        for id in &tasks {
            self.purged_count += 1;
            self.remove(*id);
        }
        tasks.len() as u64
    }
}

#[async_trait]
impl Admin for MemoryStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        let now = self.clock.now();
        let known = &mut self.state().queues;
        let mut count = |name| {
            let queue = known.get_mut(name)?;
            queue.reclaim(now);
            let head = queue.ready.iter().rev().find_map(|line| line.0.values().next());
            let head = head.and_then(|id| queue.tasks.get(id));
            Some(Counts {
                ready: queue.ready_count(),
                scheduled: queue.scheduled.len() as u64,
                leased: queue.leases.len() as u64,
                dead: queue.dead.len() as u64,
                inserted: queue.inserted_count,
                acked: queue.acked_count,
                expired: queue.expired_count,
                deleted: queue.deleted_count,
                purged: queue.purged_count,
                oldest_ready: head.map(|task| now.saturating_sub(task.inserted_at)),
                paused: queue.settings.paused(),
            })
        };
        Ok(queues.iter().map(&mut count).collect())
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        let behind = |name: &&QueueName| after.is_none_or(|after| *name > after);
        Ok(self.state().queues.keys().filter(behind).take(max).cloned().collect())
    }

    async fn settings(&self, queue: &QueueName) -> Result<Option<Settings>, StoreError> {
        Ok(self.state().queues.get(queue).map(|queue| queue.settings.clone()))
    }

    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError> {
        let now = self.clock.now();
        let mut state = self.state();
        let queue = state.queues.entry(queue.clone()).or_insert_with(|| Queue::new(self));
        if queue.settings.would_spread(changes) {
            // What the time has come for may end the last ones.
            queue.reclaim(now);
            if !queue.tasks.is_empty() {
                return Err(StoreError::NotEmpty);
            }
        }
        changes.iter().for_each(|(setting, value)| queue.settings.set(*setting, *value));
        Ok(queue.settings.clone())
    }

    async fn list(
        &self,
        queue: &QueueName,
        state: State,
        after: Option<&Place>,
        max: usize,
    ) -> Result<Option<TaskPage>, StoreError> {
        let now = self.clock.now();
        let after = after.map(key_at).transpose()?;
        let list = |queue: &mut Queue| {
            queue.reclaim(now);
            queue.list(state, after, max)
        };
        Ok(self.state().queues.get_mut(queue).map(list))
    }

    async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError> {
        Ok(self.step(queue, |queue, _, now| {
            queue.reclaim(now);
            ids.iter().map(|id| queue.seen(*id)).collect()
        }))
    }

    async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError> {
        Ok(self.step(queue, |queue, _, now| {
            queue.reclaim(now);
            ids.iter().map(|id| queue.delete(*id)).collect()
        }))
    }

    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
        Ok(self.step(queue, |queue, _, now| ids.iter().map(|id| queue.redrive(*id, now)).collect()))
    }

    async fn import(
        &self,
        queue: &QueueName,
        inserts: Vec<Insert>,
    ) -> Result<Vec<Result<Inserted, StoreError>>, StoreError> {
        let (now, queues) = (self.clock.now(), &mut self.state().queues);
        if let Some(known) = queues.get_mut(queue) {
            known.reclaim(now);
        }
        Ok(inserts.into_iter().map(|insert| self.insert_into(queues, queue, insert)).collect())
    }

    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError> {
        Ok(self.step(queue, |queue, _, now| {
            queue.reclaim(now);
            queue.purge(state)
        }))
    }

    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError> {
        let now = self.clock.now();
        let queues = &mut self.state().queues;
        let Some(known) = queues.get_mut(queue) else { return Ok(false) };
        known.reclaim(now);
        if !force && !known.tasks.is_empty() {
            return Err(StoreError::NotEmpty);
        }
        let tasks: Vec<TaskId> = known.tasks.keys().copied().collect();
        tasks.into_iter().for_each(|id| known.remove(id));
        queues.remove(queue);
        Ok(true)
    }

    fn describe(&self) -> Description {
        Description {
            engine: "memory".to_owned(),
            survives: Survives::Nothing,
            note: "nothing: tasks are kept in the memory of the server and are gone when it ends".to_owned(),
        }
    }
}
