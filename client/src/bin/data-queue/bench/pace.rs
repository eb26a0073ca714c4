//! When calls start: at once, or on a fixed schedule.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, watch};

use crate::Stop;

/// What begins later than this after its time is late.
const LATE: Duration = Duration::from_millis(1);
/// How many calls a schedule starts at the most: fewer than a semaphore can count.
const MOST_STARTS: u64 = 1 << 40;

/// Hands out the times at which calls start.
pub(crate) struct Pace {
    start: Instant,
    end: Option<Instant>,
    schedule: Option<Schedule>,
    stopped: watch::Sender<bool>,
}

/// Calls that start at fixed times, whatever the server does.
///
/// Timers of the runtime are exact to a millisecond, which is longer than many a call takes; a thread of its own is exact
/// to a twentieth of that. Starts that are due and not taken are a number, however many they are.
struct Schedule {
    rate: f64,
    due: Arc<Semaphore>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    taken: AtomicU64,
    late: AtomicU64,
    latest: AtomicU64,
}

/// How a schedule was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) begun: u64,
    pub(crate) late: u64,
    pub(crate) latest: Duration,
    pub(crate) not_begun: u64,
}

impl Kept {
    /// Whether the server was loaded as intended: 99 of 100 calls began, and in time.
    pub(crate) fn is_kept(self) -> bool {
        (self.late + self.not_begun).saturating_mul(100) <= self.begun
    }
}

impl Pace {
    /// From now on, for so long; with this many calls a second, or without a schedule.
    pub(crate) fn start(calls_per_second: Option<f64>, length: Option<Duration>) -> Result<Self, Stop> {
        let start = Instant::now();
        let end = length.map(|length| start + length);
        let schedule = calls_per_second.map(|rate| Schedule::start(start, end, rate)).transpose()?;
        Ok(Self { start, end, schedule, stopped: watch::Sender::new(false) })
    }

    /// From now on, as fast as calls are answered, without an end.
    pub(crate) fn free() -> Result<Self, Stop> {
        Self::start(None, None)
    }

    pub(crate) fn started(&self) -> Instant {
        self.start
    }

    /// Waits for the next start, and tells when it is or was to be. Nothing: it is over.
    pub(crate) async fn next(&self) -> Option<Instant> {
        let over = |at: Instant| *self.stopped.borrow() || self.end.is_some_and(|end| at >= end);
        let Some(schedule) = &self.schedule else {
            return Some(Instant::now()).filter(|now| !over(*now));
        };
        // An error: it is over.
        schedule.due.acquire().await.ok()?.forget();
        if over(Instant::now()) {
            return None;
        }
        let intended = self.start + after(schedule.taken.fetch_add(1, Ordering::Relaxed), schedule.rate);
        let delay = intended.elapsed();
        if delay > LATE {
            schedule.late.fetch_add(1, Ordering::Relaxed);
        }
        schedule.latest.fetch_max(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Some(intended)
    }

    /// Nothing starts any more.
    pub(crate) fn stop(&self) {
        self.stopped.send_replace(true);
        if let Some(schedule) = &self.schedule {
            schedule.stop();
        }
    }

    /// Waits until it was stopped.
    pub(crate) async fn stopped(&self) {
        // An error would mean that the sender is gone, which is here.
        let _ = self.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }

    /// How the schedule was kept, if there is one. `planned`: how many calls there were to be; nothing: as many as there
    /// was time for.
    pub(crate) fn kept(&self, planned: Option<u64>) -> Option<Kept> {
        let schedule = self.schedule.as_ref()?;
        let by_time = self.end.map(|end| ((end - self.start).as_secs_f64() * schedule.rate).floor() as u64);
        let begun = schedule.taken.load(Ordering::Relaxed);
        Some(Kept {
            begun,
            late: schedule.late.load(Ordering::Relaxed),
            latest: Duration::from_nanos(schedule.latest.load(Ordering::Relaxed)),
            not_begun: planned.or(by_time).map_or(0, |planned| planned.saturating_sub(begun)),
        })
    }
}

impl Schedule {
    fn start(start: Instant, end: Option<Instant>, rate: f64) -> Result<Self, Stop> {
        let (due, over) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicBool::new(false)));
        let (permits, stopped) = (Arc::clone(&due), Arc::clone(&over));
        let release = move || {
            let mut released = 0;
            while !stopped.load(Ordering::Relaxed) && released < MOST_STARTS {
                let next = start + after(released, rate);
                let at = end.map_or(next, |end| next.min(end));
                let left = at.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    thread::park_timeout(left);
                } else if at < next {
                    break;
                } else {
                    permits.add_permits(1);
                    released += 1;
                }
            }
            permits.close();
        };
        let thread = thread::Builder::new().name("pace".into()).spawn(release);
        let thread = thread.map_err(|error| Stop::failed(format!("cannot start a thread: {error}")))?;
        let [taken, late, latest] = Default::default();
        Ok(Self { rate, due, over, thread: Some(thread), taken, late, latest })
    }

    fn stop(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.due.close();
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It has no way to fail.
            let _ = thread.join();
        }
    }
}

/// When the start with this number is. Not summed up, so that a schedule does not drift.
fn after(number: u64, rate: f64) -> Duration {
    Duration::try_from_secs_f64(number as f64 / rate).unwrap_or(Duration::from_secs(1 << 40))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn start(rate: Option<f64>, length: Option<Duration>) -> Pace {
        Pace::start(rate, length).unwrap_or_else(|Stop(_, line)| panic!("{line}"))
    }

    #[tokio::test]
    async fn starts_are_handed_out_by_the_schedule_whenever_they_are_taken() {
        let pace = start(Some(1000.0), None);
        let mut last = None;
        for count in 0..50 {
            let at = pace.next().await.unwrap();
            assert_eq!(at, pace.start + Duration::from_millis(count));
            assert!(at <= Instant::now() && last < Some(at));
            last = Some(at);
        }
        assert_eq!(pace.kept(Some(60)).unwrap().not_begun, 10);
        pace.stop();
        assert_eq!(pace.next().await, None);
    }

    #[tokio::test]
    async fn what_waited_for_a_caller_is_late_and_keeps_its_time() {
        let pace = start(Some(1000.0), None);
        // As a caller that is busy: it comes for its next start when several are due.
        while pace.schedule.as_ref().unwrap().due.available_permits() < 10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pace.next().await, Some(pace.start));
        let kept = pace.kept(Some(10)).unwrap();
        assert!(kept.late == 1 && kept.latest >= Duration::from_millis(9) && kept.not_begun == 9, "{kept:?}");
    }

    #[tokio::test]
    async fn nothing_starts_after_the_end() {
        for rate in [None, Some(100_000.0)] {
            let pace = start(rate, Some(Duration::from_millis(20)));
            while let Some(at) = pace.next().await {
                assert!(at < pace.end.unwrap());
            }
            assert!(pace.start.elapsed() >= Duration::from_millis(19), "{rate:?}");
        }
    }
}
