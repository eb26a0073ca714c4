//! What goes in.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::{Answer, Answered, Call, Queue, Request, size_of_task};
use crate::store::{
    Insert, Inserted, Millis, NewTask, NumberedInsert, PRODUCER_ANSWERS, Produce, Produced, RequestKey, Setting,
    StoreError, TaskId,
};

impl Queue {
    pub(super) fn insert(&mut self, insert: Insert, now: Millis) -> Result<Inserted, StoreError> {
        if let Some(RequestKey { id, fingerprint }) = &insert.request
            && let Some(first) = self.requests.get(&(Call::Insert, id.clone()), now)
            && let Answered::Inserted(inserted) = &first.answered
        {
            if first.fingerprint != *fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            return Ok(Inserted { replayed: true, ..inserted.clone() });
        }
        let (second_run, inserted) = self.put_in(insert.tasks, now)?;
        if let Some(RequestKey { id, fingerprint }) = insert.request.filter(|_| !second_run) {
            let answered = Answered::Inserted(inserted.clone());
            self.requests.put((Call::Insert, id), Request { fingerprint, answered }, now);
        }
        Ok(inserted)
    }

    /// Puts in all tasks but duplicates. True if it is a second run of the same call, which puts nothing in, even if some of its
    /// tasks are gone by now.
    fn put_in(&mut self, tasks: Vec<NewTask>, now: Millis) -> Result<(bool, Inserted), StoreError> {
        let second_run = tasks.iter().any(|task| self.tasks.contains_key(&task.id));
        if second_run && tasks.iter().any(|task| task.past.is_some()) {
            let ids = tasks.iter().map(|task| task.id).collect();
            return Ok((true, Inserted { ids, replayed: true, ..Inserted::default() }));
        }
        let mut inserted = Inserted::default();
        let mut new: Vec<NewTask> = Vec::new();
        let mut keys: HashMap<String, TaskId> = HashMap::new();
        for (at, task) in tasks.into_iter().enumerate() {
            let key = task.plan.as_ref().filter(|_| !task.is_dead()).and_then(|plan| plan.unique_key.clone());
            let first = key.as_ref().and_then(|key| keys.get(key).copied().or_else(|| self.holder_of_key(key, now)));
            match first.filter(|first| *first != task.id) {
                Some(first) => {
                    inserted.ids.push(first);
                    inserted.duplicates.push(at);
                }
                None => {
                    inserted.ids.push(task.id);
                    keys.extend(key.map(|key| (key, task.id)));
                    new.push(task);
                }
            }
        }
        if second_run {
            return Ok((true, inserted));
        }
        self.check_limits(&new)?;
        let size = new.iter().map(size_of_task).sum::<u64>();
        if self.used.load(Ordering::Relaxed) + size > self.capacity {
            return Err(StoreError::Full(format!("the store in memory holds at most {} bytes", self.capacity)));
        }
        self.used.fetch_add(size, Ordering::Relaxed);
        self.inserted_count += new.len() as u64;
        for task in new {
            self.add(task, now);
        }
        Ok((false, inserted))
    }

    /// Dead letters do not count.
    fn check_limits(&self, new: &[NewTask]) -> Result<(), StoreError> {
        if [Setting::MaxTasks, Setting::MaxBytes].iter().all(|setting| self.settings.get(*setting).is_none()) {
            return Ok(());
        }
        let live = self.tasks.values().filter(|task| task.cause.is_none()).map(|task| &task.task);
        let new = || new.iter().filter(|task| !task.is_dead());
        let (count, bytes) =
            live.chain(new()).fold((0, 0), |(count, bytes), task| (count + 1, bytes + task.envelope.len()));
        for (setting, would_be) in [(Setting::MaxTasks, count), (Setting::MaxBytes, bytes as u64)] {
            if let Some(max) = self.settings.get(setting).filter(|max| would_be > *max && new().count() > 0) {
                return Err(StoreError::QueueFull(setting, max));
            }
        }
        Ok(())
    }

    pub(super) fn produce(&mut self, produce: Produce, now: Millis) -> Produced {
        let remember = self.remember;
        self.producers.retain(|_, producer| !remember.has_forgotten_producer(producer.inserted_at, now));
        let mut produced = Produced::default();
        for insert in produce.inserts {
            let last = self.producers.get(&produce.producer).and_then(|producer| producer.answers.back());
            let inserted = match last {
                Some(last) if insert.number <= last.number => self.answer_again(&produce.producer, &insert),
                _ => self.insert_numbered(&produce.producer, insert, now),
            };
            match inserted {
                Ok(inserted) => produced.inserted.push(inserted),
                Err(refused) => return Produced { refused: Some(refused), ..produced },
            }
        }
        produced
    }

    fn answer_again(&self, producer: &str, insert: &NumberedInsert) -> Result<Inserted, StoreError> {
        let mut answers = self.producers.get(producer).into_iter().flat_map(|producer| &producer.answers);
        let answer = answers.find(|answer| answer.number == insert.number).ok_or(StoreError::NumberForgotten)?;
        if answer.fingerprint != insert.fingerprint {
            return Err(StoreError::RequestIdReused);
        }
        // The tasks of this very call: it runs a second time.
        let replayed = !answer.inserted.ids.iter().zip(&insert.tasks).any(|(id, task)| *id == task.id);
        Ok(Inserted { replayed, ..answer.inserted.clone() })
    }

    fn insert_numbered(&mut self, producer: &str, insert: NumberedInsert, now: Millis) -> Result<Inserted, StoreError> {
        let NumberedInsert { number, fingerprint, tasks } = insert;
        // It may be a second run of the same call, so late that the producer was forgotten meanwhile.
        let (_, inserted) = self.put_in(tasks, now)?;
        if !self.producers.contains_key(producer) {
            while self.producers.len() as u64 >= self.remember.producers()
                && let Some((oldest, _)) = self.producers.iter().min_by_key(|(id, one)| (one.inserted_at, *id))
            {
                let oldest = oldest.clone();
                self.producers.remove(&oldest);
            }
        }
        let producer = self.producers.entry(producer.to_owned()).or_default();
        producer.inserted_at = now;
        producer.answers.push_back(Answer { number, fingerprint, inserted: inserted.clone() });
        if producer.answers.len() > PRODUCER_ANSWERS {
            producer.answers.pop_front();
        }
        Ok(inserted)
    }
}
