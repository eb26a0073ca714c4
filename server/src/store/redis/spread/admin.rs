//! Administration of queues that may have shards: it sees one queue.

use std::collections::BTreeMap;

use async_trait::async_trait;
use futures_util::future;

use super::{Attempts, CHANGES, Layout, RedisStore, of_several};
use crate::store::{
    Admin, Counts, Deleted, Description, Insert, Inserted, MAX_SHARDS, Place, QueueName, Redriven, Seen, Setting,
    Settings, Shard, State, StoreError, TaskId, TaskPage,
    redis::{
        admin::{Dropped, Step},
        answer::{Changed, Done, unreadable},
        unless_broken,
    },
};

/// What a place begins with that is in a shard other than 0: this, which no state does, and its number.
const IN_SHARD: u8 = b'#';

/// Whether shards could be fenced.
enum Fenced {
    All,
    NotEmpty,
    /// One of them is ahead, by this generation.
    Ahead(u64),
}

fn sum(all: &mut Counts, part: &Counts) {
    let Counts { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, oldest_ready, paused: _ } =
        part;
    all.ready += ready;
    all.scheduled += scheduled;
    all.leased += leased;
    all.dead += dead;
    all.inserted += inserted;
    all.acked += acked;
    all.expired += expired;
    all.deleted += deleted;
    all.purged += purged;
    all.oldest_ready = all.oldest_ready.max(*oldest_ready);
}

fn contended(queue: &QueueName) -> StoreError {
    let message = format!("the settings of {} are being changed by others too; try again", queue.as_str());
    StoreError::Unavailable { message, did_not_run: true }
}

/// Those of each shard, and where they stood among all. What is in none is nowhere. Shard 0 is always there: whatever the ids, what the
/// time of the queue has come for is done.
fn ids_by_shard(ids: &[TaskId]) -> BTreeMap<u8, (Vec<usize>, Vec<TaskId>)> {
    let mut groups: BTreeMap<u8, (Vec<usize>, Vec<TaskId>)> = BTreeMap::from([(0, Default::default())]);
    for (at, id) in ids.iter().enumerate().filter(|(_, id)| id.shard() < MAX_SHARDS) {
        let (places, of_shard) = groups.entry(id.shard()).or_default();
        places.push(at);
        of_shard.push(*id);
    }
    groups
}

impl RedisStore {
    async fn counts_of(&self, queue: &QueueName) -> Result<Option<Counts>, StoreError> {
        let (counts, generation) = self.one.counts_of(queue).await?;
        let layout = self.confirmed(queue, generation).await?;
        let (Some(mut counts), Some(layout)) = (counts, layout) else { return Ok(counts) };
        let others = layout.all_parts(queue).split_off(1);
        for part in future::try_join_all(others.iter().map(|part| self.one.counts_of(part))).await? {
            if let (Some(part), _) = part {
                sum(&mut counts, &part);
            }
        }
        Ok(Some(counts))
    }

    /// Keeps inserts out of all shards but 0 until they are opened by a later generation.
    async fn fence(
        &self,
        queue: &QueueName,
        read: &Changed,
        generation: u64,
        only_empty: bool,
    ) -> Result<Fenced, StoreError> {
        let fences = (1..read.spread).map(async |number| {
            let part = queue.part(Shard { number, generation: read.generation });
            if only_empty {
                // What the time has come for may end the last tasks.
                self.one.reclaim(&part).await?;
            }
            let step = Step { what: "fence", before: 0, after: generation, only_empty, values: &[] };
            let fenced = self.one.change(&part, &step).await?;
            Ok::<_, StoreError>((fenced.done, fenced.generation))
        });
        let done = future::join_all(fences).await.into_iter().collect::<Result<Vec<_>, _>>();
        let done = done.map_err(StoreError::after_others)?;
        let ahead = done.iter().filter(|(done, _)| *done == Done::OtherGeneration).map(|(_, generation)| *generation);
        Ok(match ahead.max() {
            Some(ahead) => Fenced::Ahead(ahead),
            None if done.iter().any(|(done, _)| *done == Done::NotEmpty) => Fenced::NotEmpty,
            None => Fenced::All,
        })
    }

    /// Gives all shards the settings of their queue.
    async fn open_all(&self, queue: &QueueName, layout: &Layout) -> Result<(), StoreError> {
        let opened = (1..layout.spread).map(async |number| {
            let opened = self.open(queue, layout, number).await?;
            if opened.more { self.one.measure(&layout.part(queue, number)).await } else { Ok(()) }
        });
        future::join_all(opened).await.into_iter().collect::<Result<(), _>>().map_err(StoreError::after_others)
    }

