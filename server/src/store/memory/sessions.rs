//! The sessions of streams, and what a stream does with the leases of its own.

use std::collections::BTreeSet;

use super::Queue;
use crate::store::{Attempt, Consumer, Kept, Millis, Outcome, SESSION_KEPT, Token};

#[derive(Default)]
pub(super) struct Session {
    /// The one that has it; nobody when the store was opened since.
    pub(super) stream: Option<Attempt>,
    /// When it last took a step.
    pub(super) used_at: Millis,
    pub(super) leases: BTreeSet<(u64, Token)>,
}

impl Queue {
    /// True if no other stream has it.
    pub(super) fn has_session(&self, consumer: Consumer, now: Millis) -> bool {
        let session = self.sessions.get(&consumer.session).filter(|session| now < session.used_at + SESSION_KEPT);
        session.and_then(|session| session.stream).is_none_or(|stream| stream == consumer.stream)
    }

    /// The session, which this stream has from now on.
    pub(super) fn session(&mut self, consumer: Consumer, now: Millis) -> &mut Session {
        if self.sessions.get(&consumer.session).is_none_or(|session| now >= session.used_at + SESSION_KEPT) {
            self.sessions.retain(|_, session| now < session.used_at + SESSION_KEPT);
        }
        let session = self.sessions.entry(consumer.session).or_default();
        (session.stream, session.used_at) = (Some(consumer.stream), now);
        session
    }

    pub(super) fn resume(
        &mut self,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
        now: Millis,
    ) -> Vec<(Token, Millis)> {
        let tokens: Vec<Token> = self.session(consumer, now).leases.iter().map(|(_, token)| *token).collect();
        let resume = |token| {
            let age = now.saturating_sub(self.leases.get(&token)?.renewed_at);
            if age < max_hold {
                self.extend(&token, lease, now);
            }
            Some((token, age))
        };
        tokens.into_iter().filter_map(resume).collect()
    }

    pub(super) fn keep(&mut self, consumer: Consumer, tokens: &[Token], lease: Millis, now: Millis) -> Option<Kept> {
        if !self.has_session(consumer, now) {
            return None;
        }
        self.session(consumer, now);
        let keep = |token| match self.extend(token, lease, now) {
            Some(_) => Outcome::Applied,
            None => self.not_held(token, now),
        };
        let outcomes = tokens.iter().map(keep).collect();
        Some(Kept { outcomes, cancelled: self.cancelled(tokens) })
    }

    pub(super) fn abandon(&mut self, consumer: Consumer, tokens: &[Token], grace: Millis, now: Millis) {
        if !self.has_session(consumer, now) {
            return;
        }
        for token in tokens {
            let Some(lease) = self.leases.get_mut(token).filter(|lease| lease.deadline > now + grace) else { continue };
            self.deadlines.remove(&(lease.deadline, lease.order, *token));
            lease.deadline = now + grace;
            self.deadlines.insert((lease.deadline, lease.order, *token));
        }
    }
}
