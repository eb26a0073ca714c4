//! Pops that Redis did and nobody was told of, because their answers were lost or because they came too late.

use std::time::Duration;

use data_queue_proto::{
    reason,
    v1::{Outcome, PopRequest, Task},
};
use tonic::{Code, Response, Status};

use super::behind::Behind;
use crate::support::{
    PATIENCE,
    call::{ack, insert_json, pop, pop_request, pop_waiting, proto},
    keys, poll_until,
    redis::{Persistence, Redis},
    server::{Client, Server},
    status::Refusal,
    unique_queue, wire_tests,
};

const FLAGS: &[&str] = &["--threads", "1", "--store-timeout", "500ms"];
/// Far longer than a test; and a number that Redis is told for nothing else.
const LEASE: Duration = Duration::from_millis(600_123);

fn long_pop(queue: &str) -> PopRequest {
    PopRequest { lease: Some(proto(LEASE)), ..pop_request(queue) }
}

fn unavailable(case: &str, answer: Result<Response<impl std::fmt::Debug>, Status>) {
    Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check(case, answer);
}

/// The task comes long before its lease would end, delivered for the first time, and is the only one that is leased.
async fn comes_back(client: &mut Client, redis: &Redis, queue: &str, id: &str) -> Task {
    let task = pop_waiting(client, queue).await;
    assert_eq!((task.id.as_str(), task.deliveries, task.expiries), (id, 1, 0));
    assert_eq!(keys::tokens(redis), std::slice::from_ref(&task.lease_token), "something is leased to nobody");
    task
}

/// Nothing is left of it all but the counts.
async fn all_done(client: &mut Client, redis: &Redis, queue: &str, tasks: i64) {
    assert_eq!(pop(client, queue).await, None, "there were two");
    let count = |name| keys::counter(redis, name);
    assert_eq!((count("inserted"), count("acked"), count("ready")), (tasks, tasks, 0));
    assert_eq!((keys::fields(redis, "tasks"), keys::fields(redis, "leases")), (0, 0));
}

/// A server with a short store timeout behind a proxy, and one that reaches Redis straight, for all that must not meet it.
async fn start(queue: &str) -> (Behind, Server) {
    let behind = Behind::start(Persistence::None, FLAGS).await;
    let straight = behind.straight().await;
    behind.warm(&mut straight.client().await, queue).await;
    (behind, straight)
}

/// A client of a server that has a connection to Redis.
async fn connected(server: &Server) -> Client {
    let client = server.client().await;
    let ask = async || client.clone().pop(pop_request(&unique_queue("any"))).await.ok();
    poll_until("a connection to Redis", PATIENCE, ask).await;
    client
}

wire_tests! {
    /// G8, G14, row 36: a pop that reaches Redis only after the server gave it up and took back what it may have leased
    /// leases nothing any more. The acks that it carries are done all the same.
    async fn a_pop_that_comes_after_its_give_back_leases_nothing() {
        let queue = unique_queue("late");
        let (behind, straight) = start(&queue).await;
        let mut watcher = straight.client().await;
        // In the first round Redis gets to know the scripts; from then on what has passed the proxy is done at once.
        for round in 1..=3 {
            let mut client = connected(&behind.server).await;
            let [_, id] = insert_json(&mut watcher, &queue, &["1", "2"]).await.try_into().unwrap();
            let done = pop(&mut watcher, &queue).await.expect("a task").lease_token;
            let acked = keys::counter(&behind.redis, "acked");

            let bait = format!("\r\n{}\r\n", LEASE.as_millis());
            behind.proxy.hold_request_with(bait.as_bytes());
            let request = PopRequest { ack_lease_tokens: vec![done.clone()], ..long_pop(&queue) };
            unavailable("a pop that Redis did not get", client.pop(request).await);
            // Behind the lease stands what all tokens of this pop begin with, and a byte; the give-back names it, too.
            let caught = behind.proxy.caught();
            let lease = caught.windows(bait.len()).position(|window| window == bait.as_bytes()).expect("it was caught");
            let head = caught[lease..].windows(5).position(|window| window == b"$15\r\n").expect("a stem");
            let stem = &caught[lease + head + 5..][..14];
            poll_until("the give-back", PATIENCE, async || behind.proxy.passed(stem).then_some(())).await;
            assert_eq!(keys::counter(&behind.redis, "acked"), acked, "round {round}: the pop has reached Redis");

            behind.proxy.let_go();
            let late = async || (keys::counter(&behind.redis, "acked") == acked + 1).then_some(());
            poll_until("the late pop to be done", PATIENCE, late).await;
            let task = comes_back(&mut watcher, &behind.redis, &queue, &id).await;
            assert_eq!(ack(&mut watcher, &queue, &done).await, Outcome::AlreadyAcked);
            assert_eq!(ack(&mut watcher, &queue, &task.lease_token).await, Outcome::Applied);
        }
        all_done(&mut watcher, &behind.redis, &queue, 7).await;
    }

    /// G8, G14: a pop and its repetition, through the same server and through another one, are both done and no answer
    /// arrives: once both are given up the task is ready again, uncounted.
    async fn a_repeated_pop_of_which_no_answer_arrives_gives_its_task_back() {
        let queue = unique_queue("unheard");
        let (behind, straight) = start(&queue).await;
        let other = Server::launch(&behind.proxy.url(), FLAGS, None);
        let mut watcher = straight.client().await;
        for again_through in [&behind.server, &other] {
            let (mut client, mut retrying) = (connected(&behind.server).await, connected(again_through).await);
            let ids = insert_json(&mut watcher, &queue, &["1"]).await;
            let request = PopRequest { request_id: format!("for {}", ids[0]), ..long_pop(&queue) };
            behind.proxy.hold_replies();
            let first = tokio::spawn({
                let request = request.clone();
                async move { client.pop(request).await }
            });
            behind.holds("leases", 1).await;
            unavailable("the second try", retrying.pop(request.clone()).await);
            unavailable("the first try", first.await.unwrap());
            behind.proxy.let_go();

            let task = comes_back(&mut watcher, &behind.redis, &queue, &ids[0]).await;
            assert_eq!(ack(&mut watcher, &queue, &task.lease_token).await, Outcome::Applied);
            // The same request again finds nothing of its own and nothing new.
            assert_eq!(watcher.pop(request).await.unwrap().into_inner().task, None);
        }
        all_done(&mut watcher, &behind.redis, &queue, 3).await;
    }
}
