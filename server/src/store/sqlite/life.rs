//! What becomes of a task with time: it falls due, its lease runs out, it is given up, its time is over. The order in which that
//! is done is that of the store in memory.

use std::sync::Arc;

use super::{
    queue::{Lease, Planned, Queue},
    tables::{At, Sql, Tries},
    turn::Turn,
};
use crate::store::{Cause, Millis, NewTask, Past, PutBack, RECLAIM_STEP, Released, Setting, TaskId, Token};

/// How a lease ended, other than by an ack.
pub(super) enum Back<'r> {
    Put(&'r PutBack),
    /// As if the task had not been delivered.
    Unsent,
    /// It ran out, or was taken back for its age.
    RanOut,
}

impl Queue {
    /// Of a new task that is not like most.
    pub(super) fn put_in_its_place(&mut self, task: i64, new: &NewTask, turn: &mut Turn<'_>) -> Sql<()> {
        let mut planned = Planned::default();
        let inserted_at = new.past.as_ref().map_or(turn.now, |past| past.inserted_at);
        if let Some(plan) = &new.plan {
            planned = Planned {
                priority: plan.priority,
                ends_at: plan.ttl.map(|ttl| inserted_at.saturating_add(ttl)),
                unique_key: plan.unique_key.as_deref().map(Arc::from),
            };
            turn.tables.add_plan(task, &planned)?;
        }
        if let Some(past) = &new.past {
            self.add_past(task, past, turn)?;
            if let Some((died_at, cause)) = past.death {
                self.bytes = self.bytes.saturating_sub(new.envelope.len() as u64);
                self.add_dead(task, new.id, (died_at, cause), turn)?;
                if new.plan.is_some() {
                    self.plans.insert(task, planned);
                }
                return Ok(());
            }
        }
        let due = new.due.map_or(turn.now, |due| due.at(turn.now));
        if due > turn.now {
            // The task's key is its place: tasks of one insert keep their order.
            self.scheduled.insert((due, task, task));
            turn.tables.add_scheduled(task, due, task)?;
        } else {
            self.ready.push_back(planned.priority, task);
        }
        self.ends.extend(planned.ends_at.map(|at| (at, task)));
        self.unique.extend(planned.unique_key.clone().map(|key| (key, new.id)));
        if new.plan.is_some() {
            self.plans.insert(task, planned);
        }
        Ok(())
    }

    /// Of a new task, what it has behind it that counts on. Its key is its place.
    fn add_past(&mut self, task: i64, past: &Past, turn: &Turn<'_>) -> Sql<()> {
        let Past { deliveries, failures, expiries, .. } = *past;
        let has_error = !past.last_error.is_empty();
        if (deliveries, failures, expiries, has_error) == (0, 0, 0, false) {
            return Ok(());
        }
        if has_error {
            turn.tables.save_error(task, &past.last_error)?;
        }
        let tries = Tries { position: task, deliveries, failures, expiries, has_error };
        self.tries.insert(task, tries);
        turn.tables.save_tries(task, tries)
    }

    /// It is held now, and may be finished though its time is over.
    pub(super) fn stop_the_end(&mut self, task: i64) {
        if let Some(at) = self.plans.get(&task).and_then(|plan| plan.ends_at) {
            self.ends.remove(&(at, task));
        }
    }

    fn priority(&self, task: i64) -> u8 {
        self.plans.get(&task).map_or(0, |plan| plan.priority)
    }

    /// The task that has a unique key. One that will never be delivered, because its time is over, goes and has none.
    pub(super) fn holder_of_key(&mut self, key: &str, turn: &Turn<'_>) -> Sql<Option<TaskId>> {
        let Some(id) = self.unique.get(key).copied() else { return Ok(None) };
        let ended = self.ids.get(&id).copied().filter(|task| {
            let ends_at = self.plans.get(task).and_then(|plan| plan.ends_at);
            ends_at.is_some_and(|at| at <= turn.now && self.ends.contains(&(at, *task)))
        });
        let Some(task) = ended else { return Ok(Some(id)) };
        if !turn.unreadable.contains(task) {
            self.ever.expired += 1;
            self.take_away(task, turn)?;
        }
        Ok(None)
    }

    pub(super) fn free_key(&mut self, task: i64, id: TaskId) {
        if let Some(key) = self.plans.get(&task).and_then(|plan| plan.unique_key.as_ref())
            && self.unique.get(key) == Some(&id)
        {
            self.unique.remove(key);
        }
    }

    /// It is gone. It was taken out of where it stood; `size` is what it counted as a task that lives.
    pub(super) fn remove(&mut self, task: i64, id: TaskId, size: u64, turn: &Turn<'_>) -> Sql<()> {
        if let Some(tries) = self.tries.remove(&task) {
            turn.tables.remove_tries(task)?;
            if tries.has_error {
                turn.tables.remove_error(task)?;
            }
        }
        if id.has_plan() {
            self.free_key(task, id);
            self.plans.remove(&task);
            turn.tables.remove_plan(task)?;
        }
        if !self.cancelled.is_empty() && self.cancelled.remove(&task) {
            turn.tables.remove_cancelled(task)?;
        }
        self.bytes = self.bytes.saturating_sub(size);
        self.ids.remove(&id);
        self.gone_now.push(task);
        self.changed = true;
        Ok(())
    }

