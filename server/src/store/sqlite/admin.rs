//! What administration does.

use std::ops::Bound::{Excluded, Unbounded};

use async_trait::async_trait;

use super::{
    Kind, RECLAIM_ROUNDS, SqliteStore, items,
    queue::Queue,
    tables::{At, Sql},
    turn::{Step, Turn},
};
use crate::store::{
    Admin, Counts, Deleted, Description, Insert, Inserted, MAX_PRIORITY, PAGE_BYTES, Place, Plan, QueueName,
    RECLAIM_STEP, Redriven, Seen, Setting, Settings, State, StoreError, TaskId, TaskPage, Token,
    lanes::{Lane, Load},
};

/// A page of a list has no more tasks than this.
const PAGE_TASKS: usize = 1_000;

/// What the tasks of a state are ordered by.
type Key = (u64, u128);

/// Places in lines, which may be below 0, in the same order.
fn raised(place: i64) -> u128 {
    u128::from(place.cast_unsigned() ^ (1 << 63))
}

fn lowered(place: u128) -> i64 {
    (place as u64 ^ (1 << 63)).cast_signed()
}

impl Queue {
    /// The first tasks of a state behind a place, in their order.
    fn in_state(&self, state: State, after: Option<Key>, max: usize, turn: &Turn<'_>) -> Vec<(Key, i64)> {
        let (time, place) = after.unwrap_or_default();
        let readable = |(_, task): &(Key, i64)| !turn.unreadable.contains(*task);
        match state {
            State::Ready => {
                let rank = |priority: u8| u64::from(MAX_PRIORITY - priority);
                let after = after.map(|(rank, place)| (MAX_PRIORITY.saturating_sub(rank as u8), lowered(place)));
                let ready = self.ready.behind(after, |task| self.place(task));
                let keyed = ready.map(|(priority, task)| ((rank(priority), raised(self.place(task))), task));
                keyed.filter(readable).take(max).collect()
            }
            State::Scheduled => {
                let from = if after.is_some() { Excluded((time, lowered(place), i64::MAX)) } else { Unbounded };
                let waiting = self.scheduled.range((from, Unbounded));
                let keyed = waiting.map(|(due, place, task)| ((*due, raised(*place)), *task));
                keyed.filter(readable).take(max).collect()
            }
            State::Dead => {
                let from = if after.is_some() { Excluded((time, TaskId(place.to_be_bytes()))) } else { Unbounded };
                let of = |id| self.ids.get(id).copied();
                let dead = self.dead.range((from, Unbounded));
                let keyed = dead.filter_map(|(died_at, id)| Some(((*died_at, u128::from_be_bytes(id.0)), of(id)?)));
                keyed.filter(readable).take(max).collect()
            }
            State::Leased => {
                let last = Token([u8::MAX; 16]);
                let from = if after.is_some() { Excluded((time, place as u64, last)) } else { Unbounded };
                let held = self.deadlines.range((from, Unbounded));
                let of = |token| self.leases.get(token).map(|lease| lease.task);
                let keyed =
                    held.filter_map(|(deadline, order, token)| Some(((*deadline, u128::from(*order)), of(token)?)));
                keyed.filter(readable).take(max).collect()
            }
        }
    }

