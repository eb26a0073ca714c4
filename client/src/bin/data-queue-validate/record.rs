//! The judge: what the run itself saw, and what follows from it. It has no clock and makes no calls.
//!
//! It raises no false alarm. Answers can overtake each other on their way, so an order of two events at the server is
//! taken as given only if one call was begun after the other was answered; and a lease is taken as held only for as long
//! as it must have been, counted from before it was asked for. A redelivery is a fault only where both orders would be.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::{Duration, Instant},
};

use md5::{Digest, Md5};

/// How many faults are told one by one.
const FAULTS_TOLD: usize = 10;
/// How many deliveries of a task are remembered.
const HOLDS_KEPT: usize = 8;

/// A task as it was popped.
pub(crate) struct Delivery<'a> {
    pub(crate) id: &'a str,
    pub(crate) lease_token: &'a str,
    pub(crate) value: Value<'a>,
    /// When the pop was begun, its first try; or a time before that.
    pub(crate) asked: Instant,
    pub(crate) answered: Instant,
    /// The lease that was asked for. Zero: it may be back at any time.
    pub(crate) lease: Duration,
}

/// What is known of a value that was delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    /// It is this JSON text.
    Json(&'a str),
    /// It is no JSON, as every inserted one is.
    Other,
    /// A worker of another program took this of its bytes.
    Md5(&'a str),
}

/// What the record knows about a task that was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// An insert answered with its id.
    Inserted,
    /// No insert answered with its id yet.
    No,
    /// It was acked before this delivery came in. Its lease should not be good.
    Acked,
}

/// All that was seen.
#[derive(Default)]
pub(crate) struct Record {
    tasks: HashMap<Box<str>, Entry>,
    totals: Totals,
    faults: Vec<String>,
    shares: BTreeMap<Box<str>, Share>,
    complete: bool,
}

/// What a worker did of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) deliveries: u64,
    pub(crate) acked: u64,
}

#[derive(Default)]
struct Totals {
    inserted: u64,
    deliveries: u64,
    redeliveries: u64,
    lease_lost: u64,
    // Inserted, and neither acked nor given up as unexpected.
    open: u64,
    open_bytes: u64,
}

#[derive(Default)]
struct Entry {
    inserted: bool,
    // What was inserted or, before that is known, what was first delivered. Dropped once the task is settled.
    value: Option<Box<str>>,
    // The same, of a worker that told no more of it.
    md5: Option<Box<str>>,
    bytes: u64,
    delivered: bool,
    holds: Vec<Hold>,
    acked: Option<Ack>,
    settled: bool,
    doubled: bool,
    unexpected: bool,
}

/// One delivery: it happened between `asked` and `answered`, and is held at least until `until`.
struct Hold {
    lease_token: Box<str>,
    asked: Instant,
    answered: Instant,
    until: Instant,
}

struct Ack {
    lease_token: Box<str>,
    answered: Instant,
}

impl Record {
    /// An insert answered with this id for this value.
    pub(crate) fn inserted(&mut self, id: &str, value: String) {
        let Self { tasks, totals, faults, .. } = self;
        totals.inserted += 1;
        let entry = tasks.entry(id.into()).or_default();
        if entry.inserted {
            return entry.double(faults, id, "two inserts answered with this id");
        }
        entry.inserted = true;
        entry.bytes = value.len() as u64;
        totals.open += 1;
        totals.open_bytes += entry.bytes;
        let other = entry.value.as_deref().is_some_and(|seen| seen != value);
        if other || entry.md5.take().is_some_and(|seen| *seen != *md5_hex(&value)) {
            entry.surprise(faults, id, "it was delivered with another value");
        }
        entry.value = Some(value.into());
        if entry.unexpected || entry.acked.is_some() {
            entry.settle(totals);
        }
    }

    /// Every insert was answered: from now on, an id that none of them answered with is nobody's.
    pub(crate) fn complete(&mut self) {
        self.complete = true;
    }

    /// Whether all is inserted and nothing is left to ack.
    pub(crate) fn is_settled(&self) -> bool {
        self.complete && self.totals.open == 0
    }

    /// The bytes of the values that are inserted and not yet acked.
    pub(crate) fn open_bytes(&self) -> u64 {
        self.totals.open_bytes
    }

