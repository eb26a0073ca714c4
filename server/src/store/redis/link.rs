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
    redis::{self, Cmd, ErrorKind, RedisError, ServerErrorKind, Value},
};
use futures_util::future;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{
    fitness::{self, Epochs, Report, Unfit},
    keys::Keys,
    route::{Route, Wire},
    script::Call,
};
use crate::store::StoreError;

/// Connections of one thread to Redis. Each carries many calls at once, so few are needed.
const CONNECTIONS_PER_THREAD: u32 = 2;

/// A connection on which nothing was said for so long is asked whether it is alive before it is used: Redis closes idle
/// connections if its `timeout` says so, and a call on a dead one fails without anybody knowing whether it was done.
const IDLE: Duration = Duration::from_secs(1);

/// Before a call is sent again that a node of a cluster did not take: it has moved, or will be somebody's in a moment. Twice as
/// long each time, up to the second, and up to twice that by chance.
const AGAIN_AFTER: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

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
    /// It has lost its data; where that was seen, for people.
    Reset(Arc<str>),
}

/// What is asked of Redis. Asked again only where it certainly was not done.
pub(super) trait Ask: Sync {
    type Answer: Send;

    fn send(&self, wire: &mut Wire) -> impl Future<Output = Result<Self::Answer, RedisError>> + Send;
}

impl Ask for Cmd {
    type Answer = Value;

    async fn send(&self, wire: &mut Wire) -> Result<Value, RedisError> {
        self.query_async(wire).await
    }
}

/// What all links of a process know of their Redis.
pub(super) struct Presence {
    /// Where it is, for people.
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

