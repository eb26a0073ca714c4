//! What a client holds: delivered on its stream or taken over, and neither acked nor put back nor lost.

use std::collections::HashMap;

use tokio::time::Instant;

use super::lanes::Lanes;
use crate::store::{Outcome, Stem, Token};

#[derive(Default)]
pub(super) struct Held(HashMap<Token, (usize, Instant)>);

impl Held {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Of an earlier stream.
    pub(super) fn add(&mut self, lane: usize, tokens: &[Token], now: Instant) {
        self.0.extend(tokens.iter().map(|token| (*token, (lane, now))));
    }

    /// All of a pop.
    pub(super) fn deliver(
        &mut self,
        lane: usize,
        stem: &Stem,
        tokens: impl ExactSizeIterator<Item = Token>,
        now: Instant,
        lanes: &mut Lanes,
    ) {
        lanes.note_delivered(lane, *stem, tokens.len());
        self.0.extend(tokens.map(|token| (token, (lane, now))));
    }

    pub(super) fn remove(&mut self, tokens: &[Token], lanes: &mut Lanes) {
        for token in tokens {
            if let Some((lane, _)) = self.0.remove(token) {
                lanes.note_ended(lane, &token.stem());
            }
        }
    }

    pub(super) fn remove_lost(&mut self, tokens: &[Token], outcomes: &[Outcome], lanes: &mut Lanes) {
        for (token, outcome) in tokens.iter().zip(outcomes) {
            if *outcome != Outcome::Applied {
                self.remove(std::slice::from_ref(token), lanes);
            }
        }
    }

    /// Of a queue those whose time of delivery is to the point: first those that meet the condition, then the others.
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
        (met, others)
    }
}
