//! Deliveries: how leases are made, extended and ended.

use std::collections::BTreeSet;

use super::{
    life::Back,
    queue::{Lease, Queue},
    requests::Call,
    tables::{Hold, Sql, StoredTask},
    turn::{Step, Turn},
};
use crate::store::{
    Attempt, Beaten, Leased, Millis, Outcome, Pop, Popped, Release, Released, Token, WITHDRAWN_FOR, Withdrawal,
    holders::Holders,
};

/// What one transaction did of a pop.
pub(super) struct PopStep {
    pub(super) popped: Popped,
    /// The time has come for more leases and tasks than one transaction sees to, and nothing was popped for that.
    pub(super) more: bool,
}

impl Queue {
    pub(super) fn pop(&mut self, pop: &Pop, anyway: bool, turn: &mut Turn<'_>) -> Step<PopStep> {
        let mut known = Vec::new();
        if let Some(request) = &pop.request {
            match self.recall(Call::Pop, &request.key, turn)? {
                Ok(first) => known = first.unwrap_or_default(),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        let is_known = !known.is_empty();
        let acks = self.ack(&pop.acks, turn)?;
        let reclaimed = self.reclaim(turn)?;
        // What has ended is never delivered, however much of it there is.
        let more = if anyway { self.has_ended(turn) } else { self.is_behind(turn) };
        let taken_over = pop.consumer.is_some_and(|consumer| self.sessions.has_another_stream(consumer, turn.now));
        if taken_over && !more {
            let ready = self.can_be_popped();
            let popped = Popped { acks, tasks: Vec::new(), ready, reclaimed, due_in: None, taken_over, known: false };
            return Ok(Ok(PopStep { popped, more }));
        }
        if more || turn.withdrawn.get(&pop.stem).is_some_and(|until| turn.now < *until) {
            let (ready, due_in) = (self.can_be_popped(), self.due_in(turn.now));
            let popped =
                Popped { acks, tasks: Vec::new(), ready, reclaimed, due_in, taken_over: false, known: is_known };
            return Ok(Ok(PopStep { popped, more }));
        }

        let is_held = |token: &Token| self.leases.contains_key(token);
        let mut held: Vec<Token> = known.into_iter().map(Token).filter(is_held).collect();
        if held.is_empty() {
            held = (0..pop.max_tasks).map(|position| pop.stem.token(position as u16)).filter(is_held).collect();
        }
        let tasks = match held.is_empty() {
            true => self.lease_from_head(pop, turn)?,
            false => self.answer_again(&held, pop, turn)?,
        };
        let due_in = if tasks.is_empty() { self.due_in(turn.now) } else { None };
        let popped =
            Popped { acks, tasks, ready: self.can_be_popped(), reclaimed, due_in, taken_over: false, known: is_known };
        Ok(Ok(PopStep { popped, more: false }))
    }

    fn lease_from_head(&mut self, pop: &Pop, turn: &mut Turn<'_>) -> Sql<Vec<Leased>> {
        if self.ready.is_empty() || self.settings.paused() {
            return Ok(Vec::new());
        }
        let (mut tasks, mut bytes, max_bytes) = (Vec::new(), 0, pop.max_bytes.max(1));
        let (now, session) = (turn.now, pop.consumer.map(|consumer| consumer.session));
        let holders: Vec<Attempt> = pop.request.as_ref().map(|request| request.attempt).into_iter().collect();
        let length = pop.lease.unwrap_or(self.rules.lease);
        let hold = Hold { renewed_at: now, deadline: now + length, length, holders: &holders, session };
        let mut adding = turn.tables.add_leases(&hold)?;
        while tasks.len() < pop.max_tasks
            && bytes < max_bytes
            && let Some((first, last)) = self.ready.run_at_head(pop.max_tasks - tasks.len())
        {
            let found = turn.read_run(first, last, max_bytes - bytes)?;
            if found.is_empty() {
                self.ready.pop_front();
                self.passed_over += 1;
            }
            for (task, stored) in (first..).zip(found) {
                self.ready.pop_front();
                if stored.id.has_plan() {
                    self.stop_the_end(task);
                }
                let size = stored.envelope.len();
                bytes += size;
                let token = pop.stem.token(tasks.len() as u16);
                self.delivered += 1;
                let Hold { renewed_at, deadline, length, .. } = hold;
                let (id, order, holders) = (stored.id, self.delivered, Holders::new(holders.clone()));
                let lease =
                    Lease { id, task, size: size as u64, order, renewed_at, deadline, length, holders, session };
                adding.add(task, &token, order)?;
                tasks.push(self.delivery(token, &lease, stored, now));
                self.index_lease(token, lease);
            }
        }
        if let Some(consumer) = pop.consumer.filter(|_| !tasks.is_empty()) {
            let first = self.delivered - tasks.len() as u64;
            self.sessions.take(consumer, turn.now).extend((first + 1..).zip(tasks.iter().map(|task| task.token)));
        }
        if let Some(request) = pop.request.as_ref().filter(|_| !tasks.is_empty()) {
            let tokens = tasks.iter().map(|task| task.token.0).collect();
            self.remember_request(Call::Pop, &request.key, tokens, turn)?;
        }
        Ok(tasks)
    }

    /// What was leased before is answered to this try too.
    fn answer_again(&mut self, held: &[Token], pop: &Pop, turn: &mut Turn<'_>) -> Sql<Vec<Leased>> {
        let attempt = pop.request.as_ref().map(|request| request.attempt);
        let mut tasks = Vec::with_capacity(held.len());
        for token in held {
            let Some(lease) = self.leases.get_mut(token) else { continue };
            if lease.holders.add(attempt) {
                turn.tables.save_lease(lease)?;
            }
            let Some(stored) = turn.read(lease.task)? else { continue };
            let Some(lease) = self.leases.get(token) else { continue };
            tasks.push(self.delivery(*token, lease, stored, turn.now));
        }
        Ok(tasks)
    }

    /// A delivery as its holder sees it. The lease itself is the delivery that is not counted yet.
    fn delivery(&self, token: Token, lease: &Lease, stored: StoredTask, now: Millis) -> Leased {
        let tries = self.tries.get(&lease.task).copied().unwrap_or_default();
        Leased {
            token,
            id: stored.id,
            envelope: stored.envelope,
            inserted_at: stored.inserted_at,
            deliveries: tries.deliveries + 1,
            failures: tries.failures,
            expiries: tries.expiries,
            left: lease.deadline.saturating_sub(now),
            expires_at: lease.deadline,
        }
    }

    pub(super) fn ack(&mut self, tokens: &[Token], turn: &mut Turn<'_>) -> Sql<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(lease) = self.forget_lease(token) else {
                outcomes.push(self.not_held(token, turn.now));
                continue;
            };
            self.remove(lease.task, lease.id, lease.size, turn)?;
            self.ever.acked += 1;
            self.remember_ack(*token, turn)?;
            outcomes.push(Outcome::Applied);
        }
        Ok(outcomes)
    }