    fn list(&self, state: State, after: Option<&Place>, max: usize, turn: &Turn<'_>) -> Step<TaskPage> {
        let Ok(after) = after.map(|place| self.read_place(state, place)).transpose() else {
            return Ok(Err(StoreError::PlaceUnknown));
        };
        let max = max.min(PAGE_TASKS);
        let found = self.in_state(state, after, max.saturating_add(1), turn);
        let (mut page, mut bytes) = (TaskPage::default(), 0);
        for (at, (key, task)) in found.iter().take(max).enumerate() {
            if let Some(seen) = self.seen(*task, turn)? {
                bytes += seen.envelope.len();
                page.tasks.push(seen);
            }
            page.next = (at + 1 < found.len()).then(|| self.place_after(state, *key));
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        Ok(Ok(page))
    }

    /// Where a page of a list ended: the state, the queue, and the key of the last task.
    fn place_after(&self, state: State, (first, second): Key) -> Place {
        let queue = self.key.to_be_bytes();
        [&[state as u8][..], &queue, &first.to_be_bytes(), &second.to_be_bytes()].concat()
    }

    fn read_place(&self, state: State, place: &Place) -> Result<Key, StoreError> {
        let split = || {
            let (head, rest) = place.split_first_chunk::<9>()?;
            let (first, rest) = rest.split_first_chunk()?;
            let second = rest.try_into().ok()?;
            Some((head, (u64::from_be_bytes(*first), u128::from_be_bytes(second))))
        };
        let (head, key) = split().ok_or(StoreError::PlaceUnknown)?;
        match head[0] == state as u8 && head[1..] == self.key.to_be_bytes() {
            true => Ok(key),
            false => Err(StoreError::PlaceUnknown),
        }
    }

    /// Nothing for a task that cannot be read.
    fn seen(&self, task: i64, turn: &Turn<'_>) -> Sql<Option<Seen>> {
        let Some(stored) = turn.read(task)? else { return Ok(None) };
        let (state, at, cause) = match turn.tables.spot(task)?.at {
            At::Ready => (State::Ready, None, None),
            At::Scheduled(due, _) => (State::Scheduled, Some(due), None),
            At::Leased(token) => (State::Leased, self.leases.get(&token).map(|lease| lease.deadline), None),
            At::Dead(died_at, cause) => (State::Dead, Some(died_at), Some(cause)),
        };
        let tries = self.tries.get(&task).copied().unwrap_or_default();
        let planned = self.plans.get(&task);
        let ends_at = planned.and_then(|plan| plan.ends_at);
        let plan = Plan {
            priority: planned.map_or(0, |plan| plan.priority),
            ttl: ends_at.map(|at| at.saturating_sub(stored.inserted_at)),
            unique_key: planned.and_then(|plan| plan.unique_key.as_deref()).map(str::to_owned),
        };
        Ok(Some(Seen {
            id: stored.id,
            state,
            at,
            envelope: stored.envelope,
            inserted_at: stored.inserted_at,
            ends_at,
            plan,
            deliveries: tries.deliveries + u32::from(state == State::Leased),
            failures: tries.failures,
            expiries: tries.expiries,
            last_error: if tries.has_error { turn.tables.error(task)? } else { String::new() },
            cause,
            cancelled: self.cancelled.contains(&task),
        }))
    }

    /// The key of a task that is there and can be read.
    fn key_of(&self, id: TaskId, turn: &Turn<'_>) -> Option<i64> {
        self.ids.get(&id).copied().filter(|task| !turn.unreadable.contains(*task))
    }

    fn seen_by_id(&self, id: TaskId, turn: &Turn<'_>) -> Sql<Option<Seen>> {
        self.key_of(id, turn).map_or(Ok(None), |task| self.seen(task, turn))
    }

    fn delete(&mut self, id: TaskId, turn: &Turn<'_>) -> Sql<Deleted> {
        let Some(task) = self.key_of(id, turn) else { return Ok(Deleted::Unknown) };
        if let At::Leased(_) = turn.tables.spot(task)?.at {
            if self.cancelled.insert(task) {
                turn.tables.add_cancelled(task)?;
            }
            return Ok(Deleted::Cancelled);
        }
        self.ever.deleted += 1;
        self.take_away(task, turn)?;
        Ok(Deleted::Gone)
    }

    fn redrive(&mut self, id: TaskId, turn: &mut Turn<'_>) -> Sql<Redriven> {
        let Some(task) = self.key_of(id, turn) else { return Ok(Redriven::Unknown) };
        let spot = turn.tables.spot(task)?;
        let At::Dead(died_at, _) = spot.at else { return Ok(Redriven::Unknown) };
        let plan = self.plans.get(&task);
        let (ends_at, key) = plan.map_or((None, None), |plan| (plan.ends_at, plan.unique_key.clone()));
        if !self.is_kept(died_at, turn.now) || ends_at.is_some_and(|at| at <= turn.now) {
            self.ever.expired += 1;
            self.take_away(task, turn)?;
            return Ok(Redriven::Expired);
        }
        if let Some(key) = &key
            && self.holder_of_key(key, turn)?.is_some()
        {
            return Ok(Redriven::Duplicate);
        }
        self.dead.remove(&(died_at, id));
        turn.tables.remove_dead(task)?;
        self.unique.extend(key.map(|key| (key, id)));
        self.ends.extend(ends_at.map(|at| (at, task)));
        self.bytes += spot.size;
        if let Some(tries) = self.tries.get_mut(&task) {
            (tries.failures, tries.expiries) = (0, 0);
        }
        self.make_ready(task, turn)?;
        Ok(Redriven::Ready)
    }

    fn purge(&mut self, state: State, turn: &Turn<'_>) -> Sql<u64> {
        let tasks = self.in_state(state, None, RECLAIM_STEP, turn);
        for (_, task) in &tasks {
            self.ever.purged += 1;
            self.take_away(*task, turn)?;
        }
        Ok(tasks.len() as u64)
    }

    /// `name` is written if nobody else knows the queue yet.
    pub(super) fn change(&mut self, name: &str, changes: &[(Setting, Option<u64>)], turn: &Turn<'_>) -> Sql<Settings> {
        if self.key == 0 {
            self.key = turn.tables.add_queue(name)?;
        }
        for (setting, value) in changes {
            self.set(*setting, *value);
            turn.tables.save_setting(self.key, *setting, *value)?;
        }
        Ok(self.settings.clone())
    }
}

impl SqliteStore {
    /// A step on a queue for which everything was done that the time has come for. Nothing if the queue is unknown.
    async fn up_to_date<T: Send + 'static>(
        &self,
        kind: Kind,
        load: usize,
        queue: &QueueName,
        step: impl Fn(&mut Queue, &mut Turn<'_>) -> Step<T> + Clone + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        for round in 0..=RECLAIM_ROUNDS {
            let (name, step) = (queue.clone(), step.clone());
            let run = move |queue: &mut Queue, turn: &mut Turn<'_>| {
                queue.reclaim(turn)?;
                match queue.is_behind(turn) && round < RECLAIM_ROUNDS {
                    true => Ok(Ok(None)),
                    false => Ok(step(queue, turn)?.map(Some)),
                }
            };
            let done = self.call(kind, Lane::Ordinary(Some(queue.clone())), items(load), move |engine| {
                match engine.names().contains_key(&name) {
                    true => Ok(engine.step(&name, &run)?.map(Some)),
                    false => Ok(Ok(None)),
                }
            });
            match done.await {
                Ok(Some(None)) => {}
                Ok(done) => return Ok(done.flatten()),
                Err(error) if round == 0 => return Err(error),
                Err(error) => return Err(error.after_others()),
            }
        }
        Ok(None)
    }
}

