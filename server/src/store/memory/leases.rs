//! Deliveries, and what becomes of them.

use super::{Answered, Back, Call, Lease, Line, Queue, Request, Spot, Withdrawn};
use crate::store::{
    Beaten, Cause, Leased, Millis, Outcome, Pop, Popped, RECLAIM_STEP, Release, Released, RequestKey, StoreError,
    Token, WITHDRAWN_FOR, Withdrawal, holders::Holders,
};

fn tokens_answered(answered: &Answered) -> &[Token] {
    match answered {
        Answered::Popped(tokens) => tokens,
        Answered::Inserted(_) => &[],
    }
}

impl Queue {
    pub(super) fn pop(&mut self, pop: Pop, withdrawn: &Withdrawn, now: Millis) -> Result<Popped, StoreError> {
        let mut known = Vec::new();
        if let Some(request) = &pop.request
            && let Some(first) = self.requests.get(&(Call::Pop, request.key.id.clone()), now)
            && let Answered::Popped(tokens) = &first.answered
        {
            if first.fingerprint != request.key.fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            known.clone_from(tokens);
        }
        let is_known = !known.is_empty();
        let acks = self.ack(&pop.acks, now);
        let reclaimed = self.reclaim(now);
        if pop.consumer.is_some_and(|consumer| self.sessions.has_another_stream(consumer, now)) {
            let ready = self.can_be_popped();
            return Ok(Popped {
                acks,
                tasks: Vec::new(),
                ready,
                reclaimed,
                due_in: None,
                taken_over: true,
                known: false,
            });
        }
        if withdrawn.get(&pop.stem).is_some_and(|until| now < *until) {
            let (ready, due_in) = (self.can_be_popped(), self.due_in(now));
            return Ok(Popped {
                acks,
                tasks: Vec::new(),
                ready,
                reclaimed,
                due_in,
                taken_over: false,
                known: is_known,
            });
        }

        let holder = pop.request.as_ref().map(|request| request.attempt);
        let is_held = |token: &Token| self.leases.contains_key(token);
        let mut held: Vec<Token> = known.into_iter().filter(is_held).collect();
        if held.is_empty() {
            held = (0..pop.max_tasks).map(|position| pop.stem.token(position as u16)).filter(is_held).collect();
        }
        if held.is_empty() {
            held = self.lease_from_head(&pop, now);
            if let Some(request) = pop.request.filter(|_| !held.is_empty()) {
                let RequestKey { id, fingerprint } = request.key;
                let answered = Answered::Popped(held.clone());
                self.requests.put((Call::Pop, id), Request { fingerprint, answered }, now);
            }
        }
        for token in &held {
            if let Some(lease) = self.leases.get_mut(token) {
                lease.holders.add(holder);
            }
        }
        let tasks: Vec<Leased> = held.iter().filter_map(|token| self.leased(*token, now)).collect();
        let due_in = if tasks.is_empty() { self.due_in(now) } else { None };
        Ok(Popped { acks, tasks, ready: self.can_be_popped(), reclaimed, due_in, taken_over: false, known: is_known })
    }

    fn lease_from_head(&mut self, pop: &Pop, now: Millis) -> Vec<Token> {
        let (mut held, mut bytes) = (Vec::new(), 0);
        let span = pop.lease.unwrap_or(self.rules().lease);
        while held.len() < pop.max_tasks
            && bytes < pop.max_bytes.max(1)
            && !self.settings.paused()
            && let Some(id) = self.ready.iter_mut().rev().find_map(Line::pop_front)
        {
            let token = pop.stem.token(held.len() as u16);
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            if let Some(at) = task.ends_at() {
                self.ends.remove(&(at, id));
            }
            task.spot = Spot::Leased(token);
            bytes += task.task.envelope.len();
            self.delivered += 1;
            let lease = Lease {
                id,
                order: self.delivered,
                renewed_at: now,
                deadline: now + span,
                length: span,
                holders: Holders::default(),
                session: pop.consumer.map(|consumer| consumer.session),
            };
            self.deadlines.insert((lease.deadline, lease.order, token));
            self.leases.insert(token, lease);
            held.push(token);
        }
        if let Some(consumer) = pop.consumer.filter(|_| !held.is_empty()) {
            let first = self.delivered - held.len() as u64;
            self.sessions.take(consumer, now).extend((first + 1..).zip(held.iter().copied()));
        }
        held
    }

