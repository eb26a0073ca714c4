//! Calls that wait for a store, in two bounded lanes, and the fair choice of those that run next.
//!
//! What ends or extends leases is urgent: it does not queue behind inserts and pops, which would only bring more of it. The
//! ordinary calls take turns by queue, and keep their order within one.

use std::collections::{HashMap, VecDeque};

use super::{QueueName, StoreError};

/// So many calls wait in a lane at most; and so many bytes of values in all.
const MAX_CALLS: usize = 16_384;
const MAX_BYTES: usize = 64 << 20;

/// So many bytes weigh as much as a task.
const BYTES_PER_ITEM: usize = 4_096;

/// Where a call waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Before all others, and never refused: the few questions that the server asks for itself.
    Own,
    /// Before the ordinary ones.
    Urgent,
    /// In turn with those of other queues; what belongs to no single queue has a turn as well.
    Ordinary(Option<QueueName>),
}

/// What a call costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    items: usize,
    bytes: usize,
}

impl Load {
    /// Of so many tasks or tokens, with values of so many bytes.
    pub(super) fn new(items: usize, bytes: usize) -> Self {
        Self { items: items.max(1), bytes }
    }

    /// In items; some kilobytes of values count as one.
    pub(super) fn weight(self) -> usize {
        self.items.max(self.bytes / BYTES_PER_ITEM)
    }
}

struct Waiting<T> {
    call: T,
    load: Load,
}

/// The calls that wait.
pub(super) struct Lanes<T> {
    own: VecDeque<Waiting<T>>,
    urgent: VecDeque<Waiting<T>>,
    ordinary: HashMap<Option<QueueName>, VecDeque<Waiting<T>>>,
    /// The queues of the ordinary calls, each once, in the order of their turns.
    turns: VecDeque<Option<QueueName>>,
    ordinary_calls: usize,
    bytes: usize,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        let (own, urgent, turns) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Self { own, urgent, ordinary: HashMap::new(), turns, ordinary_calls: 0, bytes: 0 }
    }
}

impl<T> Lanes<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty() && self.urgent.is_empty() && self.turns.is_empty()
    }

    /// Lets a call wait, or refuses it if too many do.
    pub(super) fn push(&mut self, lane: Lane, load: Load, call: T) -> Result<(), StoreError> {
        let waiting = Waiting { call, load };
        match lane {
            Lane::Own => self.own.push_back(waiting),
            Lane::Urgent if self.urgent.len() >= MAX_CALLS => return Err(overloaded("acks and heartbeats")),
            Lane::Urgent => self.urgent.push_back(waiting),
            // One that is larger than all that may wait is let in when nothing else waits.
            Lane::Ordinary(_)
                if self.ordinary_calls >= MAX_CALLS
                    || (load.bytes > 0 && self.bytes > 0 && self.bytes + load.bytes > MAX_BYTES) =>
            {
                return Err(overloaded("calls"));
            }
            Lane::Ordinary(queue) => {
                self.ordinary_calls += 1;
                self.bytes += load.bytes;
                let of_queue = self.ordinary.entry(queue).or_insert_with_key(|queue| {
                    self.turns.push_back(queue.clone());
                    VecDeque::new()
                });
                of_queue.push_back(waiting);
            }
        }
        Ok(())
    }

    /// Takes what runs next: the urgent calls first, then the ordinary ones, a queue's first at each of its turns, until they
    /// weigh so much. One that weighs more than is left waits for the next time, when it is the first; so at least one
    /// ordinary call is taken, however many urgent ones there are, and a call of any weight.
    pub(super) fn take(&mut self, max_weight: usize) -> Vec<T> {
        let mut left = max_weight;
        let mut taken = Vec::new();
        for lane in [&mut self.own, &mut self.urgent] {
            while left > 0
                && let Some(next) = lane.pop_front()
            {
                left = left.saturating_sub(next.load.weight());
                taken.push(next.call);
            }
        }
        let mut is_first = true;
        while let Some(queue) = self.turns.pop_front() {
            let Some(of_queue) = self.ordinary.get_mut(&queue) else { continue };
            if !is_first && of_queue.front().is_some_and(|next| next.load.weight() > left) {
                self.turns.push_front(queue);
                break;
            }
            let Some(next) = of_queue.pop_front() else { continue };
            is_first = false;
            left = left.saturating_sub(next.load.weight());
            self.ordinary_calls -= 1;
            self.bytes -= next.load.bytes;
            taken.push(next.call);
            if of_queue.is_empty() {
                self.ordinary.remove(&queue);
            } else {
                self.turns.push_back(queue);
            }
        }
        taken
    }
}

