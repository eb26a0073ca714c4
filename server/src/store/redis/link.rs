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
    redis::{self, AsyncConnectionConfig, Client, RedisError, ServerErrorKind, aio::MultiplexedConnection},
};
use tokio::sync::watch;

use super::fitness;
use crate::store::StoreError;

/// Connections of one thread to Redis. Each carries many calls at once, so few are needed.
const CONNECTIONS_PER_THREAD: u32 = 2;

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
    standing: watch::Sender<Standing>,
    /// Connections of an earlier epoch are dead, whether they were noticed to be or not.
    epoch: AtomicU64,
}

impl Presence {
    pub(super) fn new() -> Self {
        Self { standing: watch::Sender::new(Standing::Unknown), epoch: AtomicU64::new(0) }
    }

    /// True if this is news.
    pub(super) fn set(&self, standing: Standing) -> bool {
        self.standing.send_if_modified(|before| {
            let changes = *before != standing;
            *before = standing;
            changes
        })
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
        Self { pool, standing: presence.standing.subscribe(), timeout }
    }

    /// Runs a call on a connection, within the timeout for both.
    pub(super) async fn run<T, F>(&self, call: F) -> Result<T, StoreError>
    where
        F: AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    {
        let mut sent_on = None;
        let work = async {
            let mut connection = self.checked_out().await?;
            sent_on = Some(Arc::clone(&connection.broken));
            let answer = call(&mut connection.multiplexed).await;
            sent_on = None;
            answer.map_err(|error| {
                if error.is_io_error() || error.is_unrecoverable_error() {
                    connection.broken.store(true, Ordering::Relaxed);
                }
                store_error(&error)
            })
        };
        let result = tokio::time::timeout(self.timeout, work).await;
        result.unwrap_or_else(|_| {
            // Its answer may still come, but whoever is next should not have to wait behind it.
            let did_not_run = sent_on.is_none();
            if let Some(broken) = sent_on {
                broken.store(true, Ordering::Relaxed);
            }
            Err(match timed_out(self.timeout) {
                StoreError::Unavailable { message, .. } => StoreError::Unavailable { message, did_not_run },
                other => other,
            })
        })
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
                Err(error) => Err(unavailable(format!("no connection to Redis: {error}"))),
            },
        }
    }
}

/// A handle of a shared connection.
#[derive(Clone)]
pub(super) struct Connection {
    multiplexed: MultiplexedConnection,
    broken: Arc<AtomicBool>,
    epoch: u64,
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
            Ok(multiplexed) => Ok(Connection { multiplexed, broken: Arc::default(), epoch }),
            Err(error) => {
                let reason = format!("cannot connect to Redis: {}", describe(&error));
                self.presence.set(Standing::Away(reason.into()));
                Err(error.into())
            }
        }
    }

    async fn is_valid(&self, connection: &mut Connection) -> Result<(), ConnectError> {
        if self.has_broken(connection) { Err(ConnectError::Broken) } else { Ok(()) }
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        connection.broken.load(Ordering::Relaxed) || connection.epoch != self.presence.epoch.load(Ordering::Relaxed)
    }
}

async fn connect(client: &Client, timeout: Duration) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(timeout)).set_response_timeout(Some(timeout));
    client.get_multiplexed_async_connection_with_config(&config).await
}

pub(super) fn timed_out(after: Duration) -> StoreError {
    let message = format!("Redis did not answer within {}", humantime::format_duration(after));
    StoreError::Unavailable { message, did_not_run: false }
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
            let first = self.ask_now(format_key).await;
            if first.is_ok() || !had_connection {
                return first;
            }
            // It may be that only this connection was lost, and then the others were too.
            self.connection = None;
            presence.begin_epoch();
            self.ask_now(format_key).await
        };
        let asked = tokio::time::timeout(timeout, asking).await;
        let answer = asked.unwrap_or_else(|_| Err(timed_out(timeout).to_string()));
        if answer.is_err() {
            self.connection = None;
        }
        answer
    }

    async fn ask_now(&mut self, format_key: &str) -> Result<fitness::Report, String> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let connected = connect(&self.client, self.timeout).await;
                none.insert(connected.map_err(|error| format!("cannot connect to Redis: {}", describe(&error)))?)
            }
        };
        fitness::examine(connection, format_key).await
    }
}

/// What went wrong, without the address of the caller's secrets: redis-rs never puts the password in its messages.
pub(super) fn describe(error: &RedisError) -> String {
    error.to_string()
}

/// Whether a refusal of Redis means that it is full, away, or that there is a bug.
pub(super) fn store_error(error: &RedisError) -> StoreError {
    // Errors of commands inside a script come with Redis 6.2 as one long text, so their codes are looked for in it.
    let text = describe(error);
    let says = |code: &str| error.code() == Some(code) || text.contains(code);
    if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript) {
        return StoreError::Unavailable { message: text, did_not_run: true };
    }
    if says("OOM") {
        return StoreError::Full("Redis has reached its maxmemory".to_owned());
    }
    let refused = ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "NOREPLICAS", "BUSY"];
    let unauthorised = ["NOAUTH", "NOPERM", "WRONGPASS"];
    if refused.iter().chain(&unauthorised).any(|code| says(code)) {
        return StoreError::Unavailable { message: format!("Redis refuses: {text}"), did_not_run: true };
    }
    if error.is_io_error() || error.is_unrecoverable_error() {
        return StoreError::Unavailable {
            message: format!("the connection to Redis broke: {text}"),
            did_not_run: false,
        };
    }
    match error.kind() {
        redis::ErrorKind::Client => StoreError::Unavailable { message: text, did_not_run: false },
        _ => StoreError::Broken(format!("Redis: {text}")),
    }
}