    /// Moves a deadline to now + `lease`, and never to an earlier time. Answers the lease.
    pub(super) fn extend(&mut self, token: &Token, lease: Millis, now: Millis) -> Option<&mut Lease> {
        let held = self.leases.get_mut(token)?;
        self.deadlines.remove(&(held.deadline, held.order, *token));
        held.deadline = held.deadline.max(now + lease);
        held.length = held.deadline.saturating_sub(now);
        self.deadlines.insert((held.deadline, held.order, *token));
        Some(held)
    }

    /// A delivery as its holder sees it. The lease itself is the delivery that is not counted yet.
    fn leased(&self, token: Token, now: Millis) -> Option<Leased> {
        let lease = self.leases.get(&token)?;
        let task = self.tasks.get(&lease.id)?;
        Some(Leased {
            token,
            id: lease.id,
            envelope: task.task.envelope.clone(),
            inserted_at: task.inserted_at,
            deliveries: task.deliveries + 1,
            failures: task.failures,
            expiries: task.expiries,
            left: lease.deadline.saturating_sub(now),
            expires_at: lease.deadline,
        })
    }

    pub(super) fn ack(&mut self, tokens: &[Token], now: Millis) -> Vec<Outcome> {
        let ack_one = |token: &Token| match self.end_lease(token) {
            Some(lease) => {
                self.remove(lease.id);
                self.acked_count += 1;
                self.acked.put(*token, (), now);
                Outcome::Applied
            }
            None => self.not_held(token, now),
        };
        tokens.iter().map(ack_one).collect()
    }

    pub(super) fn not_held(&self, token: &Token, now: Millis) -> Outcome {
        if self.acked.get(token, now).is_some() { Outcome::AlreadyAcked } else { Outcome::LeaseLost }
    }

    pub(super) fn heartbeat(&mut self, tokens: &[Token], lease: Option<Millis>, now: Millis) -> Beaten {
        let lease = lease.unwrap_or(self.rules().lease);
        let mut earliest: Option<Millis> = None;
        let beat = |token: &Token| {
            let Some(held) = self.extend(token, lease, now) else { return self.not_held(token, now) };
            held.renewed_at = now;
            earliest = Some(earliest.map_or(held.deadline, |other| other.min(held.deadline)));
            Outcome::Applied
        };
        let outcomes = tokens.iter().map(beat).collect();
        let earliest = earliest.map(|deadline| (deadline.saturating_sub(now), deadline));
        Beaten { outcomes, earliest, cancelled: self.cancelled(tokens) }
    }

    /// Of these tokens, those whose tasks are to be deleted.
    pub(super) fn cancelled(&self, tokens: &[Token]) -> Vec<Token> {
        let mut cancelled = Vec::new();
        for token in tokens {
            let task = self.leases.get(token).and_then(|lease| self.tasks.get(&lease.id));
            if task.is_some_and(|task| task.cancelled) && !cancelled.contains(token) {
                cancelled.push(*token);
            }
        }
        cancelled
    }

    pub(super) fn release(&mut self, release: Release, now: Millis) -> (Vec<Outcome>, Released) {
        let (tokens, unsent, back) = match release {
            Release::PutBack(put_back) => (put_back.tokens.clone(), None, Back::Put(put_back)),
            Release::Unsent(tokens, holder) => (tokens, Some(holder), Back::Unsent),
        };
        let mut ended = Vec::new();
        let mut outcomes = Vec::new();
        for token in &tokens {
            let mine = |lease: &mut Lease| unsent.is_none_or(|attempt| lease.holders.disown(attempt));
            outcomes.push(match self.leases.get_mut(token).map(mine) {
                Some(true) => Outcome::Applied,
                Some(false) => Outcome::LeaseLost,
                None => self.not_held(token, now),
            });
            if outcomes.last() == Some(&Outcome::Applied) {
                ended.extend(self.end_lease(token));
            }
        }
        (outcomes, self.give_back(ended, &back, now))
    }

