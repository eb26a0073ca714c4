//! What a queue remembers of producers. Where each stands is known in memory; what it was answered is in the file, and read
//! when it is asked for again.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    memories::Sweeper,
    requests::{ids_from_bytes, ids_to_bytes},
    tables::{Sql, Tables},
    turn::{Step, Turn},
};
use crate::store::{Fingerprint, Inserted, Millis, NumberedInsert, PRODUCER_ANSWERS, Remember, StoreError};

/// Answers that are too old are deleted from the file when there are so many of them.
const DELETED_AT_ONCE: u64 = 256;
/// How many producers one step forgets because they were quiet for long, at most.
const FORGOTTEN_AT_ONCE: usize = 64;

/// Where a producer stands.
pub(super) struct Producer {
    pub(super) key: i64,
    /// Its last number.
    pub(super) last: u64,
    /// How many answers it was ever given.
    pub(super) count: u64,
    /// Something new.
    pub(super) inserted_at: Millis,
}

/// The producers of a queue.
pub(super) struct Producers {
    remember: Remember,
    known: HashMap<Arc<str>, Producer>,
    /// Those that are forgotten next come first.
    by_age: BTreeSet<(Millis, Arc<str>)>,
}

impl Producers {
    pub(super) fn new(remember: Remember) -> Self {
        Self { remember, known: HashMap::new(), by_age: BTreeSet::new() }
    }

    /// Puts a producer in as it was read.
    pub(super) fn restore(&mut self, id: String, producer: Producer) {
        let id: Arc<str> = id.into();
        self.by_age.insert((producer.inserted_at, Arc::clone(&id)));
        self.known.insert(id, producer);
    }

    /// Forgets some of those that were quiet for long.
    pub(super) fn forget(&mut self, turn: &mut Turn<'_>) -> Sql<()> {
        for _ in 0..FORGOTTEN_AT_ONCE {
            match self.by_age.first() {
                Some((at, _)) if self.remember.has_forgotten_producer(*at, turn.now) => self.forget_oldest(turn)?,
                _ => break,
            }
        }
        Ok(())
    }

    /// Forgets all of them, whose rows are gone.
    pub(super) fn drop_all(&self, sweeper: &mut Sweeper) {
        self.known.values().for_each(|producer| sweeper.drop_answers(producer.key));
    }

    fn forget_oldest(&mut self, turn: &mut Turn<'_>) -> Sql<()> {
        if let Some((_, id)) = self.by_age.pop_first()
            && let Some(producer) = self.known.remove(&id)
        {
            turn.tables.remove_producer(producer.key)?;
            turn.sweeper.drop_answers(producer.key);
        }
        Ok(())
    }

    /// Whether a producer has not come to this number before, as far as is known.
    pub(super) fn is_new(&self, id: &str, number: u64, now: Millis) -> bool {
        self.known.get(id).is_none_or(|producer| {
            producer.last < number || self.remember.has_forgotten_producer(producer.inserted_at, now)
        })
    }

    /// What an insert was answered the first time.
    pub(super) fn recall(&self, id: &str, insert: &NumberedInsert, tables: Tables<'_>) -> Step<Inserted> {
        let Some(producer) = self.known.get(id) else { return Ok(Err(StoreError::NumberForgotten)) };
        let Some((count, bytes)) = tables.answers(producer.key, insert.number)? else {
            return Ok(Err(StoreError::NumberForgotten));
        };
        let answers: Vec<Answer<'_>> = Answers(&bytes).collect();
        let found = answers.iter().rposition(|answer| answer.number == insert.number);
        // How many answers the producer was given since.
        let since = |at: usize| (producer.count - count) as usize + answers.len() - 1 - at;
        Ok(match found.filter(|at| since(*at) < PRODUCER_ANSWERS).map(|at| &answers[at]) {
            None => Err(StoreError::NumberForgotten),
            Some(answer) if answer.fingerprint != insert.fingerprint => Err(StoreError::RequestIdReused),
            Some(answer) => {
                let mut inserted = ids_from_bytes(answer.ids.to_vec(), false);
                // The tasks of this very call: it runs a second time.
                inserted.replayed = !inserted.ids.iter().zip(&insert.tasks).any(|(id, task)| *id == task.id);
                Ok(inserted)
            }
        })
    }

    /// Notes what inserts are answered that a producer has not numbered before.
    pub(super) fn remember(
        &mut self,
        queue: i64,
        id: &str,
        inserts: &[NumberedInsert],
        inserted: &[Inserted],
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        let Some(last) = inserts.last().map(|insert| insert.number) else { return Ok(()) };
        if self.is_forgotten(id, turn.now) {
            self.meet(queue, id, turn)?;
        }
        let Some((id, mut producer)) = self.known.remove_entry(id) else { return Ok(()) };
        let (before, now) = (producer.count, turn.now);
        self.by_age.remove(&(producer.inserted_at, Arc::clone(&id)));
        self.by_age.insert((now, Arc::clone(&id)));
        producer = Producer { last, count: before + inserts.len() as u64, inserted_at: now, ..producer };
        turn.tables.add_answers(producer.key, last, producer.count, now, &to_bytes(inserts, inserted))?;
        if before / DELETED_AT_ONCE != producer.count / DELETED_AT_ONCE {
            let old = producer.count.saturating_sub(PRODUCER_ANSWERS as u64);
            turn.tables.remove_answers(producer.key, old)?;
        }
        self.known.insert(id, producer);
        Ok(())
    }

    fn is_forgotten(&self, id: &str, now: Millis) -> bool {
        let forgotten = |producer: &Producer| self.remember.has_forgotten_producer(producer.inserted_at, now);
        self.known.get(id).is_none_or(forgotten)
    }

    /// Makes room for a new one, and for one of the same name it forgets all others that were quiet for as long.
    fn meet(&mut self, queue: i64, id: &str, turn: &mut Turn<'_>) -> Sql<()> {
        while self.known.contains_key(id) || self.known.len() as u64 >= self.remember.producers() {
            self.forget_oldest(turn)?;
        }
        let key = *turn.next_producer;
        *turn.next_producer += 1;
        turn.tables.add_producer(key, queue, id)?;
        self.restore(id.to_owned(), Producer { key, last: 0, count: 0, inserted_at: turn.now });
        Ok(())
    }
}

fn to_bytes(inserts: &[NumberedInsert], inserted: &[Inserted]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (NumberedInsert { number, fingerprint, .. }, inserted) in inserts.iter().zip(inserted) {
        let ids = ids_to_bytes(inserted);
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&fingerprint.0);
        bytes.extend_from_slice(&u32::try_from(ids.len()).unwrap_or(u32::MAX).to_be_bytes());
        ids.iter().for_each(|id| bytes.extend_from_slice(id));
    }
    bytes
}

struct Answer<'b> {
    number: u64,
    fingerprint: Fingerprint,
    ids: &'b [[u8; 16]],
}

/// Reads what [`to_bytes`] has written.
struct Answers<'b>(&'b [u8]);

impl<'b> Iterator for Answers<'b> {
    type Item = Answer<'b>;

    fn next(&mut self) -> Option<Answer<'b>> {
        let (number, rest) = self.0.split_first_chunk()?;
        let (fingerprint, rest) = rest.split_first_chunk()?;
        let (count, rest) = rest.split_first_chunk()?;
        let (ids, rest) = rest.split_at_checked(u32::from_be_bytes(*count) as usize * 16)?;
        self.0 = rest;
        let (number, fingerprint) = (u64::from_be_bytes(*number), Fingerprint(*fingerprint));
        Some(Answer { number, fingerprint, ids: ids.as_chunks().0 })
    }
}
