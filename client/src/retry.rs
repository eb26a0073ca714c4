//! When a call is repeated: one loop, limited by the call's deadline and by a budget that all clones share.
//!
//! A repeat waits a random time up to a limit that doubles (full jitter), after what the server asked for. The budget
//! keeps a failing server from being flooded: a repeat takes from it, and only answers fill it again.

use std::{
    future::Future,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Response, Status};

use crate::{Error, Result};

/// The limit of the first pause; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The limit that pauses do not outgrow.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How many answered calls it takes to earn one repeat.
const ANSWERS_A_REPEAT: u32 = 10;

/// Growing pauses between tries: a random time up to a limit that doubles from 50 ms to 2 s.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    pauses: u32,
}

impl Backoff {
    /// Starts at the shortest pause.
    #[must_use]
    pub const fn new() -> Self {
        Self { pauses: 0 }
    }

    /// How long to pause now. The next pause may be longer.
    pub fn pause(&mut self) -> Duration {
        let limit = limit(self.pauses);
        self.pauses = self.pauses.saturating_add(1);
        // Without randomness the whole limit is waited: too long rather than all at once.
        getrandom::u32().map_or(limit, |random| share(limit, random))
    }

    /// Starts over, after a try that went well.
    pub fn reset(&mut self) {
        self.pauses = 0;
    }
}

fn limit(pauses: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << pauses.min(16)).min(LONGEST_PAUSE)
}

fn share(limit: Duration, random: u32) -> Duration {
    limit.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// What a call allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// It may be repeated whatever became of it.
    Always,
    /// It may be repeated only if it was never sent.
    IfUnsent,
}

/// How many repeats are left, in shares of which a repeat takes [`ANSWERS_A_REPEAT`] and an answer gives back one.
#[derive(Debug)]
pub(crate) struct Budget {
    shares: AtomicU32,
    most: u32,
}

impl Budget {
    pub(crate) fn new(repeats: u32) -> Self {
        let most = repeats.saturating_mul(ANSWERS_A_REPEAT);
        Self { shares: AtomicU32::new(most), most }
    }

