//! What a stream does with the leases of its own.

use super::{leases::move_deadline, queue::Queue, tables::Sql, turn::Turn};
use crate::store::{Consumer, Kept, Millis, Outcome, Token};

impl Queue {
    pub(super) fn resume(
        &mut self,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<Vec<(Token, Millis)>> {
        let tokens: Vec<Token> = self.sessions.take(consumer, turn.now).iter().map(|(_, token)| *token).collect();
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
        if self.sessions.has_another_stream(consumer, turn.now) {
            return Ok(None);
        }
        self.sessions.take(consumer, turn.now);
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
        if self.sessions.has_another_stream(consumer, turn.now) {
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