    pub(super) fn not_held(&self, token: &Token, now: Millis) -> Outcome {
        if self.acked.get(token, now).is_some() { Outcome::AlreadyAcked } else { Outcome::LeaseLost }
    }

    pub(super) fn heartbeat(&mut self, tokens: &[Token], lease: Option<Millis>, turn: &mut Turn<'_>) -> Sql<Beaten> {
        let (now, lease) = (turn.now, lease.unwrap_or(self.rules.lease));
        let mut earliest: Option<Millis> = None;
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else {
                outcomes.push(self.not_held(token, now));
                continue;
            };
            held.renewed_at = now;
            let until = held.deadline.max(now + lease);
            move_deadline(&mut self.deadlines, token, held, until, turn)?;
            earliest = Some(earliest.map_or(held.deadline, |other| other.min(held.deadline)));
            outcomes.push(Outcome::Applied);
        }
        let earliest = earliest.map(|deadline| (deadline.saturating_sub(now), deadline));
        Ok(Beaten { outcomes, earliest, cancelled: self.cancelled_of(tokens) })
    }

    /// Of these tokens, those whose tasks are to be deleted.
    pub(super) fn cancelled_of(&self, tokens: &[Token]) -> Vec<Token> {
        let mut cancelled = Vec::new();
        if self.cancelled.is_empty() {
            return cancelled;
        }
        for token in tokens {
            let is_cancelled = self.leases.get(token).is_some_and(|lease| self.cancelled.contains(&lease.task));
            if is_cancelled && !cancelled.contains(token) {
                cancelled.push(*token);
            }
        }
        cancelled
    }

    pub(super) fn release(&mut self, release: &Release, turn: &mut Turn<'_>) -> Sql<(Vec<Outcome>, Released)> {
        let (tokens, unsent, back) = match release {
            Release::PutBack(put_back) => (&put_back.tokens, None, Back::Put(put_back)),
            Release::Unsent(tokens, attempt) => (tokens, Some(*attempt), Back::Unsent),
        };
        let mut ended = Vec::new();
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            outcomes.push(match self.leases.get_mut(token) {
                None => self.not_held(token, turn.now),
                Some(lease) => match unsent {
                    None => Outcome::Applied,
                    Some(attempt) => {
                        let holders = lease.holders.attempts().len();
                        let is_free = lease.holders.disown(attempt);
                        if !is_free && lease.holders.attempts().len() != holders {
                            turn.tables.save_lease(lease)?;
                        }
                        if is_free { Outcome::Applied } else { Outcome::LeaseLost }
                    }
                },
            });
            if outcomes.last() == Some(&Outcome::Applied) {
                ended.extend(self.end_lease(token, turn)?);
            }
        }
        let released = self.give_back(ended, &back, turn)?;
        Ok((outcomes, released))
    }

    pub(super) fn withdraw(&mut self, withdrawal: &Withdrawal, turn: &mut Turn<'_>) -> Sql<u64> {
        let now = turn.now;
        turn.withdrawn.retain(|_, until| now < *until);
        turn.withdrawn.insert(withdrawal.stem, now + WITHDRAWN_FOR);
        let mut tokens: Vec<Token> =
            (0..withdrawal.max_tasks).map(|position| withdrawal.stem.token(position as u16)).collect();
        let attempt = withdrawal.request.as_ref().map(|request| request.attempt);
        if let Some(request) = &withdrawal.request
            && let Some(first) = self.find_request(Call::Pop, &request.key.id, turn)?
        {
            // It may have been answered with what an earlier try had leased.
            tokens.extend(first.answered.into_iter().map(Token));
        }
        Ok(self.release(&Release::Unsent(tokens, attempt), turn)?.1.put_back)
    }

    /// The tokens of leases that were not renewed since, the last delivered first.
    pub(super) fn held_since(&self, since: Millis) -> Vec<Token> {
        let mut held: Vec<(u64, Token)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.renewed_at <= since)
            .map(|(token, lease)| (lease.order, *token))
            .collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.into_iter().map(|(_, token)| token).collect()
    }

    /// Gives those of the tokens back that were not renewed since.
    pub(super) fn release_held(&mut self, tokens: &[Token], since: Millis, turn: &mut Turn<'_>) -> Sql<Released> {
        let mut ended = Vec::new();
        for token in tokens {
            if self.leases.get(token).is_some_and(|lease| lease.renewed_at <= since) {
                ended.extend(self.end_lease(token, turn)?);
            }
        }
        self.give_back(ended, &Back::RanOut, turn)
    }

    pub(super) fn end_lease(&mut self, token: &Token, turn: &Turn<'_>) -> Sql<Option<Lease>> {
        let Some(lease) = self.forget_lease(token) else { return Ok(None) };
        turn.tables.remove_lease(lease.task)?;
        Ok(Some(lease))
    }

    /// Takes a lease out of the index. It is still in the file.
    pub(super) fn forget_lease(&mut self, token: &Token) -> Option<Lease> {
        let lease = self.leases.remove(token)?;
        self.deadlines.remove(&(lease.deadline, lease.order, *token));
        if let Some(session) = lease.session {
            self.sessions.end(session, (lease.order, *token));
        }
        Some(lease)
    }
}

/// What is left of the lease then is what it runs for again after a restart.
pub(super) fn move_deadline(
    deadlines: &mut BTreeSet<(Millis, u64, Token)>,
    token: &Token,
    held: &mut Lease,
    until: Millis,
    turn: &Turn<'_>,
) -> Sql<()> {
    deadlines.remove(&(held.deadline, held.order, *token));
    held.deadline = until;
    held.length = until.saturating_sub(turn.now);
    deadlines.insert((until, held.order, *token));
    turn.tables.save_lease(held)
}
