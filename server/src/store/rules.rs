//! The rules of queues, and what can be set for one of them.

use std::collections::BTreeMap;

use super::Millis;

/// How a store remembers request ids and acked tokens.
#[derive(Clone, Copy, Debug)]
pub struct Remember {
    /// How long an entry is remembered at least; it is forgotten after at most twice this.
    pub window: Millis,
    /// The most entries of a kind that a queue remembers; at least the newest half of them.
    pub entries: u64,
}

impl Remember {
    /// The most producers that a queue remembers; those that inserted last.
    pub fn producers(&self) -> u64 {
        (self.entries / 100).max(1)
    }

    /// Whether a producer that inserted something last at this time is forgotten.
    pub(super) fn has_forgotten_producer(&self, inserted_at: Millis, now: Millis) -> bool {
        now >= inserted_at + 2 * self.window
    }
}

/// What a store is told of the rules of queues: where a queue's settings say nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How requests and acks are remembered.
    pub remember: Remember,
    /// How long a pop or heartbeat that does not say holds a task.
    pub lease: Millis,
    /// A task whose holders said so often that it failed is a dead letter. At least 1.
    pub max_failures: u32,
    /// A task whose leases ran out so often is a dead letter. At least 1.
    pub max_expiries: u32,
    /// After how long a task that failed can be popped again.
    pub backoff: Backoff,
}

/// The rules of most tests.
#[cfg(test)]
pub(crate) const TEST_RULES: Rules = Rules {
    remember: Remember { window: 300_000, entries: 1_000_000 },
    lease: 30_000,
    max_failures: 20,
    max_expiries: 20,
    backoff: Backoff { min: 1_000, max: 60_000 },
};

/// A thing that can be set for a queue. Its value is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Setting {
    /// [`Rules::lease`], in milliseconds.
    Lease,
    /// [`Rules::max_failures`].
    MaxFailures,
    /// [`Rules::max_expiries`].
    MaxExpiries,
    /// [`Backoff::min`], in milliseconds.
    BackoffMin,
    /// [`Backoff::max`], in milliseconds.
    BackoffMax,
    /// The most tasks that are ready, scheduled or leased: an insert of more is refused. Unset: any number.
    MaxTasks,
    /// The most bytes that the envelopes of these may have in all. Unset: any number.
    MaxBytes,
    /// How long dead letters are kept, in milliseconds; then they are gone, and counted as expired. Unset: for ever.
    DeadLetterRetention,
    /// Anything but 0: nothing is delivered. What is held may be finished.
    Paused,
    /// Over how many shards a store spreads the queue that can: a power of two up to [`MAX_SHARDS`](super::MAX_SHARDS). Unset: one.
    /// It changes only while the queue has no tasks.
    Shards,
}

impl Setting {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Lease,
        Self::MaxFailures,
        Self::MaxExpiries,
        Self::BackoffMin,
        Self::BackoffMax,
        Self::MaxTasks,
        Self::MaxBytes,
        Self::DeadLetterRetention,
        Self::Paused,
        Self::Shards,
    ];

    /// Under which a store keeps it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::MaxFailures => "max_failures",
            Self::MaxExpiries => "max_expiries",
            Self::BackoffMin => "backoff_min",
            Self::BackoffMax => "backoff_max",
            Self::MaxTasks => "max_tasks",
            Self::MaxBytes => "max_bytes",
            Self::DeadLetterRetention => "dead_letter_retention",
            Self::Paused => "paused",
            Self::Shards => "shards",
        }
    }
}

/// What is set for a queue; where nothing is, the rules hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<Setting, u64>);

impl Settings {
    /// What it is set to.
    pub fn get(&self, setting: Setting) -> Option<u64> {
        self.0.get(&setting).copied()
    }

    /// Sets it, or leaves it to the rules.
    pub fn set(&mut self, setting: Setting, value: Option<u64>) {
        match value {
            Some(value) => self.0.insert(setting, value),
            None => self.0.remove(&setting),
        };
    }

    /// Whether nothing is delivered.
    pub fn paused(&self) -> bool {
        self.get(Setting::Paused).is_some_and(|value| value != 0)
    }

    /// Over how many shards the queue is spread.
    pub fn shards(&self) -> u64 {
        self.get(Setting::Shards).unwrap_or(1)
    }

