//! Connections: how they are made, when they are thrown away, and whether the Redis behind them is fit to serve.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bb8_redis::{
    bb8::{ManageConnection, Pool},
    redis::{self, AsyncConnectionConfig, Client, RedisError, ServerErrorKind, Value, aio::MultiplexedConnection},
};
use futures_util::future;
use tokio::{sync::watch, time::Instant};

use super::{fitness, script::Call};
use crate::store::StoreError;

/// Connections of one thread to Redis. Each carries many calls at once, so few are needed.
const CONNECTIONS_PER_THREAD: u32 = 2;

/// A connection on which nothing was said for so long is asked whether it is alive before it is used: Redis closes idle
/// connections if its `timeout` says so, and a call on a dead one fails without anybody knowing whether it was done.
const IDLE: Duration = Duration::from_secs(1);

/// What is known of the Redis behind all links of a process. Calls fail at once while it is away, and the check that
/// the server runs all the time finds out when it is back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not looked at so far.
    Unknown,
    /// Fit to serve.
    Fit,
    /// Not to be reached, or not fit; with the reason, for people.
    Away(Arc<str>),
}

/// What all links of a process know of their Redis.
pub(super) struct Presence {
    /// Its host and port, for people.
    address: String,
    standing: watch::Sender<Standing>,
    /// Connections of an earlier epoch are dead, whether they were noticed to be or not.
    epoch: AtomicU64,
}

impl Presence {
    pub(super) fn new(address: String) -> Self {
        Self { address, standing: watch::Sender::new(Standing::Unknown), epoch: AtomicU64::new(0) }
    }

