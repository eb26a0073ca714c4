//! Several servers on one Redis.

use std::{sync::Arc, time::Duration};

use data_queue_proto::v1::{Outcome, PopRequest};
use tokio::{sync::oneshot, time::Instant};

use crate::support::{
    call::{ack, heartbeat, insert_json, pop, pop_request, pop_waiting, proto, text},
    redis::Redis,
    rounds,
    server::Server,
    unique_queue, wire_tests,
};

async fn two_servers() -> (Server, Server) {
    let redis = Arc::new(Redis::start());
    let servers = (Server::on(Arc::clone(&redis), &[]), Server::on(redis, &[]));
    servers.0.ready().await;
    servers.1.ready().await;
    servers
}

wire_tests! {
    /// G15: an insert through one server wakes a pop that waits on the other, not that one's next poll.
    async fn insert_wakes_a_pop_on_the_other_server() {
        // Polls come every 0.5 to 0.9 s: without a wake-up the median would be over 300 ms.
        const MEDIAN_LIMIT: Duration = Duration::from_millis(150);
        let (one, two) = two_servers().await;
        let mut producer = one.client().await;
        let worker = two.client().await;
        let mut took = Vec::new();
        for round in 0..rounds(40, 200) {
            // Sometimes a queue that the other server knows, sometimes a new one.
            let queue = format!("{}-{}", "wake", round / 4);
            let (send, received) = oneshot::channel();
            let waiting = {
                let mut worker = worker.clone();
                let request = PopRequest { wait: Some(proto(Duration::from_secs(60))), ..pop_request(&queue) };
                tokio::spawn(async move {
                    let task = worker.pop(request).await.expect("a pop").into_inner().task.expect("a task");
                    let _ = send.send(Instant::now());
                    task
                })
            };
            // An answer on the same connection: the server has read the pop before.
            pop(&mut worker.clone(), &unique_queue("sync")).await;
            let start = Instant::now();
            insert_json(&mut producer, &queue, &[&round.to_string()]).await;
            let task = waiting.await.unwrap();
            took.push(received.await.unwrap() - start);
            assert_eq!(text(&task), round.to_string());
            assert_eq!(ack(&mut producer, &queue, &task.lease_token).await, Outcome::Applied);
        }
        took.sort();
        let median = took[took.len() / 2];
        assert!(median < MEDIAN_LIMIT, "the median wake-up took {median:?} of {took:?}");
    }

    /// G15: a waiting pop gets its task even if every wake-up is lost.
    async fn wake_ups_lost() {
        let (one, two) = two_servers().await;
        let mut producer = one.client().await;
        for round in 0..rounds(5, 50) {
            let queue = unique_queue("lost");
            let waiting = {
                let mut worker = two.client().await;
                let queue = queue.clone();
                tokio::spawn(async move { pop_waiting(&mut worker, &queue).await })
            };
            // Cut while the insert is about, so that its wake-up has no connection to come by.
            let redis = two.redis();
            redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
            insert_json(&mut producer, &queue, &[&round.to_string()]).await;
            redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
            assert_eq!(text(&waiting.await.unwrap()), round.to_string());
        }
    }

    /// G4, G5: a token is good on every server, and means the same.
    async fn a_token_is_good_on_every_server() {
        let (one, two) = two_servers().await;
        let (mut one, mut two) = (one.client().await, two.client().await);
        let queue = unique_queue("shared");
        insert_json(&mut one, &queue, &["1"]).await;
        let task = pop(&mut two, &queue).await.expect("the other server's task");
        assert_eq!(pop(&mut one, &queue).await, None);
        assert_eq!(heartbeat(&mut one, &queue, &task.lease_token).await, Outcome::Applied);
        assert_eq!(ack(&mut one, &queue, &task.lease_token).await, Outcome::Applied);
        assert_eq!(ack(&mut two, &queue, &task.lease_token).await, Outcome::AlreadyAcked);
    }
}
