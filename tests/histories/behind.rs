//! A server that reaches Redis through a proxy.

use std::sync::Arc;

use data_queue_proto::v1::Outcome;

use crate::support::{
    PATIENCE,
    call::{ack, heartbeat, insert_json, pop},
    keys, poll_until,
    proxy::Proxy,
    redis::{Options, Persistence, Redis},
    server::{Client, Server},
};

pub struct Behind {
    pub redis: Arc<Redis>,
    pub proxy: Proxy,
    pub server: Server,
}

impl Behind {
    pub async fn start(persistence: Persistence, flags: &[&str]) -> Self {
        let redis = Arc::new(Redis::with(Options { persistence, ..Options::default() }));
        let proxy = Proxy::start(&redis).await;
        let server = Server::launch(&proxy.url(), flags, Some(Arc::clone(&redis)));
        server.ready().await;
        Self { redis, proxy, server }
    }

    /// Another server, straight on the same Redis.
    pub async fn straight(&self) -> Server {
        let server = Server::on(Arc::clone(&self.redis), &[]);
        server.ready().await;
        server
    }

    /// Leaves an empty queue behind, a connection that is open, and scripts that are loaded.
    pub async fn warm(&self, client: &mut Client, queue: &str) {
        insert_json(client, queue, &["0"]).await;
        let task = pop(client, queue).await.expect("a task");
        assert_eq!(heartbeat(client, queue, &task.lease_token).await, Outcome::Applied);
        assert_eq!(ack(client, queue, &task.lease_token).await, Outcome::Applied);
    }

    /// Waits until this part of the queue has so many entries in Redis.
    pub async fn holds(&self, part: &str, entries: i64) {
        poll_until("a commit", PATIENCE, async || (keys::fields(&self.redis, part) == entries).then_some(())).await;
    }
}