#[async_trait]
impl Admin for SqliteStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        for round in 0..=RECLAIM_ROUNDS {
            let names = queues.to_vec();
            let counted = self.call(Kind::Lease, Lane::Ordinary(None), items(queues.len()), move |engine| {
                let count = |name| match engine.names().contains_key(name) {
                    true => engine.step(name, |queue, turn| queue.counts(turn)).map(Some),
                    false => Ok(None),
                };
                let counts: Vec<Option<Counts>> = names.iter().map(count).collect::<Result<_, _>>()?;
                Ok(Ok((counts, engine.has_reclaimed_enough())))
            });
            let (counts, more) = counted.await?;
            if !more || round == RECLAIM_ROUNDS {
                return Ok(counts);
            }
        }
        Ok(Vec::new())
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        let after = after.cloned();
        self.call(Kind::Lease, Lane::Ordinary(None), items(1), move |engine| {
            let from = after.as_ref().map_or(Unbounded, Excluded);
            let behind = engine.names().range((from, Unbounded));
            Ok(Ok(behind.take(max).map(|(name, _)| name.clone()).collect()))
        })
        .await
    }

    async fn settings(&self, queue: &QueueName) -> Result<Option<Settings>, StoreError> {
        let queue = queue.clone();
        self.call(Kind::Lease, Lane::Ordinary(None), items(1), move |engine| {
            Ok(Ok(engine.names().get(&queue).map(|queue| queue.settings.clone())))
        })
        .await
    }

    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError> {
        for _ in 0..=RECLAIM_ROUNDS {
            let (lane, queue, changes) = (Lane::Ordinary(Some(queue.clone())), queue.clone(), changes.to_vec());
            let done = self.call(Kind::Change, lane, items(1), move |engine| engine.change(&queue, &changes));
            if let Some(settings) = done.await? {
                return Ok(settings);
            }
        }
        Err(unknown_rest())
    }

    async fn list(
        &self,
        queue: &QueueName,
        state: State,
        after: Option<&Place>,
        max: usize,
    ) -> Result<Option<TaskPage>, StoreError> {
        let after = after.cloned();
        let list = move |queue: &mut Queue, turn: &mut Turn<'_>| queue.list(state, after.as_ref(), max, turn);
        self.up_to_date(Kind::Lease, max.min(PAGE_TASKS), queue, list).await
    }

    async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError> {
        let all = ids.to_vec();
        let see = move |queue: &mut Queue, turn: &mut Turn<'_>| {
            all.iter().map(|id| queue.seen_by_id(*id, turn)).collect::<Sql<_>>().map(Ok)
        };
        let seen = self.up_to_date(Kind::Lease, ids.len(), queue, see).await?;
        Ok(seen.unwrap_or_else(|| vec![None; ids.len()]))
    }

    async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError> {
        let all = ids.to_vec();
        let delete = move |queue: &mut Queue, turn: &mut Turn<'_>| {
            all.iter().map(|id| queue.delete(*id, turn)).collect::<Sql<_>>().map(Ok)
        };
        let deleted = self.up_to_date(Kind::Change, ids.len(), queue, delete).await?;
        Ok(deleted.unwrap_or_else(|| vec![Deleted::Unknown; ids.len()]))
    }

    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
        let (lane, queue, ids) = (Lane::Ordinary(Some(queue.clone())), queue.clone(), ids.to_vec());
        self.call(Kind::Change, lane, items(ids.len()), move |engine| {
            let redrive =
                |queue: &mut Queue, turn: &mut Turn<'_>| ids.iter().map(|id| queue.redrive(*id, turn)).collect();
            engine.step(&queue, redrive).map(Ok)
        })
        .await
    }

    async fn import(
        &self,
        queue: &QueueName,
        inserts: Vec<Insert>,
    ) -> Result<Vec<Result<Inserted, StoreError>>, StoreError> {
        let tasks = || inserts.iter().flat_map(|insert| &insert.tasks);
        let load = Load::new(tasks().count(), tasks().map(|task| task.envelope.len()).sum());
        // What has ended is not there any more.
        self.up_to_date(Kind::Change, 1, queue, |_, _| Ok(Ok(()))).await?;
        let (lane, queue) = (Lane::Ordinary(Some(queue.clone())), queue.clone());
        self.call(Kind::Insert, lane, load, move |engine| {
            inserts.iter().map(|insert| engine.insert(&queue, insert)).collect::<Sql<_>>().map(Ok)
        })
        .await
    }

    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError> {
        let purge = move |queue: &mut Queue, turn: &mut Turn<'_>| queue.purge(state, turn).map(Ok);
        Ok(self.up_to_date(Kind::Change, RECLAIM_STEP, queue, purge).await?.unwrap_or(0))
    }

    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError> {
        for _ in 0..=RECLAIM_ROUNDS {
            let (lane, queue) = (Lane::Ordinary(Some(queue.clone())), queue.clone());
            let done = self.call(Kind::Change, lane, items(1), move |engine| engine.drop_queue(&queue, force));
            if let Some(was_there) = done.await? {
                return Ok(was_there);
            }
        }
        Err(unknown_rest())
    }

    fn describe(&self) -> Description {
        let (survives, note) = self.open.setup.durability.survives();
        Description { engine: format!("SQLite {}", rusqlite::version()), survives, note: note.to_owned() }
    }
}

fn unknown_rest() -> StoreError {
    let message =
        "the time of so many tasks is over at once that it is not known yet whether others are there; try again";
    StoreError::Overloaded(message.to_owned())
}
