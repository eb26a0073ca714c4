//! What is to be said about the tasks of a queue, until a stream takes it.

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::token::Token;
use crate::{Outcome, Putback};

/// The most tokens of one request.
const MAX_BATCH: usize = 1_000;

/// What the holder of a task wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Ack,
    /// As these options say; at once and to the head if there are none.
    PutBack(Option<Arc<Putback>>),
    /// For so long; unless it is said, as long as the stream's leases are.
    Heartbeat(Option<Duration>),
}

/// What became of it.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) lease: Option<Duration>,
}

pub(super) struct Ask {
    pub(super) token: Token,
    pub(super) waiter: Option<oneshot::Sender<Answer>>,
}

impl Ask {
    /// Somebody waited for the answer, and does no more.
    fn is_forgotten(&self) -> bool {
        self.waiter.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// A queue, and what is to be said about its tasks.
pub(super) struct Lane {
    pub(super) queue: String,
    acks: Vec<Ask>,
    put_backs: VecDeque<(Option<Arc<Putback>>, Ask)>,
    heartbeats: Vec<(Option<Duration>, Ask)>,
}

impl Lane {
    pub(super) fn new(queue: String) -> Self {
        Self { queue, acks: Vec::new(), put_backs: VecDeque::new(), heartbeats: Vec::new() }
    }

    pub(super) fn push(&mut self, wish: Wish, ask: Ask) {
        match wish {
            Wish::Ack => self.acks.push(ask),
            Wish::PutBack(options) => self.put_backs.push_back((options, ask)),
            Wish::Heartbeat(lease) => {
                // Before the list grows, what nobody waits for any more goes: a holder may ask as often as it likes.
                if self.heartbeats.len() == self.heartbeats.capacity() {
                    self.heartbeats.retain(|(_, ask)| !ask.is_forgotten());
                }
                self.heartbeats.push((lease, ask));
            }
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.acks.is_empty() && self.put_backs.is_empty() && self.heartbeats.is_empty()
    }

    /// As much of what waits as fits in one request.
    pub(super) fn pop(&mut self) -> Option<(Wish, Vec<Ask>)> {
        if !self.acks.is_empty() {
            return Some((Wish::Ack, take_batch(&mut self.acks)));
        }
        if let Some((lease, _)) = self.heartbeats.first() {
            let lease = *lease;
            let mut asks = Vec::new();
            for (other, ask) in mem::take(&mut self.heartbeats) {
                if other == lease && asks.len() < MAX_BATCH {
                    asks.push(ask);
                } else {
                    self.heartbeats.push((other, ask));
                }
            }
            return Some((Wish::Heartbeat(lease), asks));
        }
        // Only those that are put back alike go together, and all of them in their order.
        let options = self.put_backs.front()?.0.clone();
        let alike = self.put_backs.iter().take(MAX_BATCH).take_while(|(other, _)| *other == options).count();
        let asks = self.put_backs.drain(..alike).map(|(_, ask)| ask).collect();
        Some((Wish::PutBack(options), asks))
    }
}

fn take_batch(asks: &mut Vec<Ask>) -> Vec<Ask> {
    let rest = asks.split_off(asks.len().min(MAX_BATCH));
    mem::replace(asks, rest)
}
