//! What the stores of all threads of a process share, and how it is set up.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bb8_redis::redis::{Client, IntoConnectionInfo, io::tcp::TcpSettings};

use super::{
    fitness,
    keys::Keys,
    link::{self, Presence, Probe, Standing},
    script::{Call, Source},
};
use crate::store::{QueueName, Rules, StoreError, hex};

/// What the stores of all threads of a process share.
pub struct RedisShared {
    pub(super) client: Client,
    pub(super) keys: Keys,
    pub(super) server: String,
    pub(super) rules: Rules,
    pub(super) timeout: Duration,
    pub(super) presence: Arc<Presence>,
    pub(super) probe: tokio::sync::Mutex<Probe>,
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
    /// `redis://[user:password@]host[:port][/db]`.
    pub url: String,
    /// In front of every key: letters, digits, `_` and `-`.
    pub key_prefix: String,
    /// Bounds a call, connecting included.
    pub timeout: Duration,
    /// The rules of its queues.
    pub rules: Rules,
}

impl RedisShared {
    /// Reads the address; connects to nothing.
    pub fn new(config: &RedisConfig) -> Result<Self, String> {
        // redis-rs' own message says what is wrong with the address without repeating it.
        let address = config.url.as_str().into_connection_info().map_err(|error| link::describe(&error))?;
        let address = address.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(address).map_err(|error| link::describe(&error))?;
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(|error| error.to_string())?;
        Ok(Self {
            keys: Keys::new(&config.key_prefix),
            server: hex(&name),
            rules: config.rules,
            timeout: config.timeout,
            presence: Arc::new(Presence::new(client.get_connection_info().addr().to_string())),
            probe: tokio::sync::Mutex::new(Probe::new(client.clone(), config.timeout)),
            known: Mutex::default(),
            client,
        })
    }

    pub(super) fn call(&self, script: &'static Source, queue: &QueueName) -> Call {
        Call::new(script, &self.keys.meta(queue))
            .arg(self.rules.remember.window)
            .arg((self.rules.remember.entries / 2).max(1))
            .arg(&self.server)
            .arg(queue.as_str())
            .arg(self.keys.channels())
            .arg(self.rules.max_expiries)
    }

    /// The key that holds the time of the tests.
    #[cfg(test)]
    pub(in crate::store) fn test_clock(&self) -> String {
        self.keys.test_clock()
    }

    /// A key of a queue, by the name of its part.
    #[cfg(test)]
    pub(in crate::store) fn key_of(&self, queue: &QueueName, part: &str) -> String {
        self.keys.part_of(queue, part)
    }

    pub(super) fn known<T>(&self, with: impl FnOnce(&mut Known) -> T) -> T {
        with(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes what a check found: logs changes, and forgets what was known about another run of Redis.
    pub(super) fn note(&self, found: Result<fitness::Report, String>) -> Result<(), StoreError> {
        match found {
            Ok(report) => {
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
            Err(message) => {
                if self.presence.set(Standing::Away(message.as_str().into())) {
                    self.presence.begin_epoch();
                }
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
        }
    }
}
