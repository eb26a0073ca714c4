//! Pops that wait, all of a process, whichever thread they are on.
//!
//! One waiter is woken for one task, the one that waits longest. A waiter takes its seat before it looks at the store, so
//! no insert falls between the look and the wait; one that was woken and leaves without a look passes the wake-up on. Wake-ups
//! are hints: whoever is woken pops, and sits down again if there was nothing. Whatever hint is lost, the safety look of
//! [`Waits::run_looks`] finds the task: one look a queue for all its waiters, many queues in one call.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::store::{QueueName, Store};

/// The registry is split by queue, so that threads seldom meet in it.
const PARTS: usize = 16;
/// A queue is looked at after so long, and up to `LOOK_JITTER` more.
const LOOK_AFTER: Duration = Duration::from_millis(700);
const LOOK_JITTER_MS: u64 = 200;
/// How precisely looks are timed.
const LOOK_TICK: Duration = Duration::from_millis(50);
/// The most queues in one look.
const LOOK_BATCH: usize = 100;

/// The registry.
#[derive(Default)]
pub struct Waits {
    parts: [Mutex<HashMap<QueueName, Line>>; PARTS],
    hasher: RandomState,
    /// Seats are numbered in the order of arrival.
    seats: AtomicU64,
    /// Queues with waiters.
    lines: AtomicUsize,
    first_line: Notify,
}

/// The waiters of a queue.
struct Line {
    seats: BTreeMap<u64, Arc<Notify>>,
    /// Those who could take nothing now, and have heard of all that came before.
    aside: BTreeSet<u64>,
    look_at: Instant,
}

impl Waits {
    fn part(&self, queue: &QueueName) -> MutexGuard<'_, HashMap<QueueName, Line>> {
        let part = self.hasher.hash_one(queue) as usize % PARTS;
        self.parts[part].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody waits, wherever. Whoever sits down does so before looking at the store, and whoever brings tasks asks this after
    /// they are there: one of them sees the other.
    fn is_empty(&self) -> bool {
        self.lines.load(Ordering::SeqCst) == 0
    }

    /// How many wait on a queue.
    pub fn waiting(&self, queue: &QueueName) -> usize {
        if self.is_empty() {
            return 0;
        }
        self.part(queue).get(queue).map_or(0, |line| line.seats.len())
    }

    /// Wakes as many as there are new tasks, those who wait longest first.
    pub fn wake(&self, queue: &QueueName, tasks: usize) {
        if self.is_empty() {
            return;
        }
        let mut part = self.part(queue);
        let Some(line) = part.get_mut(queue) else { return };
        if tasks > 0 {
            line.aside.clear();
        }
        for _ in 0..tasks {
            let Some((_, seat)) = line.seats.pop_first() else { break };
            seat.notify_one();
        }
        self.drop_if_empty(&mut part, queue);
    }