    /// It goes, wherever it stands. If it is held, its holder has lost it.
    pub(super) fn take_away(&mut self, task: i64, turn: &Turn<'_>) -> Sql<()> {
        let spot = turn.tables.spot(task)?;
        if spot.id.has_plan() {
            self.stop_the_end(task);
        }
        let mut size = spot.size;
        match spot.at {
            At::Ready => {
                let place = self.place(task);
                self.ready.remove(self.priority(task), task, place);
            }
            At::Scheduled(due, place) => {
                self.scheduled.remove(&(due, place, task));
                turn.tables.remove_scheduled(task)?;
            }
            // Its row goes with that of the task.
            At::Leased(token) => drop(self.forget_lease(&token)),
            At::Dead(died_at, _) => {
                size = 0;
                self.dead.remove(&(died_at, spot.id));
                turn.tables.remove_dead(task)?;
            }
        }
        self.remove(task, spot.id, size, turn)
    }

    /// Where a task that is ready stands.
    pub(super) fn place(&self, task: i64) -> i64 {
        self.tries.get(&task).map_or(task, |tries| tries.position)
    }

    /// It is ready now, at the tail.
    pub(super) fn make_ready(&mut self, task: i64, turn: &mut Turn<'_>) -> Sql<()> {
        let position = turn.next_number();
        let tries = self.tries.entry(task).or_default();
        tries.position = position;
        turn.tables.save_tries(task, *tries)?;
        self.ready.push_back(self.priority(task), task);
        Ok(())
    }

    /// Does what its time has come for, as much of it as one transaction should: tasks whose time is over go, leases that ran
    /// out are taken back, and what is due is put at the tail. Answers how many tasks became ready.
    pub(super) fn reclaim(&mut self, turn: &mut Turn<'_>) -> Sql<u64> {
        self.acked.forget(self.key, turn.now, turn.sweeper);
        self.requests.forget(self.key, turn.now, turn.sweeper);
        self.producers.forget(turn)?;
        while *turn.reclaims > 0
            && let Some(task) = self.next_to_end(turn)
        {
            *turn.reclaims -= 1;
            self.ever.expired += 1;
            self.take_away(task, turn)?;
        }
        Ok(self.take_back(turn)? + self.make_due_ready(turn)?)
    }

    /// Whether a transaction has left something that the time has come for.
    pub(super) fn is_behind(&self, turn: &Turn<'_>) -> bool {
        let has_come = |time: Option<Millis>| time.is_some_and(|time| time <= turn.now);
        *turn.reclaims == 0
            && (has_come(self.deadlines.first().map(|(at, ..)| *at))
                || has_come(self.scheduled.first().map(|(at, ..)| *at))
                || self.next_to_end(turn).is_some())
    }

    /// Whether tasks whose time is over may still stand in a line.
    pub(super) fn has_ended(&self, turn: &Turn<'_>) -> bool {
        let mut ended = self.ends.iter().take_while(|(at, _)| *at <= turn.now);
        *turn.reclaims == 0 && ended.any(|(_, task)| !turn.unreadable.contains(*task))
    }

    /// Whether a dead letter is kept that died at a time.
    pub(super) fn is_kept(&self, died_at: Millis, now: Millis) -> bool {
        let kept = self.settings.get(Setting::DeadLetterRetention);
        kept.is_none_or(|kept| died_at.saturating_add(kept) > now)
    }

    /// A task whose time is over, or that was dead for as long as it is kept.
    fn next_to_end(&self, turn: &Turn<'_>) -> Option<i64> {
        let ended = self.ends.iter().take_while(|(at, _)| *at <= turn.now).map(|(_, task)| *task);
        let is_old = |died_at| !self.is_kept(died_at, turn.now);
        let old = self.dead.iter().take_while(|(died_at, _)| is_old(*died_at));
        let old = old.filter_map(|(_, id)| self.ids.get(id).copied());
        ended.chain(old).find(|task| !turn.unreadable.contains(*task))
    }

    fn take_back(&mut self, turn: &mut Turn<'_>) -> Sql<u64> {
        let mut count = 0;
        let last_expired = (turn.now, u64::MAX, Token([u8::MAX; 16]));
        while *turn.reclaims > 0 {
            let expired = self.deadlines.range(..=last_expired).rev();
            let step: Vec<Token> = expired.take(RECLAIM_STEP).map(|(.., token)| *token).collect();
            *turn.reclaims = turn.reclaims.saturating_sub(step.len());
            let mut ended = Vec::with_capacity(step.len());
            for token in &step {
                ended.extend(self.end_lease(token, turn)?);
            }
            count += self.give_back(ended, &Back::RanOut, turn)?.ready;
            if step.len() < RECLAIM_STEP {
                break;
            }
        }
        Ok(count)
    }