    /// True if this is news.
    pub(super) fn set(&self, standing: Standing) -> bool {
        self.standing.send_if_modified(|before| {
            let changes = *before != standing;
            *before = standing;
            changes
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn cannot_connect(&self, error: &RedisError) -> String {
        format!("cannot connect to Redis at {}: {}", self.address, describe(error))
    }

    pub(super) fn timed_out(&self, after: Duration, did_not_run: bool) -> StoreError {
        let after = humantime::format_duration(after);
        let message = format!("Redis at {} did not answer within {after} (--store-timeout)", self.address);
        StoreError::Unavailable { message, did_not_run }
    }

    /// All connections made so far are to be made anew.
    pub(super) fn begin_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connections of one thread.
pub(super) struct Link {
    pool: Pool<Manager>,
    standing: watch::Receiver<Standing>,
    presence: Arc<Presence>,
    timeout: Duration,
}

impl Link {
    pub(super) fn new(client: Client, presence: &Arc<Presence>, timeout: Duration) -> Self {
        let manager = Manager { client, timeout, presence: Arc::clone(presence) };
        let pool = Pool::builder()
            .max_size(CONNECTIONS_PER_THREAD)
            .connection_timeout(timeout)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_on_check_out(true)
            .build_unchecked(manager);
        Self { pool, standing: presence.standing.subscribe(), presence: Arc::clone(presence), timeout }
    }

    /// Runs a call on a connection, within the timeout for both.
    pub(super) async fn run<T, F>(&self, call: F) -> Result<T, StoreError>
    where
        F: AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    {
        let until = Instant::now() + self.timeout;
        let connection = self.connected(until).await?;
        self.run_on(connection, until, call).await
    }

    /// Runs scripts, sent together, each as if it were alone.
    pub(super) async fn run_all(&self, calls: &[Call]) -> Vec<Result<Value, StoreError>> {
        let until = Instant::now() + self.timeout;
        match self.connected(until).await {
            Ok(connection) => {
                let run = async |call: &Call| {
                    self.run_on(connection.clone(), until, async |connection| call.run(connection).await).await
                };
                future::join_all(calls.iter().map(run)).await
            }
            Err(error) => calls.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn connected(&self, until: Instant) -> Result<Connection, StoreError> {
        let connected = tokio::time::timeout_at(until, self.checked_out()).await;
        connected.unwrap_or_else(|_| Err(self.presence.timed_out(self.timeout, true)))
    }

    async fn run_on<T, F>(&self, connection: Connection, until: Instant, call: F) -> Result<T, StoreError>
    where
        F: AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    {
        let Connection { mut multiplexed, state } = connection;
        match tokio::time::timeout_at(until, call(&mut multiplexed)).await {
            Ok(answer) => answer.map_err(|error| {
                if error.is_io_error() || error.is_unrecoverable_error() {
                    state.broken.store(true, Ordering::Relaxed);
                }
                self.presence.store_error(&error)
            }),
            Err(_) => {
                // Its answer may still come, but whoever is next should not have to wait behind it.
                state.broken.store(true, Ordering::Relaxed);
                Err(self.presence.timed_out(self.timeout, false))
            }
        }
    }

    /// Takes a connection from the pool, copies its handle and puts it back, so that nobody waits for a turn.
    async fn checked_out(&self) -> Result<Connection, StoreError> {
        let mut standing = self.standing.clone();
        let away = async {
            match standing.wait_for(|standing| matches!(standing, Standing::Away(_))).await.as_deref() {
                Ok(Standing::Away(reason)) => reason.to_string(),
                _ => "the server is stopping".to_owned(),
            }
        };
        let unavailable = |message| StoreError::Unavailable { message, did_not_run: true };
        tokio::select! {
            biased;
            reason = away => Err(unavailable(reason)),
            connection = self.pool.get() => match connection {
                Ok(connection) => Ok(connection.clone()),
                Err(_) => Err(self.presence.timed_out(self.timeout, true)),
            },
        }
    }
}

/// A handle of a shared connection.
#[derive(Clone)]
pub(super) struct Connection {
    multiplexed: MultiplexedConnection,
    state: Arc<ConnectionState>,
}

struct ConnectionState {
    broken: AtomicBool,
    epoch: u64,
    made: std::time::Instant,
    /// When it was last taken for a call, in milliseconds since it was made.
    used: AtomicU64,
}

impl ConnectionState {
    fn age(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Makes connections for the pool. bb8-redis' own manager would ping at every checkout and never see a broken connection.
struct Manager {
    client: Client,
    timeout: Duration,
    presence: Arc<Presence>,
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("{0}")]
    Redis(#[from] RedisError),
    #[error("it was lost")]
    Broken,
}

impl ManageConnection for Manager {
    type Connection = Connection;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Connection, ConnectError> {
        let epoch = self.presence.epoch.load(Ordering::Relaxed);
        match connect(&self.client, self.timeout).await {
            Ok(multiplexed) => {
                let (broken, used) = (AtomicBool::new(false), AtomicU64::new(0));
                let state = Arc::new(ConnectionState { broken, epoch, made: std::time::Instant::now(), used });
                Ok(Connection { multiplexed, state })
            }
            Err(error) => {
                let reason = self.presence.cannot_connect(&error);
                // Unless the check has found out since that things have changed.
                if self.presence.epoch.load(Ordering::Relaxed) == epoch {
                    self.presence.set(Standing::Away(reason.into()));
                }
                Err(error.into())
            }
        }
    }

    async fn is_valid(&self, connection: &mut Connection) -> Result<(), ConnectError> {
        if self.has_broken(connection) {
            return Err(ConnectError::Broken);
        }
        let state = &connection.state;
        let now = state.age();
        let idle = now.saturating_sub(state.used.swap(now, Ordering::Relaxed));
        if u128::from(idle) > IDLE.as_millis() {
            redis::cmd("PING").exec_async(&mut connection.multiplexed).await?;
        }
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        let state = &connection.state;
        state.broken.load(Ordering::Relaxed) || state.epoch != self.presence.epoch.load(Ordering::Relaxed)
    }
}

async fn connect(client: &Client, timeout: Duration) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(timeout)).set_response_timeout(Some(timeout));
    client.get_multiplexed_async_connection_with_config(&config).await
}

/// The connection on which the check asks whether Redis is fit.
pub(super) struct Probe {
    client: Client,
    timeout: Duration,
    connection: Option<MultiplexedConnection>,
}

impl Probe {
    pub(super) fn new(client: Client, timeout: Duration) -> Self {
        Self { client, timeout, connection: None }
    }

    /// Connects if need be and asks. `Err` says why Redis cannot serve.
    pub(super) async fn ask(&mut self, format_key: &str, presence: &Presence) -> Result<fitness::Report, String> {
        let timeout = self.timeout;
        let asking = async {
            let had_connection = self.connection.is_some();
            let first = self.ask_now(format_key, presence).await;
            if first.is_ok() || !had_connection {
                return first;
            }
            // It may be that only this connection was lost, and then the others were too.
            self.connection = None;
            presence.begin_epoch();
            self.ask_now(format_key, presence).await
        };
        let asked = tokio::time::timeout(timeout, asking).await;
        let answer = asked.unwrap_or_else(|_| Err(presence.timed_out(timeout, true).to_string()));
        if answer.is_err() {
            self.connection = None;
        }
        answer
    }

    async fn ask_now(&mut self, format_key: &str, presence: &Presence) -> Result<fitness::Report, String> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let connected = connect(&self.client, self.timeout).await;
                none.insert(connected.map_err(|error| presence.cannot_connect(&error))?)
            }
        };
        let examined = fitness::examine(connection, format_key).await;
        examined.map_err(|reason| format!("Redis at {}: {reason}", presence.address))
    }
}

/// What went wrong: redis-rs never puts the password in its messages, but the names of its types.
pub(super) fn describe(error: &RedisError) -> String {
    let text = error.to_string();
    match text.split_once(" - ") {
        Some((what, kind_and_detail)) => match kind_and_detail.split_once(": ") {
            Some((_, detail)) => format!("{what}: {detail}"),
            None => what.to_owned(),
        },
        None => text,
    }
}

impl Presence {
    /// Whether a refusal of Redis means that it is full, away, or that there is a bug.
    pub(super) fn store_error(&self, error: &RedisError) -> StoreError {
        // Errors of commands inside a script come with Redis 6.2 as one long text, so their codes are looked for in it.
        let text = error.to_string();
        let says = |code: &&str| error.code() == Some(code) || text.contains(*code);
        let unavailable = |what, did_not_run| {
            let message = format!("Redis at {} {what}: {}", self.address, describe(error));
            StoreError::Unavailable { message, did_not_run }
        };
        let refused = ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "NOREPLICAS", "BUSY"];
        let unauthorised = ["NOAUTH", "NOPERM", "WRONGPASS"];
        if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript) {
            unavailable("forgets its scripts", true)
        } else if says(&"OOM") {
            StoreError::Full(format!("Redis at {} has reached its maxmemory", self.address))
        } else if refused.iter().chain(&unauthorised).any(says) {
            unavailable("refuses", true)
        } else if error.is_io_error() || error.is_unrecoverable_error() || error.kind() == redis::ErrorKind::Client {
            unavailable("was lost", false)
        } else {
            StoreError::Broken(format!("Redis at {}: {text}", self.address))
        }
    }
}