    fn earn(&self) {
        let more = |shares: u32| (shares < self.most).then(|| shares + 1);
        // An Err means that it is full already.
        let _ = self.shares.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    fn spend(&self) -> bool {
        let less = |shares: u32| shares.checked_sub(ANSWERS_A_REPEAT);
        self.shares.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Tries a call until it is answered, refused, or not worth repeating. `attempt` gets the time that is left.
    pub(crate) async fn run<T, F, Fut>(&self, deadline: Instant, repeat: Repeat, mut attempt: F) -> Result<T>
    where
        F: FnMut(Duration) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut backoff = Backoff::new();
        let mut last = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match timeout_at(deadline, attempt(left)).await {
                Ok(Ok(answer)) => {
                    self.earn();
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => Error::from(status),
                Err(_) => return Err(Error::deadline(last)),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            match self.pause(&error, repeat, backoff.pause(), left) {
                Some(pause) => sleep(pause).await,
                None => return Err(error),
            }
            last = Some(error);
        }
    }

    /// How long to pause before the next try, if there is to be one.
    fn pause(&self, error: &Error, repeat: Repeat, backoff: Duration, left: Duration) -> Option<Duration> {
        if !error.is_retriable() || (repeat == Repeat::IfUnsent && !error.is_unsent()) {
            return None;
        }
        let pause = backoff.saturating_add(error.retry_after().unwrap_or_default());
        (pause < left && self.spend()).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::{cell::Cell, collections::HashMap};

    use data_queue_proto::{ERROR_DOMAIN, reason};
    use tonic::{Code, ConnectError};
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;
    use crate::ErrorKind;

    const SECOND: Duration = Duration::from_secs(1);

    fn unavailable(retry_after: Option<Duration>) -> Status {
        let mut details = ErrorDetails::with_error_info(reason::SHUTTING_DOWN, ERROR_DOMAIN, HashMap::new());
        details.set_retry_info(retry_after);
        Status::with_error_details(Code::Unavailable, "stopping", details)
    }

    /// Runs a call whose tries all fail so; answers the error, the tries and the time they took.
    async fn failing(budget: &Budget, repeat: Repeat, within: Duration, status: &Status) -> (Error, u32, Duration) {
        let tries = Cell::new(0);
        let start = Instant::now();
        let answer = budget.run::<(), _, _>(start + within, repeat, |left| {
            assert!(left <= within - start.elapsed());
            tries.set(tries.get() + 1);
            std::future::ready(Err(status.clone()))
        });
        let error = answer.await.unwrap_err();
        (error, tries.get(), start.elapsed())
    }

    #[test]
    fn pauses_are_random_below_a_limit_that_doubles_up_to_two_seconds() {
        let limits: Vec<u128> = (0..8).map(|pauses| limit(pauses).as_millis()).collect();
        assert_eq!(limits, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(limit(u32::MAX), LONGEST_PAUSE);
        assert_eq!((share(SECOND, 0), share(SECOND, u32::MAX)), (Duration::ZERO, SECOND));
        let mut backoff = Backoff::new();
        assert!((0..100).all(|_| backoff.pause() <= LONGEST_PAUSE));
        backoff.reset();
        assert!(backoff.pause() <= FIRST_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_repeated_until_answered() {
        let budget = Budget::new(10);
        let tries = Cell::new(0);
        let answer = budget.run(Instant::now() + 30 * SECOND, Repeat::Always, |_| {
            tries.set(tries.get() + 1);
            let answer = if tries.get() < 4 { Err(Status::unknown("broken")) } else { Ok(Response::new("done")) };
            std::future::ready(answer)
        });
        assert_eq!(answer.await.unwrap(), "done");
        assert_eq!(tries.get(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn tries_end_before_the_deadline_with_the_last_error() {
        let (error, tries, took) = failing(&Budget::new(1000), Repeat::Always, 10 * SECOND, &unavailable(None)).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(tries > 5 && took < 10 * SECOND, "{tries} tries in {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_server_says_how_long_to_wait() {
        let status = unavailable(Some(3 * SECOND));
        let (_, tries, took) = failing(&Budget::new(1000), Repeat::Always, 7 * SECOND, &status).await;
        assert!(tries == 3 && took >= 6 * SECOND, "{tries} tries in {took:?}");
        let status = unavailable(Some(60 * SECOND));
        let (_, tries, took) = failing(&Budget::new(1000), Repeat::Always, 30 * SECOND, &status).await;
        assert_eq!((tries, took), (1, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_that_hangs_ends_with_the_deadline() {
        let budget = Budget::new(10);
        let tries = Cell::new(0);
        let start = Instant::now();
        let answer = budget.run::<(), _, _>(start + 5 * SECOND, Repeat::Always, |_| {
            tries.set(tries.get() + 1);
            let first = tries.get() == 1;
            async move { if first { Err(unavailable(None)) } else { std::future::pending().await } }
        });
        let error = answer.await.unwrap_err();
        assert_eq!((error.kind(), start.elapsed()), (ErrorKind::DeadlineExceeded, 5 * SECOND));
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("SHUTTING_DOWN"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_refused_or_may_have_happened_is_not_repeated() {
        let budget = Budget::new(10);
        let (_, tries, _) = failing(&budget, Repeat::Always, SECOND, &Status::invalid_argument("no")).await;
        assert_eq!(tries, 1);
        let (_, tries, _) = failing(&budget, Repeat::IfUnsent, SECOND, &unavailable(None)).await;
        assert_eq!(tries, 1);
        let status = Status::from_error(Box::new(ConnectError("no route".into())));
        let (_, tries, _) = failing(&budget, Repeat::IfUnsent, SECOND, &status).await;
        assert!(tries > 1);
    }

    #[tokio::test(start_paused = true)]
    async fn repeats_end_with_the_budget_and_answers_earn_new_ones() {
        let budget = Budget::new(3);
        let status = unavailable(None);
        let (_, tries, _) = failing(&budget, Repeat::Always, 60 * SECOND, &status).await;
        assert_eq!(tries, 4);
        let (_, tries, _) = failing(&budget, Repeat::Always, 60 * SECOND, &status).await;
        assert_eq!(tries, 1);
        for _ in 0..ANSWERS_A_REPEAT {
            let answer =
                budget.run(Instant::now() + SECOND, Repeat::Always, |_| std::future::ready(Ok(Response::new(()))));
            answer.await.unwrap();
        }
        let (_, tries, _) = failing(&budget, Repeat::Always, 60 * SECOND, &status).await;
        assert_eq!(tries, 2);
    }
}