    pub(super) fn withdraw(&mut self, withdrawal: Withdrawal, withdrawn: &mut Withdrawn, now: Millis) -> u64 {
        withdrawn.retain(|_, until| now < *until);
        withdrawn.insert(withdrawal.stem, now + WITHDRAWN_FOR);
        let mut tokens: Vec<Token> =
            (0..withdrawal.max_tasks).map(|position| withdrawal.stem.token(position as u16)).collect();
        let attempt = withdrawal.request.as_ref().map(|request| request.attempt);
        if let Some(request) = withdrawal.request
            && let Some(first) = self.requests.get(&(Call::Pop, request.key.id), now)
        {
            // It may have been answered with what an earlier try had leased.
            tokens.extend(tokens_answered(&first.answered).iter().copied());
        }
        self.release(Release::Unsent(tokens, attempt), now).1.put_back
    }

    pub(super) fn release_held(&mut self, held_for: Millis, now: Millis) -> Released {
        let old = |lease: &Lease| now.saturating_sub(lease.renewed_at) >= held_for;
        let tokens: Vec<Token> = self.leases.iter().filter(|(_, lease)| old(lease)).map(|(token, _)| *token).collect();
        let ended: Vec<Lease> = tokens.iter().filter_map(|token| self.end_lease(token)).collect();
        self.give_back(ended, &Back::RanOut, now)
    }

    pub(super) fn take_back(&mut self, now: Millis) -> u64 {
        let mut count = 0;
        let last_expired = (now, u64::MAX, Token([u8::MAX; 16]));
        loop {
            let expired = self.deadlines.range(..=last_expired).rev();
            let step: Vec<Token> = expired.take(RECLAIM_STEP).map(|(.., token)| *token).collect();
            if step.is_empty() {
                return count;
            }
            let ended: Vec<Lease> = step.iter().filter_map(|token| self.end_lease(token)).collect();
            count += self.give_back(ended, &Back::RanOut, now).ready;
        }
    }

    pub(super) fn end_lease(&mut self, token: &Token) -> Option<Lease> {
        let lease = self.leases.remove(token)?;
        self.deadlines.remove(&(lease.deadline, lease.order, *token));
        if let Some(session) = lease.session {
            self.sessions.end(session, (lease.order, *token));
        }
        Some(lease)
    }

    /// Where a task goes whose lease has ended, one after the other in the order of delivery; those for the head come in the
    /// opposite order, as each is put in front.
    fn give_back(&mut self, mut ended: Vec<Lease>, back: &Back, now: Millis) -> Released {
        ended.sort_by_key(|lease| lease.order);
        let rules = self.rules();
        let (mut released, mut to_head) = (Released::default(), Vec::new());
        for (nth, Lease { id, .. }) in ended.into_iter().enumerate() {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            task.deliveries += u32::from(!matches!(back, Back::Unsent));
            task.expiries += u32::from(matches!(back, Back::RanOut));
            let mut delay = None;
            let is_last = matches!(back, Back::RanOut) && task.expiries >= rules.max_expiries;
            task.cause = is_last.then_some(Cause::Expiries);
            if let Back::Put(put_back) = back {
                task.failures += u32::from(put_back.failed);
                let backoff = || rules.backoff.after(task.failures, put_back.chance, nth);
                delay = put_back.delay.or_else(|| put_back.failed.then(backoff));
                let is_last = put_back.failed && task.failures >= rules.max_failures;
                task.cause = is_last.then_some(Cause::Failures).or(put_back.dead_letter.then_some(Cause::Rejected));
                if put_back.failed || put_back.dead_letter {
                    task.last_error.clone_from(&put_back.reason);
                }
            }
            if task.cancelled {
                self.deleted_count += 1;
                self.remove(id);
            } else if task.cause.is_some() {
                released.dead_lettered += 1;
                self.bury(id, now);
            } else if task.ends_at().is_some_and(|at| at <= now) {
                self.expire(id);
            } else if let Some(delay) = delay.filter(|delay| *delay > 0) {
                released.put_back += 1;
                self.schedule(id, now + delay);
            } else {
                to_head.push(id);
            }
        }
        released.put_back += to_head.len() as u64;
        released.ready = to_head.len() as u64;
        to_head.into_iter().rev().for_each(|id| self.put_at_head(id));
        released
    }
}
