//! The leases of a stream's client: taken over, extended while the stream lives, and ended when it has broken.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Consumer, Error, Held, Lanes, MAX_BATCH, Queues, Session};
use crate::store::{Millis, StoreError, Token};

/// When a stream has broken, its leases end within this.
const GRACE: Duration = Duration::from_secs(2);
/// Leases are extended three times as often as they would run out, and at least so often.
const KEEP_EVERY: Duration = Duration::from_secs(20);
/// Between tries to end the leases of a broken stream.
const ABANDON_AGAIN_AFTER: Duration = Duration::from_millis(200);

impl<O> Session<O> {
    /// Takes over what an earlier stream of the client held.
    pub(super) async fn resume(&mut self) -> Result<(), Error> {
        let max_hold = self.max_hold.as_millis() as Millis;
        for at in 0..self.lanes.len() {
            let queue = self.lanes.queue(at).clone();
            let held = self.queues.store.resume(&queue, self.consumer, self.lanes.lease(at), max_hold).await?;
            let now = Instant::now();
            let since = |age| now.checked_sub(Duration::from_millis(age)).unwrap_or(now);
            self.held.add(at, held.iter().map(|(token, age)| (*token, since(*age))), &mut self.lanes);
            if !held.is_empty() {
                self.message.resumed.push((queue, held.into_iter().map(|(token, _)| token).collect()));
            }
        }
        Ok(())
    }

    /// The client is told of tasks that are to be deleted, each time its leases are extended, until they are gone.
    pub(super) fn note_cancelled(&mut self, lane: usize, mut tokens: Vec<Token>) {
        let queue = self.lanes.queue(lane);
        tokens.retain(|token| !self.message.cancelled.iter().any(|(_, told)| told.contains(token)));
        if !tokens.is_empty() {
            self.message.cancelled.push((queue.clone(), tokens));
        }
    }

    pub(super) fn keep_every(&self) -> Duration {
        keep_every(self.lanes.shortest_lease())
    }

    /// Extends the leases that would not last until the next time twice over. Of those that are held longer than the stream
    /// should, the store is only asked whether they are still held.
    pub(super) async fn keep(&mut self, now: Instant) -> Result<(), Error> {
        let next_round = now + self.keep_every();
        for at in 0..self.lanes.len() {
            let every = keep_every(self.lanes.lease(at));
            // The others are not extended at the pace of the shortest lease.
            if !self.lanes.is_to_be_kept(at, now, every, next_round) {
                continue;
            }
            let fresh_since = now.checked_sub(every);
            let aged = |since: Instant| fresh_since.is_some_and(|fresh| since <= fresh);
            let (extended, asked) = self.held.of_lane(at, aged, |since| now - since < self.max_hold);
            for (tokens, lease) in [(extended, self.lanes.lease(at)), (asked, 0)] {
                for tokens in tokens.chunks(MAX_BATCH) {
                    let kept = self.queues.store.keep(self.lanes.queue(at), self.consumer, tokens, lease).await?;
                    let Some(kept) = kept else {
                        self.refuse(Error::SessionTakenOver);
                        return Ok(());
                    };
                    self.held.remove_lost(at, tokens, &kept.outcomes, &mut self.lanes);
                    self.note_cancelled(at, kept.cancelled);
                }
            }
        }
        Ok(())
    }
}

fn keep_every(lease: Millis) -> Duration {
    (Duration::from_millis(lease) / 3).min(KEEP_EVERY)
}

/// The client is gone: its tasks go back when the grace is over, unless another stream of its session has come. Tries until
/// the store did it, or the leases ran out, or the server stops.
pub(super) async fn abandon(queues: Queues, consumer: Consumer, lanes: Lanes, held: Held) {
    let began = Instant::now();
    let end = began + GRACE;
    for at in 0..lanes.len() {
        let give_up = began + Duration::from_millis(lanes.lease(at));
        let (tokens, _) = held.of_lane(at, |_| true, |_| true);
        let queue = lanes.queue(at);
        let mut steps = tokens.chunks(MAX_BATCH);
        let mut step = steps.next();
        while let Some(tokens) = step {
            let left = end.saturating_duration_since(Instant::now()).as_millis() as Millis;
            match queues.store.abandon(queue, consumer, tokens, left).await {
                Ok(()) => {
                    queues.waits.look_at(queue, end);
                    step = steps.next();
                }
                Err(StoreError::Unavailable { .. } | StoreError::Overloaded(_))
                    if Instant::now() < give_up && !queues.stopping.is_cancelled() =>
                {
                    sleep(ABANDON_AGAIN_AFTER).await;
                }
                Err(error) => {
                    tracing::warn!(%error, ?queue, "could not end the leases of a broken stream; they will run out");
                    break;
                }
            }
        }
    }
}
