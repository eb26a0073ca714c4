//! Which tasks were delivered and acked, task by task, and the values that make it checkable.
//!
//! A value begins with its task's number; then, if there is room, comes the time at which its insert started, and then a
//! byte that differs from task to task. Numbers that are done are forgotten from the front, so the ledger is as large as
//! the span from the oldest task that is not acked to the newest one that was delivered.

use std::collections::VecDeque;

use bytes::Bytes;
use data_queue_proto::v1::{self, task};
use md5::{Digest, Md5};

const NUMBER_BYTES: usize = 8;
const STAMPED_BYTES: usize = 16;
const WORD: u64 = 64;

/// The value of a task, whose insert started so many nanoseconds after the run did.
pub(crate) fn value(number: u64, started: u64, size: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(size.max(STAMPED_BYTES));
    bytes.extend(number.to_be_bytes());
    if size >= STAMPED_BYTES {
        bytes.extend(started.to_be_bytes());
    }
    bytes.resize(size, filler(number));
    bytes.into()
}

/// Differs from task to task, so that a value that ends up in another task is noticed.
fn filler(number: u64) -> u8 {
    b'a' + (number % 26) as u8
}

/// A delivery of a task of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) number: u64,
    /// When its insert started, in nanoseconds from the start of the run; nothing if the value has no room for it.
    pub(crate) started: Option<u64>,
}

/// 64 tasks, a bit each.
#[derive(Clone, Copy, Default)]
struct Word {
    delivered: u64,
    acked: u64,
}

/// What was seen. Faults are counted and do not stop the run.
#[derive(Default)]
pub(crate) struct Ledger {
    size: usize,
    /// The first number that `words` is about, a multiple of 64; all before it are acked.
    first: u64,
    words: VecDeque<Word>,
    pub(crate) counts: Counts,
}

/// How many tasks, and deliveries, were what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tasks that were delivered at least once.
    pub(crate) delivered: u64,
    /// Tasks whose ack was applied.
    pub(crate) acked: u64,
    /// Deliveries, or applied acks, of a task that somebody held or that was acked.
    pub(crate) doubled: u64,
    /// Deliveries of what this run did not insert, or not so.
    pub(crate) unexpected: u64,
    /// Deliveries whose md5 is not that of the value.
    pub(crate) damaged: u64,
    /// Deliveries again, after a lease ran out.
    pub(crate) expired: u64,
    /// Acks that came after the lease was taken back.
    pub(crate) lease_lost: u64,
}

impl Ledger {
    /// For values of this size.
    pub(crate) fn new(size: usize) -> Self {
        Self { size, ..Self::default() }
    }

    /// Notes a delivery, when the tasks below `inserted` were inserted or are about to be. Tells which task it is; nothing
    /// if it is none of ours, and must not be acked.
    pub(crate) fn deliver(&mut self, task: &v1::Task, inserted: u64) -> Option<Delivery> {
        let Some(task::Value::Data(data)) = &task.value else {
            self.counts.unexpected += 1;
            return None;
        };
        if md5_hex(data) != task.md5 {
            self.counts.damaged += 1;
            return None;
        }
        let Some(delivery) = self.read(data).filter(|delivery| delivery.number < inserted) else {
            self.counts.unexpected += 1;
            return None;
        };
        let bit = bit(delivery.number);
        match self.word(delivery.number) {
            Some(word) if word.delivered & bit == 0 => {
                word.delivered |= bit;
                self.counts.delivered += 1;
            }
            // The task before it ran out its lease; whoever held it is told LEASE_LOST.
            Some(word) if word.acked & bit == 0 && task.expiries > 0 => self.counts.expired += 1,
            _ => self.counts.doubled += 1,
        }
        Some(delivery)
    }

    /// Notes what became of an ack.
    pub(crate) fn ack(&mut self, number: u64, outcome: v1::Outcome) {
        let bit = bit(number);
        match (outcome, self.word(number)) {
            (v1::Outcome::LeaseLost, _) => self.counts.lease_lost += 1,
            (v1::Outcome::Applied, Some(word)) if word.acked & bit == 0 => {
                word.acked |= bit;
                self.counts.acked += 1;
            }
            // No ack is sent twice, so it cannot have been acked before either.
            _ => self.counts.doubled += 1,
        }
        while self.words.front().is_some_and(|word| word.acked == u64::MAX) {
            self.words.pop_front();
            self.first += WORD;
        }
    }

