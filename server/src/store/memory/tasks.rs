//! Where tasks are, and what their time has come for.

use std::sync::atomic::Ordering;

use super::{Line, Queue, Spot, Task, size_of_task};
use crate::store::{Millis, NewTask, Past, Setting, Sight, TaskId};

impl Queue {
    pub(super) fn add(&mut self, task: NewTask, now: Millis) {
        let id = task.id;
        let due = task.due.map_or(now, |due| due.at(now));
        let new = Past { inserted_at: now, ..Past::default() };
        let Past { inserted_at, deliveries, failures, expiries, last_error, death } =
            task.past.as_deref().cloned().unwrap_or(new);
        let cause = death.map(|(_, cause)| cause);
        let (spot, cancelled) = (Spot::Ready(0), false);
        let task = Task { task, inserted_at, deliveries, failures, expiries, last_error, cause, spot, cancelled };
        if let Some(key) = task.plan().unique_key.filter(|_| death.is_none()) {
            self.unique.insert(key, id);
        }
        self.tasks.insert(id, task);
        match death {
            Some((died_at, _)) => self.bury(id, died_at),
            None if due <= now => self.put_at_tail(id),
            None => self.schedule(id, due),
        }
    }

    /// It is ready now.
    pub(super) fn put_at_tail(&mut self, id: TaskId) {
        self.make_ready(id, Line::next_at_tail);
    }

    pub(super) fn put_at_head(&mut self, id: TaskId) {
        self.make_ready(id, Line::next_at_head);
    }

    fn make_ready(&mut self, id: TaskId, next: fn(&Line) -> i64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let line = &mut self.ready[usize::from(task.plan().priority)];
        let place = next(line);
        line.0.insert(place, id);
        task.spot = Spot::Ready(place);
        self.ends.extend(task.ends_at().map(|at| (at, id)));
    }

    pub(super) fn schedule(&mut self, id: TaskId, due: Millis) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        self.scheduled_count += 1;
        self.scheduled.insert((due, self.scheduled_count, id));
        task.spot = Spot::Scheduled(due, self.scheduled_count);
        self.ends.extend(task.ends_at().map(|at| (at, id)));
    }

    /// It is a dead letter, and its key is free.
    pub(super) fn bury(&mut self, id: TaskId, died_at: Millis) {
        self.free_key(id);
        self.dead.insert((died_at, id));
        if let Some(task) = self.tasks.get_mut(&id) {
            task.spot = Spot::Dead(died_at);
        }
    }

    /// It is where it was no more.
    pub(super) fn take_out(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        if let Some(at) = task.ends_at() {
            self.ends.remove(&(at, id));
        }
        match task.spot {
            Spot::Ready(place) => drop(self.ready[usize::from(task.plan().priority)].0.remove(&place)),
            Spot::Scheduled(due, order) => drop(self.scheduled.remove(&(due, order, id))),
            Spot::Dead(died_at) => drop(self.dead.remove(&(died_at, id))),
            Spot::Leased(token) => drop(self.end_lease(&token)),
        }
    }

    /// It is gone.
    pub(super) fn remove(&mut self, id: TaskId) {
        self.take_out(id);
        self.free_key(id);
        if let Some(task) = self.tasks.remove(&id) {
            self.used.fetch_sub(size_of_task(&task.task), Ordering::Relaxed);
        }
    }

    pub(super) fn expire(&mut self, id: TaskId) {
        self.expired_count += 1;
        self.remove(id);
    }

    /// The task that has a unique key. One that will never be delivered, because its time is over, goes and has none.
    pub(super) fn holder_of_key(&mut self, key: &str, now: Millis) -> Option<TaskId> {
        let id = *self.unique.get(key)?;
        let ends_at = self.tasks.get(&id)?.ends_at();
        if ends_at.is_some_and(|at| at <= now && self.ends.contains(&(at, id))) {
            self.expire(id);
            return None;
        }
        Some(id)
    }

    fn free_key(&mut self, id: TaskId) {
        if let Some(key) = self.tasks.get(&id).and_then(|task| task.plan().unique_key)
            && self.unique.get(&key) == Some(&id)
        {
            self.unique.remove(&key);
        }
    }

    /// Does what its time has come for: tasks whose time is over go, leases that ran out are taken back, and what is due is
    /// put at the tail. Answers how many tasks became ready.
    pub(super) fn reclaim(&mut self, now: Millis) -> u64 {
        self.acked.forget(now);
        self.requests.forget(now);
        while let Some((_, id)) = self.ends.first().copied().filter(|(at, _)| *at <= now) {
            self.expire(id);
        }
        if let Some(kept) = self.settings.get(Setting::DeadLetterRetention) {
            while let Some((_, id)) = self.dead.first().copied().filter(|(died_at, _)| died_at + kept <= now) {
                self.expire(id);
            }
        }
        self.take_back(now) + self.make_due_ready(now)
    }

    fn make_due_ready(&mut self, now: Millis) -> u64 {
        let mut count = 0;
        while let Some((due, order, id)) = self.scheduled.first().copied().filter(|(due, ..)| *due <= now) {
            self.scheduled.remove(&(due, order, id));
            self.put_at_tail(id);
            count += 1;
        }
        count
    }

    pub(super) fn ready_count(&self) -> u64 {
        self.ready.iter().map(|ready| ready.0.len() as u64).sum()
    }

    /// As callers see it, who could pop so many.
    pub(super) fn can_be_popped(&self) -> u64 {
        if self.settings.paused() { 0 } else { self.ready_count() }
    }

    pub(super) fn due_in(&self, now: Millis) -> Option<Millis> {
        let first_lease = self.deadlines.first().map(|(deadline, ..)| *deadline);
        let first_due = self.scheduled.first().map(|(due, ..)| *due);
        let next = first_lease.into_iter().chain(first_due).min().filter(|_| !self.settings.paused());
        next.map(|at| at.saturating_sub(now))
    }

    pub(super) fn sight(&mut self, now: Millis) -> Sight {
        let reclaimed = self.reclaim(now);
        Sight { ready: self.can_be_popped(), due_in: self.due_in(now), reclaimed }
    }
}
