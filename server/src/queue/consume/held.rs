//! What a client holds: delivered on its stream or taken over, and neither acked nor put back nor lost.

use tokio::time::Instant;

use super::lanes::Lanes;
use crate::store::{MintedMap, Outcome, Token};

#[derive(Default)]
pub(super) struct Held(MintedMap<Token, (usize, Instant)>);

impl Held {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each since a time.
    pub(super) fn add(&mut self, lane: usize, tokens: impl Iterator<Item = (Token, Instant)>, lanes: &mut Lanes) {
        for (token, since) in tokens {
            lanes.note_delivered(lane, token.stem());
            self.0.insert(token, (lane, since));
        }
    }

    /// A token that is named with another queue is none of it, and stays.
    pub(super) fn remove(&mut self, lane: usize, tokens: &[Token], lanes: &mut Lanes) {
        for token in tokens {
            if self.0.get(token).is_some_and(|(of, _)| *of == lane) {
                self.0.remove(token);
                lanes.note_ended(lane, &token.stem());
            }
        }
    }

    pub(super) fn remove_lost(&mut self, lane: usize, tokens: &[Token], outcomes: &[Outcome], lanes: &mut Lanes) {
        for (token, outcome) in tokens.iter().zip(outcomes) {
            if *outcome != Outcome::Applied {
                self.remove(lane, std::slice::from_ref(token), lanes);
            }
        }
    }

    /// Of a queue those whose time of delivery is to the point: first those that meet the condition, then the others. What was
    /// popped together stands together, so that stores can move it together.
    pub(super) fn of_lane(
        &self,
        lane: usize,
        to_the_point: impl Fn(Instant) -> bool,
        condition: impl Fn(Instant) -> bool,
    ) -> (Vec<Token>, Vec<Token>) {
        let (mut met, mut others) = (Vec::new(), Vec::new());
        for (token, (of, since)) in &self.0 {
            if *of == lane && to_the_point(*since) {
                if condition(*since) { met.push(*token) } else { others.push(*token) }
            }
        }
        met.sort_unstable();
        others.sort_unstable();
        (met, others)
    }
}
