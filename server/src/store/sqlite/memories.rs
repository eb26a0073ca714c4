//! What a queue remembers, in two generations, as the store in memory does. Here the entries are looked up in memory and
//! kept in the file; generations that are no longer seen are swept out of the file little by little.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hash, RandomState},
};

use super::{
    tables::{Sql, Tables},
    turn::Unreadable,
};
use crate::store::{Millis, Remember};

/// The rows that are swept with one commit, at most.
const SWEPT_AT_ONCE: i64 = 256;

/// Of tasks, so many are swept with one commit, and so many runs of keys that follow each other: each takes a statement a
/// table.
const TASKS_AT_ONCE: usize = 1_024;
const RUNS_AT_ONCE: usize = 32;

/// Which memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Acked = 0,
    Requests = 1,
}

/// What was remembered from a time on.
pub(super) struct Generation<K, V, S = RandomState> {
    pub(super) number: i64,
    pub(super) began: Millis,
    /// How many rows it has in the file.
    pub(super) rows: i64,
    pub(super) entries: HashMap<K, V, S>,
}

impl<K, V, S: Default> Default for Generation<K, V, S> {
    fn default() -> Self {
        Self { number: 0, began: 0, rows: 0, entries: HashMap::default() }
    }
}

/// A memory of one queue.
pub(super) struct Memory<K, V, S = RandomState> {
    kind: Kind,
    remember: Remember,
    pub(super) current: Generation<K, V, S>,
    pub(super) older: Generation<K, V, S>,
}

impl<K: Eq + Hash, V, S: BuildHasher + Default> Memory<K, V, S> {
    pub(super) fn new(kind: Kind, remember: Remember) -> Self {
        Self { kind, remember, current: Generation::default(), older: Generation::default() }
    }

    /// What is remembered of a key, and in which generation.
    pub(super) fn get(&self, key: &K, now: Millis) -> Option<(i64, &V)> {
        let seen = |generation: &&Generation<K, V, S>| now < generation.began + 2 * self.remember.window;
        let find = |generation: &'_ Generation<K, V, S>| generation.entries.get(key).map(|_| generation.number);
        let number = [&self.current, &self.older].into_iter().filter(seen).find_map(find)?;
        let generation = if number == self.current.number { &self.current } else { &self.older };
        generation.entries.get(key).map(|value| (number, value))
    }

    /// Whether the next entry begins a new generation.
    pub(super) fn is_due(&self, now: Millis) -> bool {
        now >= self.current.began + self.remember.window
            || self.current.entries.len() as u64 >= self.remember.entries / 2
    }

    /// Begins a new generation, and drops the older one.
    pub(super) fn begin(&mut self, tables: Tables<'_>, queue: i64, now: Millis, sweeper: &mut Sweeper) -> Sql<()> {
        let next = Generation { number: self.current.number + 1, began: now, ..Generation::default() };
        tables.add_generation(queue, self.kind, next.number, now)?;
        let dropped = std::mem::replace(&mut self.older, std::mem::replace(&mut self.current, next));
        sweeper.drop_generation(queue, self.kind, &dropped);
        Ok(())
    }

    /// Drops all of it, with its queue.
    pub(super) fn drop_all(&self, queue: i64, sweeper: &mut Sweeper) {
        sweeper.drop_generation(queue, self.kind, &self.older);
        sweeper.drop_generation(queue, self.kind, &self.current);
    }

    /// Drops what is not seen any more.
    pub(super) fn forget(&mut self, queue: i64, now: Millis, sweeper: &mut Sweeper) {
        for generation in [&mut self.current, &mut self.older] {
            if now >= generation.began + 2 * self.remember.window && !generation.entries.is_empty() {
                sweeper.drop_generation(queue, self.kind, generation);
                generation.entries = HashMap::default();
                generation.rows = 0;
            }
        }
    }

    /// Puts generations back as they were read, the newest last.
    pub(super) fn restore(&mut self, generations: Vec<Generation<K, V, S>>, queue: i64, sweeper: &mut Sweeper) {
        for generation in generations {
            let older = std::mem::replace(&mut self.current, generation);
            let dropped = std::mem::replace(&mut self.older, older);
            sweeper.drop_generation(queue, self.kind, &dropped);
        }
    }
}

struct Dropped {
    queue: i64,
    kind: Kind,
    number: i64,
    from: i64,
    rows: i64,
}

/// A queue that is none any more, and its tasks, the last one first.
struct DroppedQueue {
    key: i64,
    tasks: Vec<i64>,
}

/// Deletes dropped generations, the answers of forgotten producers, and the tasks of dropped queues from the file, some rows
/// with each commit.
#[derive(Default)]
pub(super) struct Sweeper {
    generations: VecDeque<Dropped>,
    producers: VecDeque<i64>,
    queues: VecDeque<DroppedQueue>,
}

impl Sweeper {
    pub(super) fn drop_generation<K, V, S>(&mut self, queue: i64, kind: Kind, generation: &Generation<K, V, S>) {
        // The first one was never begun.
        if generation.number > 0 {
            let (number, rows) = (generation.number, generation.rows);
            self.generations.push_back(Dropped { queue, kind, number, from: 0, rows });
        }
    }

    pub(super) fn drop_answers(&mut self, producer: i64) {
        self.producers.push_back(producer);
    }

    /// What is remembered of the queue was dropped before.
    pub(super) fn drop_queue(&mut self, key: i64, mut tasks: Vec<i64>) {
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        self.queues.push_back(DroppedQueue { key, tasks });
    }

    /// Sweeps as much as one commit should carry.
    pub(super) fn sweep(&mut self, tables: Tables<'_>, unreadable: &Unreadable) -> Sql<()> {
        self.sweep_queue(tables, unreadable)?;
        if let Some(producer) = self.producers.front()
            && tables.sweep_answers(*producer, SWEPT_AT_ONCE)? < SWEPT_AT_ONCE as usize
        {
            self.producers.pop_front();
        }
        let Some(dropped) = self.generations.front_mut() else { return Ok(()) };
        dropped.from += SWEPT_AT_ONCE;
        tables.remove_entries(dropped.queue, dropped.kind, dropped.number, dropped.from)?;
        if dropped.from >= dropped.rows {
            tables.remove_generation(dropped.queue, dropped.kind, dropped.number)?;
            self.generations.pop_front();
        }
        Ok(())
    }

    fn sweep_queue(&mut self, tables: Tables<'_>, unreadable: &Unreadable) -> Sql<()> {
        let Some(DroppedQueue { key, tasks }) = self.queues.front_mut() else { return Ok(()) };
        let mut left = TASKS_AT_ONCE;
        for _ in 0..RUNS_AT_ONCE {
            // What cannot be read cannot be deleted either: it stays, and must not stop the others.
            while tasks.pop_if(|task| unreadable.contains(*task)).is_some() {}
            let Some(first) = tasks.pop() else { break };
            let mut last = first;
            left -= 1;
            while left > 0 && tasks.pop_if(|task| *task == last + 1 && !unreadable.contains(*task)).is_some() {
                (last, left) = (last + 1, left - 1);
            }
            tables.sweep_tasks(first, last).inspect_err(|error| unreadable.look_for(tables, first, last, error))?;
            if left == 0 {
                break;
            }
        }
        // Its key is used again only when nothing is left of it. What cannot be read is: it is met again at the next start.
        if tasks.is_empty() && !self.generations.iter().any(|generation| generation.queue == *key) {
            if !unreadable.has_any() {
                tables.remove_queue(*key)?;
            }
            self.queues.pop_front();
        }
        Ok(())
    }
}
