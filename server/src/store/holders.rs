//! Who was answered with a lease.

use super::Attempt;

/// So many tries of a pop are kept apart. With more of them, a lease is given back by nobody, and runs out.
const MAX_HOLDERS: usize = 8;

/// The tries of a repeatable pop that were answered with a lease. They may be answered in another order than they were
/// made, so each of them counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Holders(Vec<Attempt>);

impl Holders {
    /// As they were kept.
    pub(super) fn new(attempts: Vec<Attempt>) -> Self {
        Self(attempts)
    }

    /// To be kept.
    pub(super) fn attempts(&self) -> &[Attempt] {
        &self.0
    }

    /// True if that changed them.
    pub(super) fn add(&mut self, attempt: Option<Attempt>) -> bool {
        match attempt {
            Some(attempt) if self.0.len() <= MAX_HOLDERS && !self.0.contains(&attempt) => {
                self.0.push(attempt);
                true
            }
            _ => false,
        }
    }

    /// Takes a try off. True if nobody else was answered.
    pub(super) fn disown(&mut self, attempt: Option<Attempt>) -> bool {
        let Some(attempt) = attempt else { return self.0.is_empty() };
        let Some(at) = self.0.iter().position(|holder| *holder == attempt) else { return false };
        if self.0.len() <= MAX_HOLDERS {
            self.0.remove(at);
        }
        self.0.is_empty()
    }
}
