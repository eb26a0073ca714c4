//! How long calls took, and what a part of a run came to.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::pace::Kept;
use crate::Stop;

/// What takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Insert,
    Pop,
    Ack,
    /// From the start of a task's insert to its receipt.
    Delivery,
}

impl Op {
    pub(crate) const ALL: [Self; 4] = [Self::Insert, Self::Pop, Self::Ack, Self::Delivery];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Pop => "pop",
            Self::Ack => "ack",
            Self::Delivery => "delivery",
        }
    }
}

/// The times of one part of a run, in nanoseconds up to an hour, exact to three digits.
pub(crate) struct Meters {
    times: [Mutex<Histogram<u64>>; Op::ALL.len()],
    last: Mutex<Option<Instant>>,
}

impl Meters {
    pub(crate) fn new() -> Result<Self, Stop> {
        const HOUR: u64 = 3_600_000_000_000;
        let histogram = || {
            let made = Histogram::new_with_bounds(1, HOUR, 3);
            made.map(Mutex::new).map_err(|error| Stop::failed(format!("cannot measure: {error}")))
        };
        let times = [histogram()?, histogram()?, histogram()?, histogram()?];
        Ok(Self { times, last: Mutex::new(None) })
    }

    /// Something that began then is done now.
    pub(crate) fn record(&self, op: Op, start: Instant) {
        let now = Instant::now();
        let nanos = u64::try_from(now.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX);
        self.times[op as usize].lock().unwrap_or_else(PoisonError::into_inner).saturating_record(nanos);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = (*last).max(Some(now));
    }

    /// Until the last thing that was recorded.
    pub(crate) fn length(&self, start: Instant) -> Duration {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last.saturating_duration_since(start)).unwrap_or_default()
    }

    /// Of what happened at all.
    pub(crate) fn times(&self) -> Vec<(Op, Histogram<u64>)> {
        let times = |times: &Mutex<Histogram<u64>>| times.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let times = Op::ALL.into_iter().zip(self.times.iter().map(times));
        times.filter(|(_, times)| !times.is_empty()).collect()
    }
}

/// A measured part of a run.
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) length: Duration,
    /// Inserted, or acked if it took tasks.
    pub(crate) tasks: u64,
    /// The intended tasks a second, and what became of that.
    pub(crate) schedule: Option<(f64, Kept)>,
    pub(crate) times: Vec<(Op, Histogram<u64>)>,
}

impl Phase {
    pub(crate) fn tasks_per_second(&self) -> f64 {
        let seconds = self.length.as_secs_f64();
        if seconds > 0.0 { self.tasks as f64 / seconds } else { 0.0 }
    }
}