    fn drop_if_empty(&self, part: &mut HashMap<QueueName, Line>, queue: &QueueName) {
        if part.get(queue).is_some_and(|line| line.seats.is_empty() && line.aside.is_empty()) {
            part.remove(queue);
            self.lines.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn sit(&self, queue: &QueueName, number: u64, seat: &Arc<Notify>) {
        let mut part = self.part(queue);
        let line = part.entry(queue.clone()).or_insert_with(|| {
            if self.lines.fetch_add(1, Ordering::SeqCst) == 0 {
                self.first_line.notify_one();
            }
            Line { seats: BTreeMap::new(), aside: BTreeSet::new(), look_at: self.next_look(queue, Instant::now()) }
        });
        line.seats.insert(number, Arc::clone(seat));
    }

    /// The first lease of a queue runs out then: look at it then, and not only when its time comes.
    pub fn look_at(&self, queue: &QueueName, at: Instant) {
        if let Some(line) = self.part(queue).get_mut(queue) {
            line.look_at = line.look_at.min(at);
        }
    }

    /// When to look at a queue that is looked at now: queues do not stay in step, nor do servers.
    fn next_look(&self, queue: &QueueName, now: Instant) -> Instant {
        let random = self.hasher.hash_one((queue, now));
        now + LOOK_AFTER + Duration::from_millis(random % LOOK_JITTER_MS)
    }

    /// Queues whose time has come; each gets its next time.
    fn due_looks(&self) -> Vec<QueueName> {
        let now = Instant::now();
        let mut due = Vec::new();
        for part in &self.parts {
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            for (queue, line) in part.iter_mut().filter(|(_, line)| line.look_at <= now) {
                line.look_at = self.next_look(queue, now);
                due.push(queue.clone());
            }
        }
        due
    }

    /// Looks at the queues that have waiters, for ever. One such loop serves the process.
    pub async fn run_looks(&self, store: &dyn Store) {
        let mut tick = interval(LOOK_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.lines.load(Ordering::Relaxed) == 0 {
                self.first_line.notified().await;
            }
            tick.tick().await;
            for queues in self.due_looks().chunks(LOOK_BATCH) {
                self.look(store, queues).await;
            }
        }
    }

    async fn look(&self, store: &dyn Store, queues: &[QueueName]) {
        let sights = match store.look(queues).await {
            Ok(sights) => sights,
            Err(error) => return tracing::debug!(%error, "could not look at queues with waiting pops"),
        };
        let now = Instant::now();
        for (queue, sight) in queues.iter().zip(sights) {
            if sight.ready > 0 {
                self.wake(queue, usize::try_from(sight.ready).unwrap_or(usize::MAX));
            } else if let Some(due_in) = sight.due_in {
                self.look_at(queue, now + Duration::from_millis(due_in));
            }
        }
    }
}

/// A pop's place among the waiters of its queue, as long as it lives.
pub struct Seat {
    waits: Arc<Waits>,
    queue: QueueName,
    number: u64,
    woken: Arc<Notify>,
    /// Nobody wakes this one.
    is_aside: bool,
    /// It was woken and sat down again, and has not looked since.
    owes_look: bool,
}

impl Seat {
    /// Takes a seat at the end.
    pub fn take(waits: &Arc<Waits>, queue: &QueueName) -> Self {
        Self::take_for(waits, queue, &Arc::default())
    }

    /// Takes a seat for somebody who sits in several queues, and is told of all wake-ups in one place.
    pub(super) fn take_for(waits: &Arc<Waits>, queue: &QueueName, woken: &Arc<Notify>) -> Self {
        let number = waits.seats.fetch_add(1, Ordering::Relaxed);
        let (waits, queue, woken) = (Arc::clone(waits), queue.clone(), Arc::clone(woken));
        let seat = Self { waits, queue, number, woken, is_aside: false, owes_look: false };
        seat.waits.sit(&seat.queue, number, &seat.woken);
        seat
    }

    /// True if somebody has woken this one.
    pub(super) fn was_woken(&self) -> bool {
        let part = self.waits.part(&self.queue);
        !self.is_aside && !part.get(&self.queue).is_some_and(|line| line.seats.contains_key(&self.number))
    }

    /// Sits down in the old place again if somebody has woken this one, and owes a look then. True if so.
    pub(super) fn sit_again_if_woken(&mut self) -> bool {
        let was_woken = self.was_woken();
        if was_woken {
            self.owes_look = true;
            self.waits.sit(&self.queue, self.number, &self.woken);
        }
        was_woken
    }

    /// Is not woken and does not count from now on, and keeps its place.
    pub(super) fn step_aside(&mut self) {
        if let Some(line) = self.waits.part(&self.queue).get_mut(&self.queue)
            && line.seats.remove(&self.number).is_some()
        {
            line.aside.insert(self.number);
            self.is_aside = true;
        }
    }

    /// Sits down in its place again. True if something has come meanwhile.
    pub(super) fn come_back(&mut self) -> bool {
        let was_aside = std::mem::take(&mut self.is_aside);
        if let Some(line) = self.waits.part(&self.queue).get_mut(&self.queue)
            && line.aside.remove(&self.number)
        {
            line.seats.insert(self.number, Arc::clone(&self.woken));
            return false;
        }
        // What came while it was aside was for others: it owes nobody a look.
        self.owes_look |= !was_aside;
        self.waits.sit(&self.queue, self.number, &self.woken);
        true
    }

    /// It has looked at the store since it sat down.
    pub(super) fn note_looked(&mut self) {
        self.owes_look = false;
    }

    /// Waits to be woken, and sits down in the old place again, so that no wake-up is missed while the store is asked.
    pub async fn woken(&self) {
        self.woken.notified().await;
        self.waits.sit(&self.queue, self.number, &self.woken);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut part = self.waits.part(&self.queue);
        let leave = |line: &mut Line| line.seats.remove(&self.number).is_some() || line.aside.remove(&self.number);
        let had_place = part.get_mut(&self.queue).is_some_and(leave);
        self.waits.drop_if_empty(&mut part, &self.queue);
        drop(part);
        if self.owes_look || !(had_place || self.is_aside) {
            // Somebody has woken this one, and it will not look any more.
            self.waits.wake(&self.queue, 1);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::pin::pin;

    use futures_util::{FutureExt, poll};

    use super::*;

    fn queue(name: &str) -> QueueName {
        QueueName::parse(name).unwrap()
    }

    #[tokio::test]
    async fn one_waiter_a_task_is_woken_and_the_oldest_first() {
        let waits = Arc::new(Waits::default());
        let seats = [Seat::take(&waits, &queue("a")), Seat::take(&waits, &queue("a")), Seat::take(&waits, &queue("a"))];
        let other = Seat::take(&waits, &queue("b"));
        waits.wake(&queue("a"), 2);
        assert!(seats[0].woken().now_or_never().is_some());
        assert!(seats[1].woken().now_or_never().is_some());
        assert!(seats[2].woken().now_or_never().is_none());
        assert!(other.woken().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_while_woken_passes_it_on() {
        let waits = Arc::new(Waits::default());
        let (first, second) = (Seat::take(&waits, &queue("a")), Seat::take(&waits, &queue("a")));
        waits.wake(&queue("a"), 1);
        drop(first);
        assert!(second.woken().now_or_never().is_some());
        // It sits again, and leaves without having been woken: nobody is left.
        drop(second);
        assert_eq!(waits.waiting(&queue("a")), 0);
        assert_eq!(waits.lines.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_wake_up_while_the_store_is_asked_is_kept() {
        let waits = Arc::new(Waits::default());
        let seat = Seat::take(&waits, &queue("a"));
        waits.wake(&queue("a"), 1);
        seat.woken().await;
        waits.wake(&queue("a"), 1);
        let mut again = pin!(seat.woken());
        assert!(poll!(&mut again).is_ready());
    }

    #[tokio::test]
    async fn a_waiter_aside_is_not_woken_and_knows_when_it_is_back_that_something_came() {
        let waits = Arc::new(Waits::default());
        let (mut first, mut second) = (Seat::take(&waits, &queue("a")), Seat::take(&waits, &queue("a")));
        first.step_aside();
        assert_eq!((waits.waiting(&queue("a")), first.was_woken()), (1, false));
        assert!(!first.come_back());
        first.step_aside();
        waits.wake(&queue("a"), 1);
        assert!(second.woken().now_or_never().is_some());
        assert!(first.woken().now_or_never().is_none());
        assert!(first.come_back());
        assert_eq!(waits.waiting(&queue("a")), 2);
        drop(first);
        second.step_aside();
        drop(second);
        assert_eq!(waits.lines.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_waiter_aside_that_leaves_passes_nothing_on_for_nobody_has_woken_it() {
        let waits = Arc::new(Waits::default());
        let [mut leaves, mut comes_back, idle] = [(); 3].map(|()| Seat::take(&waits, &queue("a")));
        leaves.step_aside();
        comes_back.step_aside();
        waits.wake(&queue("a"), 1);
        assert!(idle.woken().now_or_never().is_some());
        assert!(comes_back.come_back());
        drop((leaves, comes_back));
        assert!(idle.woken().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_waiter_that_sits_again_passes_its_wake_up_on_unless_it_has_looked() {
        let waits = Arc::new(Waits::default());
        let [mut looks, mut leaves, mut fills, idle] = [(); 4].map(|()| Seat::take(&waits, &queue("a")));
        waits.wake(&queue("a"), 3);
        assert!(looks.sit_again_if_woken());
        looks.note_looked();
        drop(looks);
        assert!(idle.woken().now_or_never().is_none());
        assert!(leaves.sit_again_if_woken());
        drop(leaves);
        assert!(idle.woken().now_or_never().is_some());
        // It was woken before it stepped aside.
        fills.step_aside();
        assert!(fills.come_back());
        drop(fills);
        assert!(idle.woken().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_is_looked_at_within_900_ms_or_when_a_lease_runs_out() {
        let waits = Arc::new(Waits::default());
        let _seat = Seat::take(&waits, &queue("a"));
        assert!(waits.due_looks().is_empty());
        tokio::time::advance(Duration::from_millis(900)).await;
        assert_eq!(waits.due_looks(), [queue("a")]);
        assert!(waits.due_looks().is_empty());
        waits.look_at(&queue("a"), Instant::now() + Duration::from_millis(100));
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(waits.due_looks(), [queue("a")]);
    }
}
