//! What the stores of all threads of a process share, and how it is set up.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use super::{
    Access, fitness,
    fitness::{Epochs, Unfit},
    keys::Keys,
    link::{Presence, Probe, Standing},
    route::Route,
    script::{Call, Sources},
};
use crate::store::{QueueName, Rules, StoreError, hex};

/// What the stores of all threads of a process share.
pub struct RedisShared {
    pub(super) route: Arc<Route>,
    pub(super) keys: Keys,
    pub(super) server: String,
    pub(super) rules: Rules,
    pub(super) timeout: Duration,
    pub(super) presence: Arc<Presence>,
    pub(super) probe: tokio::sync::Mutex<Probe>,
    accept_reset: bool,
    #[cfg(test)]
    clock: Arc<std::sync::atomic::AtomicU64>,
    epochs: Mutex<Epochs>,
    owners: RwLock<Vec<(u16, u16)>>,
    pub(super) known: Mutex<Known>,
}

/// What this process knows about Redis' data.
#[derive(Default)]
pub(super) struct Known {
    pub(super) report: Option<fitness::Report>,
    pub(super) registered: HashSet<QueueName>,
    pub(super) without_keys: HashMap<QueueName, Instant>,
    /// Queues that a list left out, which the log was told.
    pub(super) left_out: HashSet<QueueName>,
}

/// How to reach Redis.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// One of [`FORMS`](super::FORMS).
    pub url: String,
    /// Who asks, if the address does not say.
    pub access: Access,
    /// In front of every key: letters, digits, `_` and `-`.
    pub key_prefix: String,
    /// Go on when the data are gone.
    pub accept_reset: bool,
    /// Bounds a call, connecting included.
    pub timeout: Duration,
    /// The rules of its queues.
    pub rules: Rules,
}

impl RedisShared {
    /// Reads the address; connects to nothing.
    pub fn new(config: &RedisConfig) -> Result<Self, String> {
        let route = Arc::new(Route::new(&config.url, &config.access, config.timeout)?);
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(|error| error.to_string())?;
        Ok(Self {
            keys: Keys::new(&config.key_prefix),
            server: hex(&name),
            rules: config.rules,
            timeout: config.timeout,
            presence: Arc::new(Presence::new(route.address().to_string())),
            probe: tokio::sync::Mutex::new(Probe::new(Arc::clone(&route), config.timeout)),
            known: Mutex::default(),
            accept_reset: config.accept_reset,
            #[cfg(test)]
            clock: test_clock(&config.url),
            epochs: Mutex::default(),
            owners: RwLock::default(),
            route,
        })
    }

    pub(super) fn call(&self, script: &'static Sources, queue: &QueueName) -> Call {
        Call::new(script, self.route.address().is_cluster(), &self.keys.meta(queue))
            .arg(self.rules.remember.window)
            .arg((self.rules.remember.entries / 2).max(1))
            .arg(&self.server)
            .arg(queue.as_str())
            .arg(self.channels())
            .arg(self.rules.max_expiries)
    }

    /// In front of the names of servers.
    #[cfg(not(test))]
    fn channels(&self) -> String {
        self.keys.channels()
    }

    /// Behind it is the time that the tests' prelude reads.
    #[cfg(test)]
    fn channels(&self) -> String {
        format!("{}\n{}", self.keys.channels(), self.clock.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// The time of all scripts on this Redis.
    #[cfg(test)]
    pub(in crate::store) fn set_test_clock(&self, now: crate::store::Millis) {
        self.clock.store(now, std::sync::atomic::Ordering::Relaxed);
    }

    /// A key of a queue, by the name of its part.
    #[cfg(test)]
    pub(in crate::store) fn key_of(&self, queue: &QueueName, part: &str) -> String {
        self.keys.part_of(queue, part)
    }

    pub(super) fn known<T>(&self, with: impl FnOnce(&mut Known) -> T) -> T {
        with(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A number for the node that has this queue, as far as is known: the same for all of its queues.
    pub(super) fn node_of(&self, queue: &QueueName) -> u16 {
        if !self.route.address().is_cluster() {
            return 0;
        }
        let slot = self.keys.slot(queue);
        let owners = self.owners.read().unwrap_or_else(PoisonError::into_inner);
        let at = owners.partition_point(|(last, _)| *last < slot);
        owners.get(at).map_or(0, |(_, node)| *node)
    }

    /// The histories that were seen, which the next check has to find again.
    pub(super) fn epochs(&self) -> Epochs {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes what a check found: logs changes, and forgets what was known about another run of Redis.
    pub(super) fn note(&self, found: Result<fitness::Report, Unfit>) -> Result<(), StoreError> {
        match found {
            Ok(mut report) => {
                *self.epochs.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut report.epochs);
                *self.owners.write().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut report.owners);
                let news = self.known(|known| {
                    let news = known.report.as_ref() != Some(&report);
                    if news {
                        *known = Known { report: Some(report.clone()), ..Known::default() };
                    }
                    news
                });
                if news {
                    self.presence.begin_epoch();
                }
                if news && !report.absent.is_empty() {
                    let masters = report.absent.join(", ");
                    tracing::warn!(
                        masters,
                        "masters of the cluster do not answer; their queues stand still until others take over"
                    );
                }
                if self.presence.set(Standing::Fit) || news {
                    let (address, version, survives) = (self.presence.address(), report.version, report.note);
                    match report.durable {
                        true => tracing::info!(
                            address,
                            version,
                            "connected to Redis; what was answered OK survives {survives}"
                        ),
                        false => tracing::warn!(
                            address,
                            version,
                            "connected to Redis; what was answered OK survives {survives}"
                        ),
                    }
                }
                Ok(())
            }
            Err(Unfit::Reset(key)) if self.accept_reset => {
                let address = self.presence.address();
                tracing::warn!(address, key, "Redis came back without its data; this server goes on (--accept-reset)");
                self.epochs.lock().unwrap_or_else(PoisonError::into_inner).clear();
                self.presence.begin_epoch();
                let message = format!("Redis at {address} came back without its data, which is accepted; one moment");
                self.presence.set(Standing::Away(message.as_str().into()));
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
            Err(Unfit::Reset(key)) => {
                let message = format!(
                    "Redis at {} has lost its data, or is another one: {key} is not what it was; bring the data back, or start the servers \
                     anew if it is right",
                    self.presence.address()
                );
                if self.presence.set(Standing::Reset(message.as_str().into())) {
                    self.presence.begin_epoch();
                }
                Err(StoreError::DatasetReset(message))
            }
            Err(Unfit::Problem(message)) => {
                if self.presence.set(Standing::Away(message.as_str().into())) {
                    self.presence.begin_epoch();
                }
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
        }
    }
}

/// All servers of a Redis have one time, as they have without a test.
#[cfg(test)]
fn test_clock(url: &str) -> Arc<std::sync::atomic::AtomicU64> {
    static CLOCKS: Mutex<std::collections::BTreeMap<String, Arc<std::sync::atomic::AtomicU64>>> =
        Mutex::new(std::collections::BTreeMap::new());
    let mut clocks = CLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(clocks.entry(url.to_owned()).or_default())
}