    fn read(&self, data: &[u8]) -> Option<Delivery> {
        let (head, rest) = data.split_first_chunk::<NUMBER_BYTES>()?;
        let number = u64::from_be_bytes(*head);
        let (started, rest) = match rest.split_first_chunk::<{ STAMPED_BYTES - NUMBER_BYTES }>() {
            Some((stamp, rest)) => (Some(u64::from_be_bytes(*stamp)), rest),
            None => (None, rest),
        };
        let whole = data.len() == self.size && rest.iter().all(|byte| *byte == filler(number));
        whole.then_some(Delivery { number, started })
    }

    /// The word with this number; nothing if all of it is acked.
    fn word(&mut self, number: u64) -> Option<&mut Word> {
        let index = usize::try_from(number.checked_sub(self.first)? / WORD).ok()?;
        if index >= self.words.len() {
            self.words.resize(index + 1, Word::default());
        }
        self.words.get_mut(index)
    }
}

fn bit(number: u64) -> u64 {
    1 << (number % WORD)
}

fn md5_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| char::from(DIGITS[usize::from(half)]);
    Md5::digest(bytes).iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const SIZE: usize = 20;

    fn task(number: u64) -> v1::Task {
        let data = value(number, 7, SIZE);
        v1::Task { md5: md5_hex(&data), value: Some(task::Value::Data(data)), ..v1::Task::default() }
    }

    #[test]
    fn md5_is_lower_case_hex() {
        assert_eq!(md5_hex(b"abc"), "900150983cd24fb0d6963f7d28e17f72");
    }

    #[test]
    fn a_value_says_which_task_it_is_and_when_it_started() {
        for size in [8, 9, 15] {
            let delivery = Ledger::new(size).read(&value(3, 7, size)).unwrap();
            assert_eq!(delivery, Delivery { number: 3, started: None }, "{size}");
        }
        assert_eq!(Ledger::new(16).read(&value(3, 7, 16)).unwrap().started, Some(7));
        assert_eq!(Ledger::new(16).read(&value(3, 7, 17)), None);
    }

    #[test]
    fn a_million_tasks_in_order_take_no_room() {
        let mut ledger = Ledger::new(SIZE);
        for number in 0..1_000_000 {
            assert!(ledger.word(number).is_some());
            ledger.ack(number, v1::Outcome::Applied);
            assert!(ledger.words.len() <= 1);
        }
        assert_eq!(ledger.counts.acked, 1_000_000);
        ledger.deliver(&task(5), 1_000_000);
        assert_eq!(ledger.counts.doubled, 1);
    }

    #[test]
    fn each_fault_is_counted_by_its_name() {
        let mut ledger = Ledger::new(SIZE);
        for number in 0..3 {
            assert_eq!(ledger.deliver(&task(number), 4), Some(Delivery { number, started: Some(7) }));
        }
        ledger.ack(0, v1::Outcome::Applied);
        ledger.ack(1, v1::Outcome::LeaseLost);
        ledger.deliver(&v1::Task { expiries: 1, ..task(1) }, 4);
        let good = Counts { delivered: 3, acked: 1, expired: 1, lease_lost: 1, ..Counts::default() };
        assert_eq!(ledger.counts, good);

        ledger.deliver(&task(2), 4);
        ledger.deliver(&v1::Task { expiries: 1, ..task(0) }, 4);
        ledger.ack(0, v1::Outcome::Applied);
        assert_eq!(ledger.counts.doubled, 3);
        assert_eq!(ledger.deliver(&task(4), 4), None);
        let other = v1::Task { value: Some(task::Value::Json("7".into())), ..task(3) };
        assert_eq!(ledger.deliver(&other, 4), None);
        let mut altered = value(3, 7, SIZE).to_vec();
        altered[SIZE - 1] = b'!';
        let altered = v1::Task { md5: md5_hex(&altered), value: Some(task::Value::Data(altered.into())), ..task(3) };
        assert_eq!(ledger.deliver(&altered, 4), None);
        assert_eq!(ledger.counts.unexpected, 3);
        assert_eq!(ledger.deliver(&v1::Task { md5: md5_hex(b""), ..task(3) }, 4), None);
        assert_eq!(ledger.counts.damaged, 1);
    }
}