    /// One try; nothing if another change came between.
    async fn try_change(
        &self,
        queue: &QueueName,
        changes: &[(Setting, Option<u64>)],
    ) -> Result<Option<Settings>, StoreError> {
        let read = self.one.settings(queue).await?;
        let mut wanted = read.settings.clone();
        changes.iter().for_each(|(setting, value)| wanted.set(*setting, *value));
        let spreads = read.settings.would_spread(changes);
        let was_spread = read.generation > 0;
        let generation = if was_spread || wanted.shards() > 1 { read.now.max(read.generation + 1) } else { 0 };
        if spreads {
            self.one.reclaim(queue).await?;
            match self.fence(queue, &read, generation, true).await? {
                Fenced::All => {}
                Fenced::NotEmpty => {
                    self.raise(queue, read.generation, generation).await?;
                    return Err(StoreError::NotEmpty);
                }
                Fenced::Ahead(ahead) => {
                    // What it was fenced for has not come about, or does so now.
                    self.raise(queue, read.generation, ahead).await?;
                    return Ok(None);
                }
            }
        }
        let mut values: Vec<_> = changes.iter().map(|(setting, value)| (setting.name(), *value)).collect();
        if generation > 0 {
            values.push(("spread", Some(wanted.shards().max(read.spread.into()))));
        }
        let step =
            Step { what: "change", before: read.generation, after: generation, only_empty: spreads, values: &values };
        let changed = self.one.change(queue, &step).await?;
        match changed.done {
            Done::Changed => {}
            Done::OtherGeneration => return Ok(None),
            Done::NotEmpty => {
                if was_spread {
                    self.raise(queue, read.generation, generation).await?;
                }
                return Err(StoreError::NotEmpty);
            }
        }
        if let Some(layout) = self.one.shared.spread.set(queue, &changed) {
            self.open_all(queue, &layout).await?;
        }
        if changed.more {
            self.one.measure(queue).await?;
        }
        Ok(Some(changed.settings))
    }

    /// One try; nothing if the settings were changed meanwhile.
    async fn try_drop(&self, queue: &QueueName, force: bool) -> Result<Option<bool>, StoreError> {
        let read = self.one.settings(queue).await?;
        if !read.exists {
            return Ok(Some(false));
        }
        let generation = read.now.max(read.generation + 1);
        if read.generation > 0 {
            let fenced = self.fence(queue, &read, generation, !force).await?;
            if let Fenced::Ahead(ahead) = fenced {
                self.raise(queue, read.generation, ahead).await?;
                return Ok(None);
            }
            let has_tasks = async || {
                let counts = self.one.counts_of(queue).await?.0.unwrap_or_default();
                Ok::<_, StoreError>(counts.ready + counts.scheduled + counts.leased + counts.dead > 0)
            };
            if matches!(fenced, Fenced::NotEmpty) || !force && has_tasks().await? {
                self.raise(queue, read.generation, generation).await?;
                return Err(StoreError::NotEmpty);
            }
            // Those first that nobody would find without shard 0: who is cut off here leaves a queue that can be dropped again.
            let drops = (1..read.spread).map(async |number| {
                let part = queue.part(Shard { number, generation: read.generation });
                self.one.drop_queue(&part, force, None, Some(generation)).await
            });
            future::join_all(drops)
                .await
                .into_iter()
                .collect::<Result<Vec<_>, _>>()
                .map_err(StoreError::after_others)?;
        }
        match self.one.drop_queue(queue, force, Some(read.generation), None).await? {
            Dropped::Gone => {}
            Dropped::Unknown => return Ok(Some(false)),
            Dropped::OtherGeneration => return Ok(None),
            Dropped::NotEmpty => {
                if read.generation > 0 {
                    self.raise(queue, read.generation, generation).await?;
                }
                return Err(StoreError::NotEmpty);
            }
        }
        self.one.shared.spread.forget(queue);
        // The queue is gone whatever becomes of its name, and half of this must not be left out because the time is over.
        if let Err(error) = self.one.unregister(queue).await {
            tracing::warn!(%error, ?queue, "could not take the name of a deleted queue out of the registry; it goes later");
        }
        Ok(Some(true))
    }
}