    fn make_due_ready(&mut self, turn: &mut Turn<'_>) -> Sql<u64> {
        let mut count = 0;
        while *turn.reclaims > 0
            && let Some((due, place, task)) = self.scheduled.first().copied().filter(|(due, ..)| *due <= turn.now)
        {
            *turn.reclaims -= 1;
            self.scheduled.remove(&(due, place, task));
            turn.tables.remove_scheduled(task)?;
            self.make_ready(task, turn)?;
            count += 1;
        }
        Ok(count)
    }

    /// Where tasks go whose leases have ended, one after the other in the order of delivery; those for the head are put there in
    /// the opposite order, each before the other.
    pub(super) fn give_back(&mut self, mut ended: Vec<Lease>, back: &Back<'_>, turn: &mut Turn<'_>) -> Sql<Released> {
        ended.sort_unstable_by_key(|lease| lease.order);
        // As many places before all others, though not all of them may be taken.
        self.front -= ended.len() as i64;
        let (mut released, mut to_head) = (Released::default(), Vec::with_capacity(ended.len()));
        for (nth, lease) in ended.into_iter().enumerate() {
            let Lease { task, id, size, .. } = lease;
            let (cause, delay) = self.count(task, nth, back, turn)?;
            let plan = if id.has_plan() { self.plans.get(&task) } else { None };
            let (priority, ends_at) = plan.map_or((0, None), |plan| (plan.priority, plan.ends_at));
            if !self.cancelled.is_empty() && self.cancelled.contains(&task) {
                self.ever.deleted += 1;
                self.remove(task, id, size, turn)?;
            } else if let Some(cause) = cause {
                released.dead_lettered += 1;
                self.bury(&lease, cause, turn)?;
            } else if ends_at.is_some_and(|at| at <= turn.now) {
                self.ever.expired += 1;
                self.remove(task, id, size, turn)?;
            } else {
                self.ends.extend(ends_at.map(|at| (at, task)));
                released.put_back += 1;
                match delay.filter(|delay| *delay > 0) {
                    Some(delay) => self.schedule(task, turn.now.saturating_add(delay), turn)?,
                    None => to_head.push((priority, task)),
                }
            }
        }
        released.ready = to_head.len() as u64;
        to_head.into_iter().rev().for_each(|(priority, task)| self.ready.push_front(priority, task));
        Ok(released)
    }

    /// Counts and notes how a lease ended. Answers why its task is given up, if it is, and how long it has to wait.
    fn count(
        &mut self,
        task: i64,
        nth: usize,
        back: &Back<'_>,
        turn: &Turn<'_>,
    ) -> Sql<(Option<Cause>, Option<Millis>)> {
        let tries = self.tries.entry(task).or_default();
        tries.position = self.front + nth as i64;
        tries.deliveries += u32::from(!matches!(back, Back::Unsent));
        tries.expiries += u32::from(matches!(back, Back::RanOut));
        let (mut cause, mut delay) = (None, None);
        if let Back::Put(put_back) = back {
            tries.failures += u32::from(put_back.failed);
            let backoff = || self.rules.backoff.after(tries.failures, put_back.chance, nth);
            delay = put_back.delay.or_else(|| put_back.failed.then(backoff));
            let is_last = put_back.failed && tries.failures >= self.rules.max_failures;
            cause = is_last.then_some(Cause::Failures).or(put_back.dead_letter.then_some(Cause::Rejected));
            if put_back.failed || put_back.dead_letter {
                match put_back.reason.as_str() {
                    "" if tries.has_error => turn.tables.remove_error(task)?,
                    "" => {}
                    reason => turn.tables.save_error(task, reason)?,
                }
                tries.has_error = !put_back.reason.is_empty();
            }
        } else if matches!(back, Back::RanOut) && tries.expiries >= self.rules.max_expiries {
            cause = Some(Cause::Expiries);
        }
        turn.tables.save_tries(task, *tries)?;
        Ok((cause, delay))
    }

    fn schedule(&mut self, task: i64, due: Millis, turn: &mut Turn<'_>) -> Sql<()> {
        let place = turn.next_number();
        self.scheduled.insert((due, place, task));
        turn.tables.add_scheduled(task, due, place)
    }

    /// It is a dead letter, and its key is free.
    fn bury(&mut self, lease: &Lease, cause: Cause, turn: &Turn<'_>) -> Sql<()> {
        self.free_key(lease.task, lease.id);
        self.bytes = self.bytes.saturating_sub(lease.size);
        self.add_dead(lease.task, lease.id, (turn.now, cause), turn)
    }

    fn add_dead(&mut self, task: i64, id: TaskId, (died_at, cause): (Millis, Cause), turn: &Turn<'_>) -> Sql<()> {
        self.dead.insert((died_at, id));
        turn.tables.add_dead(task, died_at, cause)
    }
}