    /// Whether these changes spread the queue over another number of shards.
    pub(crate) fn would_spread(&self, changes: &[(Setting, Option<u64>)]) -> bool {
        let last = changes.iter().rev().find(|(setting, _)| *setting == Setting::Shards);
        last.is_some_and(|(_, value)| value.unwrap_or(1) != self.shards())
    }

    /// The rules of this queue.
    pub fn over(&self, rules: Rules) -> Rules {
        let count = |setting, rule: u32| self.get(setting).map_or(rule, |value| value.min(u32::MAX.into()) as u32);
        Rules {
            remember: rules.remember,
            lease: self.get(Setting::Lease).unwrap_or(rules.lease),
            max_failures: count(Setting::MaxFailures, rules.max_failures),
            max_expiries: count(Setting::MaxExpiries, rules.max_expiries),
            backoff: Backoff {
                min: self.get(Setting::BackoffMin).unwrap_or(rules.backoff.min),
                max: self.get(Setting::BackoffMax).unwrap_or(rules.backoff.max),
            },
        }
    }
}

/// After how long a task that failed can be popped again: `min` after the first failure, twice as long after each further one,
/// at most `max`, or `min` if that is greater; and up to a quarter of that longer, at random, so that what failed together does not come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure. 0: at once, whatever the number of failures.
    pub min: Millis,
    /// At most, the random part left out.
    pub max: Millis,
}

impl Backoff {
    /// `chance` is what the random part is made of. `nth` counts the tasks that one call puts back, in the order of their
    /// delivery and from 0 on: they are spread, and only the random part of the first is `chance` itself.
    pub(crate) fn after(&self, failures: u32, chance: u16, nth: usize) -> Millis {
        let doubled = self.min.saturating_mul(1 << failures.saturating_sub(1).min(40));
        let span = doubled.min(self.max.max(self.min));
        // The golden ratio of 2^16: neighbours end up far apart.
        let part = (u64::from(chance) + 40_503 * nth as u64) % 65_536;
        span + (span / 4) * part / 65_536
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { min: 1_000, max: 6_000 };

    #[test]
    fn the_backoff_doubles_up_to_its_maximum_whatever_the_number_of_failures() {
        let spans = [1, 2, 3, 4, 5, 64, u32::MAX].map(|failures| BACKOFF.after(failures, 0, 0));
        assert_eq!(spans, [1_000, 2_000, 4_000, 6_000, 6_000, 6_000, 6_000]);
        assert_eq!(Backoff { min: 0, max: 6_000 }.after(9, u16::MAX, 1), 0);
        assert_eq!(Backoff { min: 9_000, max: 6_000 }.after(2, 0, 0), 9_000, "the greater one holds");
    }

    #[test]
    fn the_random_part_is_less_than_a_quarter_and_spreads_what_goes_together() {
        for chance in [0, 1, 40_000, u16::MAX] {
            let mut spans: Vec<Millis> = (0..100).map(|nth| BACKOFF.after(1, chance, nth)).collect();
            assert!(spans.iter().all(|span| (1_000..1_250).contains(span)), "{spans:?}");
            assert_eq!(spans[0], 1_000 + 250 * u64::from(chance) / 65_536, "that of the first is the chance itself");
            spans.sort_unstable();
            spans.dedup();
            assert!(spans.len() > 90, "{spans:?}");
        }
    }

    #[test]
    fn what_is_set_goes_over_the_rules_and_what_is_not_does_not() {
        let mut settings = Settings::default();
        for (setting, value) in [(Setting::Lease, 7), (Setting::MaxExpiries, u64::MAX), (Setting::BackoffMin, 5)] {
            settings.set(setting, Some(value));
        }
        let rules = settings.over(TEST_RULES);
        assert_eq!((rules.lease, rules.max_expiries), (7, u32::MAX));
        assert_eq!(rules.max_failures, TEST_RULES.max_failures);
        assert_eq!(rules.backoff, Backoff { min: 5, ..TEST_RULES.backoff });
        settings.set(Setting::Lease, None);
        assert_eq!(settings.over(TEST_RULES).lease, TEST_RULES.lease);
    }

    #[test]
    fn settings_have_names_of_their_own() {
        let mut names = Setting::ALL.map(Setting::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Setting::ALL.len());
    }
}