#[async_trait]
impl Admin for RedisStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await.into_iter().collect()
    }

    async fn counts_in_list(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        let all = future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await;
        let readable = |(queue, counts)| {
            self.one.note_left_out(queue, &counts);
            Ok(unless_broken(queue, counts)?.flatten())
        };
        queues.iter().zip(all).map(readable).collect()
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        self.one.queues(after, max).await
    }

    async fn settings(&self, queue: &QueueName) -> Result<Option<Settings>, StoreError> {
        let read = self.one.settings(queue).await?;
        self.one.shared.spread.set(queue, &read);
        Ok(read.exists.then_some(read.settings))
    }

    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError> {
        for _ in 0..CHANGES {
            if let Some(settings) = self.try_change(queue, changes).await? {
                return Ok(settings);
            }
        }
        Err(contended(queue))
    }

    async fn list(
        &self,
        queue: &QueueName,
        state: State,
        after: Option<&Place>,
        max: usize,
    ) -> Result<Option<TaskPage>, StoreError> {
        let (mut number, mut within) = match after.map(Vec::as_slice) {
            Some([IN_SHARD, number, place @ ..]) if (1..MAX_SHARDS).contains(number) => {
                (*number, (!place.is_empty()).then(|| place.to_vec()))
            }
            place => (0, place.map(<[u8]>::to_vec)),
        };
        let layout = self.refreshed(queue).await?;
        let shards = layout.as_ref().map_or(1, |layout| layout.shards);
        loop {
            let part = layout.as_ref().map_or_else(|| queue.clone(), |layout| layout.part(queue, number));
            let page = self.one.list(&part, state, within.as_ref(), max).await?;
            let in_shard = |number: u8, place: &[u8]| match number {
                0 => place.to_vec(),
                number => [&[IN_SHARD, number], place].concat(),
            };
            let is_last = number + 1 >= shards;
            match page {
                Some(TaskPage { tasks, next: Some(next) }) => {
                    return Ok(Some(TaskPage { tasks, next: Some(in_shard(number, &next)) }));
                }
                Some(TaskPage { tasks, next: None }) if is_last || !tasks.is_empty() => {
                    return Ok(Some(TaskPage { tasks, next: (!is_last).then(|| in_shard(number + 1, &[])) }));
                }
                None if number == 0 => return Ok(None),
                _ if is_last => return Ok(Some(TaskPage { tasks: Vec::new(), next: None })),
                _ => (number, within) = (number + 1, None),
            }
        }
    }

    async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError> {
        let mut all = vec![None; ids.len()];
        for (number, (places, ids)) in ids_by_shard(ids) {
            let seen = self.one.tasks(&queue.part(Shard { number, generation: 0 }), &ids).await?;
            places.into_iter().zip(seen).for_each(|(at, one)| all[at] = one);
        }
        Ok(all)
    }

    async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError> {
        let mut all = vec![Deleted::Unknown; ids.len()];
        for (nth, (number, (places, ids))) in ids_by_shard(ids).into_iter().enumerate() {
            let deleted = self.one.delete(&queue.part(Shard { number, generation: 0 }), &ids).await;
            let deleted = deleted.map_err(|error| of_several(error, nth == 0))?;
            places.into_iter().zip(deleted).for_each(|(at, one)| all[at] = one);
        }
        Ok(all)
    }

    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
        let mut all = vec![Redriven::Unknown; ids.len()];
        for (nth, (number, (places, ids))) in ids_by_shard(ids).into_iter().enumerate() {
            let redriven = self.one.redrive(&queue.part(Shard { number, generation: 0 }), &ids).await;
            let redriven = redriven.map_err(|error| of_several(error, nth == 0))?;
            places.into_iter().zip(redriven).for_each(|(at, one)| all[at] = one);
        }
        Ok(all)
    }

    async fn import(
        &self,
        queue: &QueueName,
        inserts: Vec<Insert>,
    ) -> Result<Vec<Result<Inserted, StoreError>>, StoreError> {
        let mut attempts = Attempts::new(self);
        let mut all: Vec<Option<Result<Inserted, StoreError>>> = inserts.iter().map(|_| None).collect();
        let mut some_done = false;
        // Those that are left, until all are done where they belong.
        while all.iter().any(Option::is_none) {
            let layout = self.layout(queue);
            let mut groups: BTreeMap<u8, (Vec<usize>, Vec<Insert>)> = BTreeMap::new();
            for (at, insert) in inserts.iter().enumerate().filter(|(at, _)| all[*at].is_none()) {
                let number = match layout.as_ref().map(|layout| layout.home_of_insert(insert)) {
                    Some(Ok(home)) => home.unwrap_or_default(),
                    Some(Err(error)) => return Err(error),
                    None => 0,
                };
                let (places, group) = groups.entry(number).or_default();
                let mut insert = insert.clone();
                insert.tasks.iter_mut().for_each(|task| task.id = task.id.in_shard(number));
                places.push(at);
                group.push(insert);
            }
            for (number, (places, group)) in groups {
                let part = layout.as_ref().map_or_else(|| queue.clone(), |layout| layout.part(queue, number));
                let done = self.one.import(&part, group).await;
                let done = done.map_err(|error| of_several(error, !some_done))?;
                if done.iter().any(|one| matches!(one, Err(StoreError::Moved))) {
                    let settled = attempts.settle(self, queue, number).await;
                    settled.map_err(|error| of_several(error, !some_done))?;
                    break;
                } else if done.len() != places.len() {
                    return Err(unreadable());
                }
                some_done = true;
                places.into_iter().zip(done).for_each(|(at, one)| all[at] = Some(one));
            }
        }
        Ok(all.into_iter().flatten().collect())
    }

    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError> {
        let Some(layout) = self.refreshed(queue).await? else { return self.one.purge(queue, state).await };
        for part in layout.parts(queue) {
            let purged = self.one.purge(&part, state).await?;
            if purged > 0 {
                return Ok(purged);
            }
        }
        Ok(0)
    }

    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError> {
        for _ in 0..CHANGES {
            if let Some(was_there) = self.try_drop(queue, force).await? {
                return Ok(was_there);
            }
        }
        Err(contended(queue))
    }

    fn describe(&self) -> Description {
        self.one.describe()
    }
}
