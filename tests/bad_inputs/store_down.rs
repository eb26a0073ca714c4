//! A store that is down, or hangs.

use std::sync::Arc;
use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::InsertRequest;
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Status};

use crate::support::{
    PATIENCE,
    call::{Call, insert_json, insert_request, json, pop, pop_request, text},
    poll_until,
    redis::{Options, Persistence, Redis},
    server::{Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

const FLAGS: &[&str] = &["--store-timeout", "3s"];
/// Less than twice the store timeout: what is within it, and what a slow machine adds.
const ANSWER_LIMIT: Duration = Duration::from_millis(5_900);

async fn start(persistence: Persistence) -> Server {
    let redis = Arc::new(Redis::with(Options { persistence, ..Options::default() }));
    let server = Server::on(redis, FLAGS);
    server.ready().await;
    server
}

fn unavailable(case: &str, start: Instant, answer: Result<(), Status>) {
    let status = Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check(case, answer);
    assert!(status.retry_delay().is_some(), "{case}: no RetryInfo in {status:?}");
    assert!(start.elapsed() < ANSWER_LIMIT, "{case}: answered after {:?}", start.elapsed());
}

/// All of them at once, so that each meets Redis as it is now, and once more, when the server knows.
async fn every_call_is_unavailable(client: &Client, state: &str) {
    for _ in 0..2 {
        let mut calls = JoinSet::new();
        for call in Call::every_at_all(&unique_queue("down")) {
            let (case, mut client) = (format!("Redis {state}: {call:?}"), client.clone());
            calls.spawn(async move {
                let start = Instant::now();
                unavailable(&case, start, call.send(&mut client).await);
            });
        }
        while let Some(call) = calls.join_next().await {
            call.expect("a call");
        }
    }
}

/// The server comes back by itself.
async fn serves_again(client: &mut Client) {
    let queue = unique_queue("back");
    let insert = insert_request(&queue, vec![json("1")]);
    poll_until("the server to serve again", PATIENCE, async || client.insert(insert.clone()).await.ok()).await;
    // An attempt to connect that began before may end after that, and is news once more.
    let popped = async || client.pop(pop_request(&queue)).await.ok();
    let popped = poll_until("the server to go on serving", PATIENCE, popped).await;
    assert!(popped.into_inner().task.is_some());
}

wire_tests! {
    /// Row 36: Redis hangs; each call is answered within the store timeout, and all is well when Redis goes on.
    async fn row_36_redis_hangs() {
        let server = start(Persistence::None).await;
        let mut client = server.client().await;
        let queue = unique_queue("kept");
        insert_json(&mut client, &queue, &["\"kept\""]).await;
        server.redis().stop();
        every_call_is_unavailable(&client, "hangs").await;
        server.redis().cont();
        serves_again(&mut client).await;
        let task = pop(&mut client, &queue).await.expect("what was there before");
        assert_eq!((text(&task), task.deliveries), ("\"kept\"", 1));
    }

    /// Row 36, G3: an insert that timed out may have happened; repeated under its request id it happened once.
    async fn row_36_insert_while_redis_hangs() {
        let server = start(Persistence::None).await;
        let mut client = server.client().await;
        let queue = unique_queue("once");
        let request = InsertRequest { request_id: "once".to_owned(), ..insert_request(&queue, vec![json("1")]) };
        // Once before, so that what a first insert makes is there.
        insert_json(&mut client, &queue, &["0"]).await;
        server.redis().stop();
        let start = Instant::now();
        unavailable("Redis hangs", start, client.insert(request.clone()).await.map(drop));
        server.redis().cont();
        let insert = async || client.clone().insert(request.clone()).await.ok();
        poll_until("the insert to succeed", PATIENCE, insert).await;
        for expected in ["0", "1"] {
            assert_eq!(text(&pop(&mut client, &queue).await.expect("a task")), expected);
        }
        assert_eq!(pop(&mut client, &queue).await, None, "inserted twice");
    }

    /// Row 36, G1: Redis is down; calls are refused, and all is well when it is back.
    async fn row_36_redis_down() {
        let server = start(Persistence::Always).await;
        let mut client = server.client().await;
        let queue = unique_queue("kept");
        insert_json(&mut client, &queue, &["\"kept\""]).await;
        server.redis().kill();
        every_call_is_unavailable(&client, "is down").await;
        server.redis().restart();
        serves_again(&mut client).await;
        let task = pop(&mut client, &queue).await.expect("what was there before");
        assert_eq!((text(&task), task.deliveries), ("\"kept\"", 1));
    }

    /// Row 36: Redis is not there when the server starts; the server waits for it and says so.
    async fn row_36_redis_down_at_the_start() {
        let redis = Arc::new(Redis::start());
        redis.kill();
        let server = Server::on(Arc::clone(&redis), FLAGS);
        let mut client = server.client().await;
        every_call_is_unavailable(&client, "is not there yet").await;
        assert_eq!(server.health("").await, tonic_health::pb::health_check_response::ServingStatus::NotServing);
        redis.restart();
        server.ready().await;
        serves_again(&mut client).await;
    }
}