    fn is_reset(&self) -> bool {
        matches!(*self.standing.borrow(), Standing::Reset(_))
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
    pub(super) fn new(route: Arc<Route>, presence: &Arc<Presence>, timeout: Duration) -> Self {
        let manager = Manager { route, presence: Arc::clone(presence) };
        let pool = Pool::builder()
            .max_size(CONNECTIONS_PER_THREAD)
            .connection_timeout(timeout)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_on_check_out(true)
            .build_unchecked(manager);
        Self { pool, standing: presence.standing.subscribe(), presence: Arc::clone(presence), timeout }
    }

    /// Asks on a connection, within the timeout for both.
    pub(super) async fn run<A: Ask>(&self, ask: &A) -> Result<A::Answer, StoreError> {
        let until = Instant::now() + self.timeout;
        let connection = self.connected(until).await?;
        self.run_on(connection, until, ask).await
    }

    /// Runs scripts, sent together, each as if it were alone.
    pub(super) async fn run_all(&self, calls: &[Call]) -> Vec<Result<Value, StoreError>> {
        let until = Instant::now() + self.timeout;
        match self.connected(until).await {
            Ok(connection) => {
                let run = |call| self.run_on(connection.clone(), until, call);
                future::join_all(calls.iter().map(run)).await
            }
            Err(error) => calls.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn connected(&self, until: Instant) -> Result<Connection, StoreError> {
        let connected = tokio::time::timeout_at(until, self.checked_out()).await;
        connected.unwrap_or_else(|_| Err(self.presence.timed_out(self.timeout, true)))
    }

    async fn run_on<A: Ask>(&self, connection: Connection, until: Instant, ask: &A) -> Result<A::Answer, StoreError> {
        let Connection { mut wire, state } = connection;
        let mut pause = AGAIN_AFTER.0;
        loop {
            let error = match tokio::time::timeout_at(until, ask.send(&mut wire)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => {
                    // Its answer may still come, but whoever is next should not have to wait behind it.
                    state.broken.store(true, Ordering::Relaxed);
                    return Err(self.presence.timed_out(self.timeout, false));
                }
            };
            if ends_connection(&wire, &error) {
                state.broken.store(true, Ordering::Relaxed);
            }
            let until_then = pause.mul_f64(1.0 + chance());
            let is_passing = matches!(wire, Wire::Cluster(_)) && is_elsewhere(&error);
            if !is_passing || Instant::now() + until_then > until {
                return Err(self.presence.store_error(&error));
            }
            sleep(until_then).await;
            pause = (pause * 2).min(AGAIN_AFTER.1);
        }
    }

    /// Takes a connection from the pool, copies its handle and puts it back, so that nobody waits for a turn.
    async fn checked_out(&self) -> Result<Connection, StoreError> {
        let mut standing = self.standing.clone();
        let unavailable = |message| StoreError::Unavailable { message, did_not_run: true };
        let away = async {
            let is_away = |standing: &Standing| matches!(standing, Standing::Away(_) | Standing::Reset(_));
            match standing.wait_for(is_away).await.as_deref() {
                Ok(Standing::Away(reason)) => unavailable(reason.to_string()),
                Ok(Standing::Reset(reason)) => StoreError::DatasetReset(reason.to_string()),
                _ => unavailable("the server is stopping".to_owned()),
            }
        };
        tokio::select! {
            biased;
            error = away => Err(error),
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
    wire: Wire,
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
    route: Arc<Route>,
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
        match self.route.connect().await {
            Ok(wire) => {
                let (broken, used) = (AtomicBool::new(false), AtomicU64::new(0));
                let state = Arc::new(ConnectionState { broken, epoch, made: std::time::Instant::now(), used });
                Ok(Connection { wire, state })
            }
            Err(error) => {
                let reason = self.presence.cannot_connect(&error);
                // Unless the check has found out since that things have changed.
                if self.presence.epoch.load(Ordering::Relaxed) == epoch && !self.presence.is_reset() {
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
        // A cluster's connections are many, and look after themselves.
        if let Wire::One(multiplexed) = &mut connection.wire
            && u128::from(idle) > IDLE.as_millis()
        {
            redis::cmd("PING").exec_async(multiplexed).await?;
        }
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        let state = &connection.state;
        state.broken.load(Ordering::Relaxed) || state.epoch != self.presence.epoch.load(Ordering::Relaxed)
    }
}

/// Whether whoever is next should have another connection, which finds the servers anew.
fn ends_connection(wire: &Wire, error: &RedisError) -> bool {
    match wire {
        // A master that is none any more, or not yet, says so for as long as it is asked.
        Wire::One(_) => error.is_io_error() || error.is_unrecoverable_error() || is_elsewhere(error),
        // One of its nodes does not answer; it would not ask others where that one's tasks are now.
        Wire::Cluster(_) => error.is_timeout(),
    }
}

/// It did not run, and would where the queue is now, or in a moment.
pub(super) fn is_elsewhere(error: &RedisError) -> bool {
    use ServerErrorKind::{Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Server(kind) => {
            matches!(kind, Moved | Ask | TryAgain | ClusterDown | BusyLoading | MasterDown | ReadOnly)
        }
        ErrorKind::ClusterConnectionNotFound => true,
        _ => false,
    }
}

/// From 0 to 1. Without random numbers all wait alike.
fn chance() -> f64 {
    let mut byte = [0];
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

/// The connection on which the check asks whether Redis is fit.
pub(super) struct Probe {
    route: Arc<Route>,
    timeout: Duration,
    connection: Option<Wire>,
}

impl Probe {
    pub(super) fn new(route: Arc<Route>, timeout: Duration) -> Self {
        Self { route, timeout, connection: None }
    }

    /// Connects if need be and asks. `Err` says why Redis cannot serve.
    pub(super) async fn ask(&mut self, keys: &Keys, known: &Epochs, presence: &Presence) -> Result<Report, Unfit> {
        let timeout = self.timeout;
        let asking = async {
            let had_connection = self.connection.is_some();
            let first = self.ask_now(keys, known, presence).await;
            if !had_connection || !matches!(first, Err(Unfit::Problem(_))) {
                return first;
            }
            // It may be that only this connection was lost, and then the others were too.
            self.connection = None;
            presence.begin_epoch();
            self.ask_now(keys, known, presence).await
        };
        let asked = tokio::time::timeout(timeout, asking).await;
        let answer = asked.unwrap_or_else(|_| Err(Unfit::Problem(presence.timed_out(timeout, true).to_string())));
        // Who does not answer may have a successor.
        if answer.as_ref().map_or(true, |report| !report.absent.is_empty()) {
            self.connection = None;
        }
        answer
    }

    async fn ask_now(&mut self, keys: &Keys, known: &Epochs, presence: &Presence) -> Result<Report, Unfit> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let connected = self.route.connect().await;
                none.insert(connected.map_err(|error| presence.cannot_connect(&error))?)
            }
        };
        let examined = fitness::examine(connection, keys, known, self.timeout).await;
        examined.map_err(|unfit| match unfit {
            Unfit::Problem(reason) => Unfit::Problem(format!("Redis at {}: {reason}", presence.address)),
            reset => reset,
        })
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
        if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) {
            unavailable("forgets its scripts", true)
        } else if is_elsewhere(error) {
            unavailable("refuses", true)
        } else if says(&"OOM") {
            StoreError::Full(format!("Redis at {} has reached its maxmemory", self.address))
        } else if refused.iter().chain(&unauthorised).any(says) {
            unavailable("refuses", true)
        } else if error.is_io_error() || error.is_unrecoverable_error() || error.kind() == ErrorKind::Client {
            unavailable("was lost", false)
        } else {
            StoreError::Broken(format!("Redis at {}: {text}", self.address))
        }
    }
}
