//! Ties leased tasks to the body that carries them.
//!
//! A [`Handover`] travels in the response's extensions; the edge takes it out and keeps it with the body. Tonic's encoder
//! hands out everything it was given so far with each frame, so once a frame was passed on to HTTP/2, all deliveries put in
//! before it are handed over. What is left when the body is dropped goes back to its queue.
//!
//! Who makes a stream waits for [`Handover::clear`] before leasing more, and puts deliveries in where the encoder asks for
//! the next message, not earlier. While HTTP/2 has no room for a frame, nobody asks the body for anything, so a task beside it
//! watches the time.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::queue::Unsent;

/// What one answer carries that HTTP/2 has not taken.
#[derive(Clone, Default)]
pub(super) struct Handover(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// More messages may follow the first.
    stream: bool,
    state: Mutex<State>,
    /// Told when frames were passed on, and when the client was given up.
    changed: Notify,
}

#[derive(Default)]
struct State {
    unsent: Vec<Unsent>,
    /// Since when hyper may hold a frame.
    frame_out: Option<Instant>,
    stalled: bool,
}

/// The client did not read for too long: what was not sent was given back, and the stream is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stalled;

impl Handover {
    /// Of an answer with any number of messages. Its client is given up when it does not read.
    pub(super) fn of_stream() -> Self {
        Self(Arc::new(Shared { stream: true, ..Shared::default() }))
    }

    pub(super) fn is_of_stream(&self) -> bool {
        self.0.stream
    }

    /// The encoder has got the tasks. Those of a stream that is ended go back at once.
    pub(super) fn put(&self, unsent: Unsent) {
        let mut state = self.state();
        if !state.stalled {
            state.unsent.push(unsent);
        }
    }

    /// The body gave out a frame.
    pub(super) fn given(&self) {
        self.state().frame_out = Some(Instant::now());
    }

    /// The body is asked for more: all frames so far were passed on to HTTP/2.
    pub(super) fn taken(&self) -> Result<(), Stalled> {
        let mut state = self.state();
        if state.stalled {
            return Err(Stalled);
        }
        if state.frame_out.take().is_some() {
            let taken = mem::take(&mut state.unsent);
            drop(state);
            taken.into_iter().for_each(Unsent::handed_over);
            self.0.changed.notify_waiters();
        }
        Ok(())
    }

    /// Waits until all frames so far were passed on to HTTP/2, and there is room for more.
    pub(super) async fn clear(&self) -> Result<(), Stalled> {
        loop {
            let changed = self.0.changed.notified();
            {
                let state = self.state();
                if state.stalled {
                    return Err(Stalled);
                }
                if state.unsent.is_empty() && state.frame_out.is_none() {
                    return Ok(());
                }
            }
            changed.await;
        }
    }

    /// Waits until a frame was not taken for so long, and then gives back what was not handed over and ends the stream.
    pub(super) async fn watch(self, limit: Duration) {
        let mut look_at = Instant::now() + limit;
        loop {
            sleep_until(look_at).await;
            let mut state = self.state();
            let now = Instant::now();
            look_at = state.frame_out.unwrap_or(now) + limit;
            if look_at <= now {
                state.stalled = true;
                let unsent = mem::take(&mut state.unsent);
                drop(state);
                drop(unsent);
                self.0.changed.notify_waiters();
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn clear_waits_for_the_frame_to_be_taken() {
        let handover = Handover::of_stream();
        assert_eq!(handover.clear().await, Ok(()));
        handover.given();
        let waiting = tokio::spawn({
            let handover = handover.clone();
            async move { handover.clear().await }
        });
        tokio::time::sleep(LIMIT).await;
        assert!(!waiting.is_finished());
        assert_eq!(handover.taken(), Ok(()));
        assert_eq!(waiting.await.ok(), Some(Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_is_given_up_when_it_lets_one_frame_lie_and_not_when_it_is_slow_or_nothing_comes() {
        let handover = Handover::of_stream();
        let watching = tokio::spawn(handover.clone().watch(LIMIT));
        for _ in 0..5 {
            handover.given();
            tokio::time::sleep(LIMIT * 9 / 10).await;
            assert_eq!(handover.taken(), Ok(()));
        }
        tokio::time::sleep(LIMIT * 5 / 2).await;
        assert!(!watching.is_finished());

        handover.given();
        let given = Instant::now();
        assert_eq!(handover.clear().await, Err(Stalled));
        assert_eq!(given.elapsed(), LIMIT);
        assert_eq!(handover.taken(), Err(Stalled));
        assert!(watching.await.is_ok());
    }
}