    /// A task was popped.
    pub(crate) fn delivered(&mut self, delivery: &Delivery<'_>) -> Known {
        let Self { tasks, totals, faults, .. } = self;
        let Delivery { id, lease_token, value, asked, answered, lease } = *delivery;
        let entry = tasks.entry(id.into()).or_default();
        totals.deliveries += 1;
        totals.redeliveries += u64::from(entry.delivered);
        entry.delivered = true;
        entry.compare(faults, id, value);
        if entry.unexpected {
            entry.settle(totals);
        }

        let until = asked + sure(lease);
        let held = |hold: &Hold| answered < hold.until && hold.answered < until;
        if entry.acked.as_ref().is_some_and(|ack| asked > ack.answered) {
            entry.double(faults, id, "it was delivered after its ack was confirmed");
        } else if entry.holds.iter().any(|hold| *hold.lease_token == *lease_token) {
            entry.double(faults, id, "a lease token was delivered twice");
        } else if entry.holds.iter().any(held) {
            entry.double(faults, id, "it was delivered while another delivery held it");
        }
        if entry.acked.is_some() {
            return Known::Acked;
        }
        if entry.holds.len() == HOLDS_KEPT {
            entry.holds.remove(0);
        }
        entry.holds.push(Hold { lease_token: lease_token.into(), asked, answered, until });
        if entry.inserted { Known::Inserted } else { Known::No }
    }

    /// A task came in damaged: its md5 is not that of its value.
    pub(crate) fn damaged(&mut self, id: &str) {
        let Self { tasks, totals, faults, .. } = self;
        let entry = tasks.entry(id.into()).or_default();
        totals.deliveries += 1;
        totals.redeliveries += u64::from(entry.delivered);
        entry.delivered = true;
        entry.surprise(faults, id, "its md5 is not that of its value");
        entry.settle(totals);
    }

    /// A heartbeat, begun at `asked`, was answered with APPLIED.
    pub(crate) fn extended(&mut self, id: &str, lease_token: &str, asked: Instant, lease: Duration) {
        let Self { tasks, faults, .. } = self;
        let Some(entry) = tasks.get_mut(id) else { return };
        if entry.acked.as_ref().is_some_and(|ack| asked > ack.answered) {
            return entry.double(faults, id, "it was held after its ack was confirmed");
        }
        if entry.is_stale(lease_token, asked) {
            entry.double(faults, id, "a heartbeat was applied for an older delivery");
        }
        if let Some(hold) = entry.holds.iter_mut().find(|hold| *hold.lease_token == *lease_token) {
            hold.until = hold.until.max(asked + sure(lease));
        }
    }

    /// An ack, begun at `asked`, was answered with APPLIED or, if `before`, with ALREADY_ACKED: an earlier try of it was. Answers
    /// whether it is the first of its task.
    pub(crate) fn acked(
        &mut self,
        id: &str,
        lease_token: &str,
        asked: Instant,
        answered: Instant,
        before: bool,
    ) -> bool {
        let Self { tasks, totals, faults, .. } = self;
        let Some(entry) = tasks.get_mut(id) else { return false };
        if !before && entry.is_stale(lease_token, asked) {
            entry.double(faults, id, "an ack was applied for an older delivery");
        }
        match &entry.acked {
            Some(first) if before && *first.lease_token == *lease_token => false,
            Some(_) => {
                entry.double(faults, id, "it was acked twice");
                false
            }
            None => {
                entry.acked = Some(Ack { lease_token: lease_token.into(), answered });
                entry.holds = Vec::new();
                entry.settle(totals);
                true
            }
        }
    }

    /// The part of the worker of this name.
    pub(crate) fn share(&mut self, worker: &str) -> &mut Share {
        self.shares.entry(worker.into()).or_default()
    }

    /// A heartbeat or an ack was answered with LEASE_LOST.
    pub(crate) fn lease_lost(&mut self) {
        self.totals.lease_lost += 1;
    }

