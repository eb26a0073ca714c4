//! What happens, and what must not, while nobody calls.

use std::time::Duration;

use data_queue_proto::v1::{InsertRequest, Outcome};
use tokio::time::Instant;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    PATIENCE,
    call::{ack, insert_json, insert_request, json, pop},
    keys, poll_until,
    redis::Redis,
    server::{Backend, Server},
    unique_queue, wire_tests,
};

const CONNECTIONS: usize = 8;

/// How many keys remember something of the only queue.
fn memories(redis: &Redis) -> usize {
    keys::parts(redis, "acked:*") + keys::parts(redis, "requests:*")
}

async fn health_is(server: &Server, status: ServingStatus) {
    let told = async || (server.health("").await == status).then_some(());
    poll_until(&format!("health to be {status:?}"), PATIENCE, told).await;
}

wire_tests! {
    /// G3, G7: acks and request ids are remembered for the window; when nobody calls any more, what was remembered leaves
    /// Redis by itself.
    async fn an_idle_queue_forgets() {
        const WINDOW: Duration = Duration::from_secs(1);
        let server = Backend::Redis.start(&["--memory-window", "1s"]).await;
        let (mut client, redis) = (server.client().await, server.redis());
        let queue = unique_queue("idle");
        let mut tasks = 0;
        // On a machine that stands still the window may be over before the answers are there: then once more.
        let (token, request) = poll_until("a round within the window", PATIENCE, async || {
            tasks += 1;
            let request_id = format!("request {tasks}");
            let request = InsertRequest { request_id, ..insert_request(&queue, vec![json("1")]) };
            let start = Instant::now();
            assert!(!client.insert(request.clone()).await.unwrap().into_inner().replayed);
            let token = pop(&mut client, &queue).await.expect("a task").lease_token;
            let acked = ack(&mut client, &queue, &token).await;
            assert_eq!(acked, Outcome::Applied);
            let again = ack(&mut client, &queue, &token).await;
            let replayed = client.insert(request.clone()).await.unwrap().into_inner().replayed;
            let kept = memories(redis);
            if start.elapsed() < WINDOW {
                assert_eq!((again, replayed, kept), (Outcome::AlreadyAcked, true, 2));
                return Some((token, request));
            }
            // A request that was forgotten inserted again.
            while let Some(task) = pop(&mut client, &queue).await {
                tasks += 1;
                ack(&mut client, &queue, &task.lease_token).await;
            }
            None
        })
        .await;

        let gone = async || (memories(redis) == 0).then_some(());
        poll_until("the memories to leave Redis", PATIENCE, gone).await;
        assert_eq!(keys::counter(redis, "acked"), tasks);
        assert_eq!(ack(&mut client, &queue, &token).await, Outcome::LeaseLost);
        assert!(!client.insert(request).await.unwrap().into_inner().replayed);
    }

    /// Row 36: Redis was restarted while the server was idle: once health says so, no caller has to find out that the
    /// connections of before are dead.
    async fn no_first_call_fails_after_redis_was_restarted() {
        // It comes back empty.
        let server = Backend::Redis.start(&["--threads", "4", "--accept-reset"]).await;
        let queue = unique_queue("restarted");
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(server.client().await);
        }
        for _ in 0..2 {
            // Each thread has a connection to Redis, and more than one if it makes them for calls at once.
            for client in &mut clients {
                let calls = (0..4).map(|_| {
                    let (mut client, queue) = (client.clone(), queue.clone());
                    tokio::spawn(async move { insert_json(&mut client, &queue, &["1"]).await })
                });
                for call in calls.collect::<Vec<_>>() {
                    call.await.unwrap();
                }
            }
            server.redis().kill();
            health_is(&server, ServingStatus::NotServing).await;
            server.redis().restart();
            health_is(&server, ServingStatus::Serving).await;
            for (number, client) in clients.iter_mut().enumerate() {
                let answer = client.insert(insert_request(&queue, vec![json("1")])).await;
                assert!(answer.is_ok(), "the first call of connection {number}: {answer:?}");
            }
        }
    }
}
