//! Redis that forgets its scripts.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use data_queue_proto::v1::Outcome;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use crate::support::{
    call::{ack_request, heartbeat_request, insert_request, json, outcomes, pop_request, putback_request, text},
    redis::Redis,
    server::Backend,
    unique_queue, wire_tests,
};

/// Forgets scripts until it is dropped, even if that is because the test failed.
struct Flushing {
    enough: Arc<AtomicBool>,
    times: Option<JoinHandle<u64>>,
}

impl Flushing {
    fn start(redis: Arc<Redis>) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&enough);
        let times = spawn_blocking(move || redis.command_until(&["SCRIPT", "FLUSH"], &until));
        Self { enough, times: Some(times) }
    }

    /// Gives how often.
    async fn stop(mut self) -> u64 {
        self.enough.store(true, Ordering::Relaxed);
        self.times.take().expect("it runs").await.expect("flushes")
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
    }
}

const CALLERS: usize = 5;
const ROUNDS: usize = 100;

wire_tests! {
    /// G1, G9: Redis forgets its scripts all the time, also between the moment at which one was loaded and its run: no call
    /// fails, for any reason.
    async fn scripts_flushed_without_end() {
        let server = Backend::Redis.start(&["--threads", "2"]).await;
        let flushing = Flushing::start(server.shared_redis());
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (mut client, queue) = (server.client().await, unique_queue("flushed"));
            callers.spawn(async move {
                for round in 0..ROUNDS {
                    let value = round.to_string();
                    client.insert(insert_request(&queue, vec![json(&value)])).await.expect("an insert");
                    let popped = client.pop(pop_request(&queue)).await.expect("a pop").into_inner();
                    let task = popped.task.expect("a task");
                    assert_eq!((text(&task), task.deliveries), (value.as_str(), 1));
                    let mut tokens = [task.lease_token];
                    if round % 10 == 0 {
                        let beaten = client.heartbeat(heartbeat_request(&queue, &tokens)).await.expect("a heartbeat");
                        assert_eq!(outcomes(&beaten.into_inner().outcomes), [Outcome::Applied]);
                        let back = client.putback(putback_request(&queue, &tokens)).await.expect("a putback");
                        assert_eq!(outcomes(&back.into_inner().outcomes), [Outcome::Applied]);
                        let popped = client.pop(pop_request(&queue)).await.expect("a pop").into_inner();
                        tokens = [popped.task.expect("the task again").lease_token];
                    }
                    let acked = client.ack(ack_request(&queue, &tokens)).await.expect("an ack").into_inner();
                    assert_eq!(outcomes(&acked.outcomes), [Outcome::Applied]);
                }
                assert_eq!(client.pop(pop_request(&queue)).await.expect("a pop").into_inner().task, None);
            });
        }
        while let Some(caller) = callers.join_next().await {
            caller.expect("a caller");
        }
        let flushes = flushing.stop().await;
        assert!(flushes > CALLERS as u64, "only {flushes} flushes");
    }
}
