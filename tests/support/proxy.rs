//! A proxy, mostly between a server and Redis, that can hold back what passes, in either direction, on all connections or on one.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use super::redis::Redis;

/// One listening proxy; it ends when dropped.
pub struct Proxy {
    address: SocketAddr,
    requests: Gate,
    replies: Gate,
    trap: Trap,
    accepting: JoinHandle<()>,
}

/// Where bytes wait while it is closed.
#[derive(Clone)]
struct Gate {
    open: watch::Sender<bool>,
}

impl Gate {
    fn new(open: bool) -> Self {
        Self { open: watch::Sender::new(open) }
    }

    fn set(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// False if nobody can open it any more.
    async fn passed(&self) -> bool {
        self.open.subscribe().wait_for(|open| *open).await.is_ok()
    }
}

/// Holds the first request that has some bytes in it, and what follows it on its connection.
#[derive(Clone)]
struct Trap {
    gate: Gate,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// What to wait for, while nothing was caught.
    bait: Option<Vec<u8>>,
    caught: Vec<u8>,
    /// Requests of other connections since then.
    passed: Vec<u8>,
}

impl Proxy {
    pub async fn start(redis: &Redis) -> Self {
        Self::to(redis.port()).await
    }

    /// To whatever listens on this port.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, replies) = (Gate::new(true), Gate::new(true));
        let trap = Trap { gate: Gate::new(true), state: Arc::default() };
        let (request_gate, reply_gate, request_trap) = (requests.clone(), replies.clone(), trap.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((server, _)) = listener.accept().await {
                let Ok(redis) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let _ = (server.set_nodelay(true), redis.set_nodelay(true));
                let (from_server, to_server) = server.into_split();
                let (from_redis, to_redis) = redis.into_split();
                tokio::spawn(pass(from_server, to_redis, request_gate.clone(), Some(request_trap.clone())));
                tokio::spawn(pass(from_redis, to_server, reply_gate.clone(), None));
            }
        });
        Self { address, requests, replies, trap, accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// For `--store`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Requests pass, replies do not.
    pub fn hold_replies(&self) {
        self.replies.set(false);
    }

    /// Requests do not pass.
    pub fn hold_requests(&self) {
        self.requests.set(false);
    }

    /// The first request with these bytes does not pass, nor does what follows it on its connection. On other connections
    /// everything passes.
    pub fn hold_request_with(&self, bait: &[u8]) {
        self.trap.gate.set(false);
        *self.trap.state.lock().unwrap() = State { bait: Some(bait.to_vec()), ..State::default() };
    }

    /// What `hold_request_with` has caught; empty so far if nothing.
    pub fn caught(&self) -> Vec<u8> {
        self.trap.state.lock().unwrap().caught.clone()
    }

    /// Whether these bytes went to Redis on another connection since that request was caught.
    pub fn passed(&self, bytes: &[u8]) -> bool {
        contains(&self.trap.state.lock().unwrap().passed, bytes)
    }

    /// Everything passes again, what was held back first.
    pub fn let_go(&self) {
        self.trap.gate.set(true);
        self.requests.set(true);
        self.replies.set(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Trap {
    /// Whether these are bytes to hold.
    fn catches(&self, bytes: &[u8]) -> bool {
        let mut state = self.state.lock().unwrap();
        match &state.bait {
            Some(bait) if contains(bytes, bait) => {
                state.bait = None;
                state.caught = bytes.to_vec();
                true
            }
            _ => false,
        }
    }

    /// Notes what has passed.
    fn note(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap();
        if !state.caught.is_empty() {
            state.passed.extend_from_slice(bytes);
        }
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Passes bytes on until one side closes. What is behind a closed gate when the proxy ends is lost.
async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, gate: Gate, trap: Option<Trap>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        let bytes = &buffer[..bytes];
        let caught = trap.as_ref().filter(|trap| trap.catches(bytes));
        if let Some(trap) = caught
            && !trap.gate.passed().await
        {
            return;
        }
        if !gate.passed().await || to.write_all(bytes).await.is_err() {
            return;
        }
        if let (Some(trap), None) = (&trap, caught) {
            trap.note(bytes);
        }
    }
}
