//! What was delivered, task by task, and the payloads that make it checkable.

use bytes::Bytes;

use crate::fault::Result;

/// Every payload begins with its task's number in so many digits; a payload of 12 bytes is nothing else.
const DIGITS: usize = 12;

/// The payload of a task.
pub(crate) fn payload(number: u64, size: usize) -> Bytes {
    let mut bytes = format!("{number:0DIGITS$}").into_bytes();
    bytes.resize(size, filler(number));
    bytes.into()
}

/// Differs from task to task, so that a payload that ends up in another task is noticed.
fn filler(number: u64) -> u8 {
    b'a' + (number % 26) as u8
}

/// Which tasks were delivered, and how many were acked.
pub(crate) struct Ledger {
    size: usize,
    delivered: Vec<u64>,
    count: u64,
    acked: u64,
}

impl Ledger {
    /// A ledger for payloads of this size.
    pub(crate) fn new(size: usize) -> Self {
        Self { size, delivered: Vec::new(), count: 0, acked: 0 }
    }

    /// Of the payloads.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Notes a delivery; a task that comes again, or not as it was inserted, is a fault.
    pub(crate) fn deliver(&mut self, payload: &[u8]) -> Result<u64> {
        let digits = payload.get(..DIGITS).and_then(|digits| std::str::from_utf8(digits).ok());
        let number = digits.and_then(|digits| digits.parse::<u64>().ok());
        let number = number.ok_or("a task came that nobody inserted")?;
        if payload.len() != self.size || payload[DIGITS..].iter().any(|byte| *byte != filler(number)) {
            return Err(format!("task {number} came with another payload").into());
        }
        self.deliver_checked(number)
    }

    /// Notes a delivery whose payload a client has checked that is a program of its own.
    pub(crate) fn deliver_checked(&mut self, number: u64) -> Result<u64> {
        let (word, bit) = (usize::try_from(number / 64)?, 1 << (number % 64));
        if word >= self.delivered.len() {
            self.delivered.resize(word + 1, 0);
        }
        if self.delivered[word] & bit != 0 {
            return Err(format!("task {number} was delivered twice").into());
        }
        self.delivered[word] |= bit;
        self.count += 1;
        Ok(number)
    }

    /// Notes acks that the queue has confirmed.
    pub(crate) fn acked(&mut self, count: u64) {
        self.acked += count;
    }

    /// How many tasks were delivered so far.
    pub(crate) fn delivered(&self) -> u64 {
        self.count
    }

    /// Tasks 0 to `inserted` were delivered, each once, and acked; no other.
    pub(crate) fn verify(&self, inserted: u64) -> Result<()> {
        let beyond = self.delivered.iter().enumerate().rev().find(|(_, word)| **word != 0);
        let end = beyond.map_or(0, |(index, word)| index as u64 * 64 + 64 - u64::from(word.leading_zeros()));
        if self.count != inserted || end > inserted {
            return Err(format!("{inserted} tasks were inserted, {} delivered", self.count).into());
        }
        if self.acked != inserted {
            return Err(format!("{inserted} tasks were inserted, {} acked", self.acked).into());
        }
        Ok(())
    }
}
