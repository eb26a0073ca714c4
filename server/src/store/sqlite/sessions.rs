//! The sessions of streams, and what a stream does with the leases of its own.

use std::collections::BTreeSet;

use super::{leases::move_deadline, queue::Queue, tables::Sql, turn::Turn};
use crate::store::{Attempt, Consumer, Kept, Millis, Outcome, SESSION_KEPT, Token};

/// The work of a consumer.
#[derive(Default)]
pub(super) struct Session {
    /// The stream that has it; nobody's when the file was opened since.
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
        turn: &mut Turn<'_>,
    ) -> Sql<Vec<(Token, Millis)>> {
        let session = self.session(consumer, turn.now);
        let tokens: Vec<Token> = session.leases.iter().map(|(_, token)| *token).collect();
        let age = |token| self.leases.get(&token).map(|held| (token, turn.now.saturating_sub(held.renewed_at)));
        let held: Vec<(Token, Millis)> = tokens.into_iter().filter_map(age).collect();
        let young = held.iter().filter(|(_, age)| *age < max_hold);
        let young: Vec<Token> = young.map(|(token, _)| *token).collect();
        self.extend(&young, lease, turn)?;
        Ok(held)
    }

    /// Nothing if another stream has the session.
    pub(super) fn keep(
        &mut self,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<Option<Kept>> {
        if !self.has_session(consumer, turn.now) {
            return Ok(None);
        }
        self.session(consumer, turn.now);
        let outcomes = self.extend(tokens, lease, turn)?;
        Ok(Some(Kept { outcomes, cancelled: self.cancelled_of(tokens) }))
    }

    fn extend(&mut self, tokens: &[Token], lease: Millis, turn: &Turn<'_>) -> Sql<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else {
                outcomes.push(self.not_held(token, turn.now));
                continue;
            };
            let until = held.deadline.max(turn.now + lease);
            move_deadline(&mut self.deadlines, token, held, until, turn)?;
            outcomes.push(Outcome::Applied);
        }
        Ok(outcomes)
    }

    pub(super) fn abandon(
        &mut self,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        if !self.has_session(consumer, turn.now) {
            return Ok(());
        }
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else { continue };
            let until = held.deadline.min(turn.now + grace);
            self.deadlines.remove(&(held.deadline, held.order, *token));
            held.deadline = until;
            self.deadlines.insert((until, held.order, *token));
        }
        Ok(())
    }
}
