//! The queues of a stream: whose turn it is, which of them are known to be empty, and the seats among those who wait there.
//!
//! Turns go by weight: each delivery moves a queue on by its tasks divided by its weight, and the queue that is least far has
//! the next turn. One that was empty does not catch up.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::Instant};

use crate::{
    queue::{Seat, Waits},
    store::{Millis, MintedMap, QueueName, Stem},
};

/// The way that one task moves a queue of weight 1.
const TASK: u64 = 1 << 20;
/// Pops without leases that are not named to the store, when it could not be asked for long.
const SPENT_MAX: usize = 1_000;

pub(super) struct Lanes {
    lanes: Vec<Lane>,
    /// How far the queue was that had the last turn.
    reached: u64,
    /// The stream can take more; without room it sits aside.
    has_room: bool,
}

struct Lane {
    queue: QueueName,
    weight: u64,
    /// How long tasks are held from their delivery, and from each extension.
    lease: Millis,
    keep_at: Option<Instant>,
    moved: u64,
    /// Nothing was there, and whoever brings something will wake the seat.
    is_empty: bool,
    seat: Option<Seat>,
    /// How many tasks of each pop are held.
    pops: MintedMap<Stem, usize>,
    spent: Vec<Stem>,
}

impl Lanes {
    pub(super) fn new(queues: Vec<(QueueName, u32, Millis)>) -> Self {
        let lane = |(queue, weight, lease)| Lane {
            queue,
            weight: u64::from(weight),
            lease,
            keep_at: None,
            moved: 0,
            is_empty: false,
            seat: None,
            pops: MintedMap::default(),
            spent: Vec::new(),
        };
        Self { lanes: queues.into_iter().map(lane).collect(), reached: 0, has_room: true }
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    pub(super) fn queue(&self, at: usize) -> &QueueName {
        &self.lanes[at].queue
    }

    pub(super) fn lease(&self, at: usize) -> Millis {
        self.lanes[at].lease
    }

    /// Whether the leases of a queue are to be extended now, since the next round comes after their time. If so, it is their time again
    /// `every` from now.
    pub(super) fn is_to_be_kept(&mut self, at: usize, now: Instant, every: Duration, next_round: Instant) -> bool {
        let lane = &mut self.lanes[at];
        let is_time = lane.keep_at.is_none_or(|keep_at| keep_at <= next_round);
        if is_time {
            lane.keep_at = Some(now + every);
        }
        is_time
    }

    pub(super) fn shortest_lease(&self) -> Millis {
        self.lanes.iter().map(|lane| lane.lease).min().unwrap_or(Millis::MAX)
    }

    /// By its name; without one, the only queue.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        match (name, self.lanes.len()) {
            ("", 1) => Some(0),
            _ => self.lanes.iter().position(|lane| lane.queue.as_str() == name),
        }
    }

    /// Whose turn it is; nobody's if all are empty.
    pub(super) fn next(&mut self) -> Option<usize> {
        let waiting = self.lanes.iter().enumerate().filter(|(_, lane)| !lane.is_empty);
        waiting.min_by_key(|(_, lane)| lane.moved).map(|(at, _)| at)
    }

    /// How much of the room is for a queue, of those that may have tasks.
    pub(super) fn share(&self, at: usize, room: usize) -> usize {
        let waiting = self.lanes.iter().enumerate().filter(|(other, lane)| *other == at || !lane.is_empty);
        let all: u64 = waiting.map(|(_, lane)| lane.weight).sum();
        let share = (room as u64 * self.lanes[at].weight).div_ceil(all);
        usize::try_from(share).unwrap_or(room)
    }

    pub(super) fn is_seated(&self, at: usize) -> bool {
        self.lanes[at].seat.is_some()
    }

    /// What a pop found. A queue is empty only if it was when this stream had its seat there.
    pub(super) fn note_popped(
        &mut self,
        at: usize,
        tasks: usize,
        are_there_more: bool,
        waits: &Arc<Waits>,
        woken: &Arc<Notify>,
    ) {
        let lane = &mut self.lanes[at];
        self.reached = self.reached.max(lane.moved);
        lane.moved += tasks as u64 * TASK / lane.weight;
        if let Some(seat) = &mut lane.seat {
            seat.note_looked();
        }
        if are_there_more {
            lane.seat = None;
        } else if lane.seat.is_some() {
            lane.is_empty = true;
        } else {
            lane.seat = Some(Seat::take_for(waits, &lane.queue, woken));
        }
    }

    /// Somebody was woken. If the stream cannot take anything now, the wake-up is passed on.
    pub(super) fn note_woken(&mut self, can_take: bool) {
        for lane in &mut self.lanes {
            let Some(seat) = &mut lane.seat else { continue };
            let was_woken = if can_take { seat.sit_again_if_woken() } else { seat.was_woken() };
            if was_woken {
                lane.begin_again(self.reached);
                if !can_take {
                    lane.seat = None;
                }
            }
        }
    }

    /// A stream without room is not woken: what comes then is for others. When it has room again, it looks where something
    /// has come.
    pub(super) fn note_room(&mut self, has_room: bool) {
        if has_room == std::mem::replace(&mut self.has_room, has_room) {
            return;
        }
        for lane in &mut self.lanes {
            match &mut lane.seat {
                Some(seat) if has_room => {
                    if seat.come_back() {
                        lane.begin_again(self.reached);
                    }
                }
                Some(seat) if lane.is_empty => seat.step_aside(),
                _ => lane.stand_up(self.reached),
            }
        }
    }

    /// Gives up all seats: the queues have to be looked at again.
    pub(super) fn stand_up(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.stand_up(self.reached));
    }

    pub(super) fn note_delivered(&mut self, at: usize, stem: Stem) {
        *self.lanes[at].pops.entry(stem).or_default() += 1;
    }

    pub(super) fn note_ended(&mut self, at: usize, stem: &Stem) {
        let lane = &mut self.lanes[at];
        if let Some(held) = lane.pops.get_mut(stem) {
            *held -= 1;
            if *held == 0 {
                lane.pops.remove(stem);
                if lane.spent.len() < SPENT_MAX {
                    lane.spent.push(*stem);
                }
            }
        }
    }

    /// The pops of which nothing is held any more.
    pub(super) fn take_spent(&mut self, at: usize) -> Vec<Stem> {
        std::mem::take(&mut self.lanes[at].spent)
    }
}

impl Lane {
    fn stand_up(&mut self, reached: u64) {
        if self.seat.take().is_some() {
            self.begin_again(reached);
        }
    }

    fn begin_again(&mut self, reached: u64) {
        self.is_empty = false;
        self.moved = self.moved.max(reached);
    }
}
