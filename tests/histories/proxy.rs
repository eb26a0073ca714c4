//! A proxy between a server and Redis that can hold back what passes, in either direction.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use crate::support::redis::Redis;

/// One listening proxy; it ends when dropped.
pub struct Proxy {
    address: SocketAddr,
    requests: Gate,
    replies: Gate,
    accepting: JoinHandle<()>,
}

/// Where bytes wait while it is closed.
#[derive(Clone)]
struct Gate {
    open: watch::Sender<bool>,
}

impl Gate {
    fn new() -> Self {
        Self { open: watch::Sender::new(true) }
    }

    fn set(&self, open: bool) {
        self.open.send_replace(open);
    }
}

impl Proxy {
    pub async fn start(redis: &Redis) -> Self {
        let port = redis.port();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, replies) = (Gate::new(), Gate::new());
        let gates = (requests.clone(), replies.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((server, _)) = listener.accept().await {
                let Ok(redis) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let _ = (server.set_nodelay(true), redis.set_nodelay(true));
                let (from_server, to_server) = server.into_split();
                let (from_redis, to_redis) = redis.into_split();
                tokio::spawn(pass(from_server, to_redis, gates.0.clone()));
                tokio::spawn(pass(from_redis, to_server, gates.1.clone()));
            }
        });
        Self { address, requests, replies, accepting }
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

    /// Everything passes again, what was held back first.
    pub fn let_go(&self) {
        self.requests.set(true);
        self.replies.set(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Passes bytes on until one side closes. What is behind a closed gate when it closes is lost.
async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, gate: Gate) {
    let mut open = gate.open.subscribe();
    let mut buffer = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}