fn overloaded(what: &str) -> StoreError {
    StoreError::Overloaded(format!("too many {what} wait for the store already; try again, with fewer at a time"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(queue: &str) -> Lane {
        Lane::Ordinary(Some(QueueName::parse(queue).unwrap()))
    }

    fn one() -> Load {
        Load::new(1, 0)
    }

    #[test]
    fn what_is_urgent_does_not_queue_behind_the_ordinary() {
        let mut lanes = Lanes::default();
        for call in 0..10 {
            lanes.push(of("q"), one(), call).unwrap();
        }
        lanes.push(Lane::Urgent, one(), 10).unwrap();
        lanes.push(Lane::Own, one(), 11).unwrap();
        assert_eq!(lanes.take(4), [11, 10, 0, 1]);
    }

    #[test]
    fn the_ordinary_do_not_starve_behind_the_urgent() {
        let mut lanes = Lanes::default();
        for call in 0..100 {
            lanes.push(Lane::Urgent, one(), call).unwrap();
        }
        lanes.push(of("q"), Load::new(1_000, 0), 100).unwrap();
        assert_eq!(lanes.take(3), [0, 1, 2, 100]);
        assert_eq!(lanes.take(3), [3, 4, 5]);
    }

    #[test]
    fn queues_take_turns_and_each_keeps_its_order() {
        let mut lanes = Lanes::default();
        for call in 0..6 {
            lanes.push(of("busy"), one(), ("busy", call)).unwrap();
        }
        lanes.push(of("calm"), one(), ("calm", 0)).unwrap();
        lanes.push(Lane::Ordinary(None), one(), ("none", 0)).unwrap();
        assert_eq!(lanes.take(4), [("busy", 0), ("calm", 0), ("none", 0), ("busy", 1)]);
        lanes.push(of("calm"), one(), ("calm", 1)).unwrap();
        assert_eq!(lanes.take(3), [("busy", 2), ("calm", 1), ("busy", 3)]);
        assert_eq!(lanes.take(10), [("busy", 4), ("busy", 5)]);
        assert!(lanes.is_empty() && lanes.take(10).is_empty());
    }

    #[test]
    fn a_large_call_delays_others_by_one_step_and_is_not_put_off_for_ever() {
        let mut lanes = Lanes::default();
        lanes.push(of("q"), one(), 0).unwrap();
        lanes.push(of("q"), Load::new(1_000, 0), 1).unwrap();
        lanes.push(of("q"), one(), 2).unwrap();
        lanes.push(of("r"), one(), 3).unwrap();
        assert_eq!(lanes.take(200), [0, 3]);
        lanes.push(of("r"), one(), 4).unwrap();
        assert_eq!(lanes.take(200), [1]);
        assert_eq!(lanes.take(200), [4, 2]);
    }

    #[test]
    fn bytes_weigh_too() {
        let mut lanes = Lanes::default();
        for call in 0..3 {
            lanes.push(of("q"), Load::new(1, 100 * BYTES_PER_ITEM), call).unwrap();
        }
        assert_eq!(lanes.take(200), [0, 1]);
        assert_eq!(lanes.take(200), [2]);
    }

    #[test]
    fn each_lane_has_its_bound_and_own_questions_have_none() {
        let mut lanes = Lanes::default();
        for call in 0..MAX_CALLS {
            lanes.push(of("q"), one(), call).unwrap();
        }
        assert!(matches!(lanes.push(of("r"), one(), 0), Err(StoreError::Overloaded(_))));
        for call in 0..MAX_CALLS {
            lanes.push(Lane::Urgent, one(), call).unwrap();
        }
        assert!(matches!(lanes.push(Lane::Urgent, one(), 0), Err(StoreError::Overloaded(_))));
        lanes.push(Lane::Own, one(), 0).unwrap();
        while !lanes.is_empty() {
            lanes.take(1_000);
        }
        lanes.push(of("r"), one(), 0).unwrap();
        lanes.push(Lane::Urgent, one(), 0).unwrap();
    }

    #[test]
    fn bytes_are_bounded_and_one_call_of_any_size_is_let_in() {
        let mut lanes = Lanes::default();
        lanes.push(of("q"), Load::new(1, 2 * MAX_BYTES), 0).unwrap();
        assert!(matches!(lanes.push(of("q"), Load::new(1, 1), 1), Err(StoreError::Overloaded(_))));
        // What brings no values is let in all the same.
        lanes.push(of("q"), one(), 2).unwrap();
        assert_eq!(lanes.take(2), [0]);
        assert_eq!(lanes.take(1), [2]);
        lanes.push(of("q"), Load::new(1, MAX_BYTES), 3).unwrap();
        assert_eq!(lanes.take(1), [3]);
    }
}
