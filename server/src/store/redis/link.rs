//! Connections: how they are made, when they are thrown away, and whether the Redis behind them is fit to serve.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bb8_redis::{
    bb8::{ManageConnection, Pool},
    redis::{self, Cmd, ErrorKind, RedisError, ServerErrorKind, Value, aio::MultiplexedConnection},
};
use futures_util::future;
use tokio::{sync::watch, time::Instant};

use super::{
    nodes::{Node, Nodes},
    route::Route,
};
use crate::store::StoreError;

/// Connections of one thread to a node. Each carries many calls at once, so few are needed.
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

    /// Where it is asked, in a cluster.
    fn slot(&self) -> u16;

    /// Whether it keeps its connection from everybody else until it is done.
    fn blocks(&self) -> bool {
        false
    }

    fn send(&self, wire: &mut MultiplexedConnection) -> impl Future<Output = Result<Self::Answer, RedisError>> + Send;
}

/// A command, and the slot of its key.
pub(super) struct Keyed {
    pub(super) slot: u16,
    pub(super) command: Cmd,
}

impl Ask for Keyed {
    type Answer = Value;

    fn slot(&self) -> u16 {
        self.slot
    }

    async fn send(&self, wire: &mut MultiplexedConnection) -> Result<Value, RedisError> {
        self.command.query_async(wire).await
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

    pub(super) fn is_away(&self) -> bool {
        matches!(*self.standing.borrow(), Standing::Away(_))
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

/// Connections of one thread, to every node that it needs.
pub(super) struct Links {
    nodes: Arc<Nodes>,
    /// Those that block have connections of their own.
    links: Mutex<HashMap<(Node, bool), Arc<Link>>>,
    timeout: Duration,
}

impl Links {
    pub(super) fn new(nodes: Arc<Nodes>, timeout: Duration) -> Self {
        Self { nodes, links: Mutex::default(), timeout }
    }

    /// Asks whoever has the slot, within the timeout for all that it takes. What certainly was not done is asked again where the slot
    /// is by then.
    pub(super) async fn run<A: Ask>(&self, ask: &A) -> Result<A::Answer, StoreError> {
        let (slot, until) = (ask.slot(), Instant::now() + self.timeout);
        let mut pause = AGAIN_AFTER.0;
        loop {
            let failure = match self.nodes.owner(slot) {
                Some(node) => {
                    let link = self.link(&node, ask.blocks());
                    match link.connected(until).await {
                        Ok(connection) => match link.run_on(connection, until, ask).await {
                            Ok(answer) => return Ok(answer),
                            Err(failure) => failure,
                        },
                        Err(error) => {
                            let is_passing = !matches!(error, StoreError::DatasetReset(_));
                            Failure { error, is_passing, now_at: None }
                        }
                    }
                }
                None => Failure { error: unknown_owner(), is_passing: true, now_at: None },
            };
            let Failure { error, is_passing, now_at } = failure;
            let next = Instant::now() + pause.mul_f64(1.0 + chance());
            if !self.nodes.is_cluster() || !is_passing || next > until {
                return Err(error);
            }
            if let Some(node) = now_at {
                self.nodes.moved(slot, node);
            }
            tokio::time::sleep_until(next).await;
            pause = (pause * 2).min(AGAIN_AFTER.1);
        }
    }

    /// Asks for all of these, sent together where one node has them, each as if it were alone.
    pub(super) async fn run_all<A: Ask>(&self, asks: &[A]) -> Vec<Result<A::Answer, StoreError>> {
        if self.nodes.is_cluster() {
            return future::join_all(asks.iter().map(|ask| self.run(ask))).await;
        }
        let until = Instant::now() + self.timeout;
        let link = self.link(&Node::default(), false);
        match link.connected(until).await {
            Ok(connection) => {
                let run =
                    async |ask| link.run_on(connection.clone(), until, ask).await.map_err(|failure| failure.error);
                future::join_all(asks.iter().map(run)).await
            }
            Err(error) => asks.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    fn link(&self, node: &Node, blocks: bool) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (node.clone(), blocks);
        if let Some(link) = links.get(&key) {
            return Arc::clone(link);
        }
        // Those that nobody asks any more are not kept.
        let owners = self.nodes.owners();
        links.retain(|(node, _), _| owners.contains(node) || !self.nodes.is_cluster());
        let link =
            Arc::new(Link::new(Arc::clone(self.nodes.route()), node.clone(), &self.nodes.presence(node), self.timeout));
        links.insert(key, Arc::clone(&link));
        link
    }
}

fn unknown_owner() -> StoreError {
    let message = "no node of the cluster is known to have this queue".to_owned();
    StoreError::Unavailable { message, did_not_run: true }
}

/// Why it was not done, or is not known to have been.
struct Failure {
    error: StoreError,
    /// It certainly was not done, and may be in a moment.
    is_passing: bool,
    /// Who has the slot, by who was asked.
    now_at: Option<Node>,
}

/// Connections of one thread to a node.
struct Link {
    pool: Pool<Manager>,
    standing: watch::Receiver<Standing>,
    presence: Arc<Presence>,
    timeout: Duration,
}

impl Link {
    fn new(route: Arc<Route>, node: Node, presence: &Arc<Presence>, timeout: Duration) -> Self {
        let manager = Manager { route, node, presence: Arc::clone(presence) };
        let pool = Pool::builder()
            .max_size(CONNECTIONS_PER_THREAD)
            .connection_timeout(timeout)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_on_check_out(true)
            .build_unchecked(manager);
        Self { pool, standing: presence.standing.subscribe(), presence: Arc::clone(presence), timeout }
    }

    async fn connected(&self, until: Instant) -> Result<Connection, StoreError> {
        let connected = tokio::time::timeout_at(until, self.checked_out()).await;
        connected.unwrap_or_else(|_| Err(self.presence.timed_out(self.timeout, true)))
    }

    async fn run_on<A: Ask>(&self, connection: Connection, until: Instant, ask: &A) -> Result<A::Answer, Failure> {
        let Connection { mut wire, state } = connection;
        match tokio::time::timeout_at(until, ask.send(&mut wire)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                let is_passing = is_elsewhere(&error);
                let now_at = error.redirect_node().filter(|_| is_moved(&error));
                let now_at = now_at.and_then(|(address, _)| Node::parse(address));
                // A master that is none any more, or not yet, says so for as long as it is asked.
                if error.is_io_error() || error.is_unrecoverable_error() || is_no_master(&error) {
                    state.broken.store(true, Ordering::Relaxed);
                }
                Err(Failure { error: self.presence.store_error(&error), is_passing, now_at })
            }
            Err(_) => {
                // Its answer may still come, but whoever is next should not have to wait behind it.
                state.broken.store(true, Ordering::Relaxed);
                let error = self.presence.timed_out(self.timeout, false);
                Err(Failure { error, is_passing: false, now_at: None })
            }
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
    wire: MultiplexedConnection,
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
    node: Node,
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
        match self.route.connect(&self.node).await {
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
        if u128::from(idle) > IDLE.as_millis() {
            redis::cmd("PING").exec_async(&mut connection.wire).await?;
        }
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        let state = &connection.state;
        state.broken.load(Ordering::Relaxed) || state.epoch != self.presence.epoch.load(Ordering::Relaxed)
    }
}

/// It did not run, and would where the queue is now, or in a moment.
pub(super) fn is_elsewhere(error: &RedisError) -> bool {
    use ServerErrorKind::{Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Server(kind) => {
            matches!(kind, Moved | Ask | TryAgain | ClusterDown | BusyLoading | MasterDown | ReadOnly)
        }
        _ => is_no_master(error),
    }
}

fn is_no_master(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, MasterDown, ReadOnly};
    match error.kind() {
        ErrorKind::Server(BusyLoading | MasterDown | ReadOnly) => true,
        // Of commands in a script, Redis 6.2 tells in one long text.
        ErrorKind::Server(_) => error.to_string().contains("READONLY"),
        _ => false,
    }
}

fn is_moved(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::Moved)
}

/// From 0 to 1. Without random numbers all wait alike.
fn chance() -> f64 {
    let mut byte = [0];
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / 255.0
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
