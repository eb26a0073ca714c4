//! What a stream does with the leases of its own.

use super::Queue;
use crate::store::{Consumer, Kept, Millis, Outcome, Token};

impl Queue {
    pub(super) fn resume(
        &mut self,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
        now: Millis,
    ) -> Vec<(Token, Millis)> {
        let tokens: Vec<Token> = self.sessions.take(consumer, now).iter().map(|(_, token)| *token).collect();
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
        if self.sessions.has_another_stream(consumer, now) {
            return None;
        }
        self.sessions.take(consumer, now);
        let keep = |token| match self.extend(token, lease, now) {
            Some(_) => Outcome::Applied,
            None => self.not_held(token, now),
        };
        let outcomes = tokens.iter().map(keep).collect();
        Some(Kept { outcomes, cancelled: self.cancelled(tokens) })
    }

    pub(super) fn abandon(&mut self, consumer: Consumer, tokens: &[Token], grace: Millis, now: Millis) {
        if self.sessions.has_another_stream(consumer, now) {
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