    /// What follows.
    pub(crate) fn verdict(&self) -> Verdict {
        let count = |what: fn(&Entry) -> bool| self.tasks.values().filter(|entry| what(entry)).count() as u64;
        let acked = count(|entry| entry.inserted && entry.acked.is_some());
        let nobodys = if self.complete { count(|entry| !entry.inserted && !entry.unexpected) } else { 0 };
        let Totals { inserted, deliveries, redeliveries, lease_lost, .. } = self.totals;
        Verdict {
            inserted,
            deliveries,
            redeliveries,
            acked,
            missing: inserted - acked,
            doubled: count(|entry| entry.doubled),
            unexpected: count(|entry| entry.unexpected) + nobodys,
            lease_lost,
            faults: self.faults.clone(),
            shares: self.shares.clone(),
        }
    }
}

impl Entry {
    fn compare(&mut self, faults: &mut Vec<String>, id: &str, seen: Value<'_>) {
        let is_other = match (seen, &self.value) {
            (Value::Other, _) => return self.surprise(faults, id, "its value is not JSON"),
            (Value::Json(text), Some(value)) => text != &**value,
            (Value::Md5(md5), Some(value)) => md5 != md5_hex(value),
            (_, None) => false,
        };
        if is_other {
            self.surprise(faults, id, "its value is another");
        } else if !self.inserted {
            match seen {
                Value::Json(text) => self.value = Some(text.into()),
                Value::Md5(md5) => self.md5 = Some(md5.into()),
                Value::Other => {}
            }
        }
    }

    /// Whether a call with this token, begun at `asked`, was begun when a later delivery had come in.
    fn is_stale(&self, lease_token: &str, asked: Instant) -> bool {
        let own = self.holds.iter().find(|hold| *hold.lease_token == *lease_token);
        let later = |own: &Hold| self.holds.iter().any(|hold| hold.asked > own.answered && hold.answered < asked);
        own.is_some_and(later)
    }

    fn settle(&mut self, totals: &mut Totals) {
        if self.inserted && !self.settled {
            self.settled = true;
            self.value = None;
            totals.open -= 1;
            totals.open_bytes -= self.bytes;
        }
    }

    fn double(&mut self, faults: &mut Vec<String>, id: &str, what: &str) {
        self.doubled = true;
        tell(faults, "doubled", id, what);
    }

    fn surprise(&mut self, faults: &mut Vec<String>, id: &str, what: &str) {
        self.unexpected = true;
        tell(faults, "unexpected", id, what);
    }
}

fn md5_hex(text: &str) -> String {
    Md5::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tell(faults: &mut Vec<String>, kind: &str, id: &str, what: &str) {
    if faults.len() < FAULTS_TOLD {
        faults.push(format!("{kind}: task {id}: {what}"));
    }
}

/// How much of a lease is surely held: the store's clock and this one may run a little differently.
fn sure(lease: Duration) -> Duration {
    lease.mul_f64(0.9)
}

/// The table at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) inserted: u64,
    pub(crate) deliveries: u64,
    pub(crate) redeliveries: u64,
    pub(crate) acked: u64,
    /// Inserted, and never acked.
    pub(crate) missing: u64,
    /// Acked twice, held twice, or delivered after the ack.
    pub(crate) doubled: u64,
    /// Never inserted, or not as it was inserted.
    pub(crate) unexpected: u64,
    pub(crate) lease_lost: u64,
    faults: Vec<String>,
    shares: BTreeMap<Box<str>, Share>,
}

impl Verdict {
    pub(crate) fn is_good(&self) -> bool {
        self.missing == 0 && self.doubled == 0 && self.unexpected == 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in [
            ("inserted", self.inserted),
            ("deliveries", self.deliveries),
            ("redeliveries", self.redeliveries),
            ("acked", self.acked),
            ("missing", self.missing),
            ("doubled", self.doubled),
            ("unexpected", self.unexpected),
            ("lease lost", self.lease_lost),
        ] {
            writeln!(f, "{name:<12} {count:>12}")?;
        }
        if !self.shares.is_empty() {
            writeln!(f, "\n{:<12} {:>12} {:>12} {:>7}", "worker", "deliveries", "acked", "share")?;
        }
        for (worker, Share { deliveries, acked }) in &self.shares {
            #[allow(clippy::cast_precision_loss)] // Of a percentage with one digit.
            let percent = 100.0 * *acked as f64 / self.acked.max(1) as f64;
            writeln!(f, "{worker:<12} {deliveries:>12} {acked:>12} {percent:>5.1} %")?;
        }
        self.faults.iter().try_for_each(|fault| writeln!(f, "{fault}"))
    }
}

#[cfg(test)]
mod tests;
