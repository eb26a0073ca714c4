//! What the stores of all threads of a process share, and how it is set up.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bb8_redis::redis::Cmd;

use super::{
    Access,
    fitness::{Epochs, Report, Unfit},
    keys::Keys,
    link::{Keyed, Presence, Standing},
    nodes::{Node, Nodes},
    probe::Probe,
    route::Route,
    script::{Call, Sources},
    spread::Spread,
};
use crate::store::{QueueName, Rules, StoreError, hex};

/// What the stores of all threads of a process share.
pub struct RedisShared {
    pub(super) nodes: Arc<Nodes>,
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
    pub(super) known: Mutex<Known>,
    pub(super) spread: Spread,
}

/// What this process knows about Redis' data.
#[derive(Default)]
pub(super) struct Known {
    pub(super) report: Option<Report>,
    pub(super) registered: HashSet<QueueName>,
    /// Those that could not be registered, and will be.
    pub(super) owed: HashSet<QueueName>,
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
        let nodes = Arc::new(Nodes::new(Arc::clone(&route)));
        // Of all of it, for people; and where that is one node, of that.
        let presence = match nodes.is_cluster() {
            true => Arc::new(Presence::new(route.address().to_string())),
            false => nodes.presence(&Node::default()),
        };
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(|error| error.to_string())?;
        Ok(Self {
            keys: Keys::new(&config.key_prefix),
            server: hex(&name),
            rules: config.rules,
            timeout: config.timeout,
            probe: tokio::sync::Mutex::new(Probe::new(Arc::clone(&nodes), Arc::clone(&presence), config.timeout)),
            presence,
            known: Mutex::default(),
            spread: Spread::default(),
            accept_reset: config.accept_reset,
            #[cfg(test)]
            clock: test_clock(&config.url),
            epochs: Mutex::default(),
            nodes,
        })
    }

    pub(super) fn call(&self, script: &'static Sources, queue: &QueueName) -> Call {
        Call::new(script, self.nodes.is_cluster(), &self.keys.meta(queue))
            .arg(self.rules.remember.window)
            .arg((self.rules.remember.entries / 2).max(1))
            .arg(&self.server)
            .arg(hinted(queue))
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

    /// The node that has this queue, as far as is known.
    pub(super) fn owner(&self, queue: &QueueName) -> Node {
        match self.nodes.is_cluster() {
            true => self.nodes.owner(Keys::slot(&self.keys.meta(queue))).unwrap_or_default(),
            false => Node::default(),
        }
    }

    /// A command about this key.
    pub(super) fn keyed(&self, key: &str, command: Cmd) -> Keyed {
        Keyed { slot: if self.nodes.is_cluster() { Keys::slot(key) } else { 0 }, command }
    }

    /// The histories that were seen, which the next check has to find again.
    pub(super) fn epochs(&self) -> Epochs {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes what a check found: logs changes, and forgets what was known about another run of Redis.
    pub(super) fn note(&self, found: Result<(Report, Epochs), Unfit>) -> Result<(), StoreError> {
        match found {
            Ok((report, epochs)) => {
                *self.epochs.lock().unwrap_or_else(PoisonError::into_inner) = epochs;
                self.note_fit(report);
                Ok(())
            }
            Err(Unfit::Reset(key)) if self.accept_reset => {
                let address = self.presence.address();
                tracing::warn!(address, key, "Redis came back without its data; this server goes on (--accept-reset)");
                self.epochs.lock().unwrap_or_else(PoisonError::into_inner).clear();
                let message = format!("Redis at {address} came back without its data, which is accepted; one moment");
                self.stand(&Standing::Away(message.as_str().into()));
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
            Err(Unfit::Reset(key)) => {
                let message = format!(
                    "Redis at {} has lost its data, or is another one: {key} is not what it was; bring the data back, or start the servers \
                     anew if it is right",
                    self.presence.address()
                );
                self.stand(&Standing::Reset(message.as_str().into()));
                Err(StoreError::DatasetReset(message))
            }
            Err(Unfit::Problem(message)) => {
                self.stand(&Standing::Away(message.as_str().into()));
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
        }
    }

    /// No node is fit.
    fn stand(&self, standing: &Standing) {
        let is_news = self.presence.set(standing.clone());
        if self.nodes.set_all(standing) || is_news {
            self.nodes.begin_epoch();
        }
    }

    fn note_fit(&self, report: Report) {
        let news = self.known(|known| {
            let news = known.report.as_ref() != Some(&report);
            if news {
                let owed = std::mem::take(&mut known.owed);
                *known = Known { report: Some(report.clone()), owed, ..Known::default() };
            }
            news
        });
        // Of what is no cluster, there are none.
        for node in self.nodes.owners() {
            let presence = self.nodes.presence(&node);
            if report.answered.contains(&node) {
                presence.set(Standing::Fit);
            } else if report.absent.contains(&node)
                && presence.set(Standing::Away(format!("Redis at {node} does not answer").into()))
            {
                presence.begin_epoch();
            }
        }
        if news {
            if self.nodes.is_cluster() {
                self.nodes.forget_others();
            } else {
                self.nodes.begin_epoch();
            }
            if !report.absent.is_empty() {
                let masters = report.absent.iter().map(Node::to_string).collect::<Vec<_>>().join(", ");
                tracing::warn!(
                    masters,
                    "masters of the cluster do not answer; their queues stand still until others take over"
                );
            }
        }
        if self.presence.set(Standing::Fit) || news {
            let (address, version, survives) = (self.presence.address(), report.version, report.note);
            match report.durable {
                true => {
                    tracing::info!(address, version, "connected to Redis; what was answered OK survives {survives}")
                }
                false => {
                    tracing::warn!(address, version, "connected to Redis; what was answered OK survives {survives}")
                }
            }
        }
    }
}

/// As a hint names it: of a shard that is not 0, its number follows, behind what no name has.
fn hinted(queue: &QueueName) -> Cow<'_, str> {
    match queue.shard().number {
        0 => queue.as_str().into(),
        number => format!("{}#{number}", queue.as_str()).into(),
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
