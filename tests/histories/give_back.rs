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

wire_tests! {
    /// G8, G14, row 36: a pop that reaches Redis only after the server gave it up and took back what it may have leased
    /// leases nothing any more. The acks that it carries are done all the same.
    async fn a_pop_that_comes_after_its_give_back_leases_nothing() {
        let behind = Behind::start(Persistence::None, FLAGS).await;
        let queue = unique_queue("late");
        let mut client = behind.server.client().await;
        behind.warm(&mut client, &queue).await;
        let [_, id] = insert_json(&mut client, &queue, &["1", "2"]).await.try_into().unwrap();
        let done = pop(&mut client, &queue).await.expect("a task").lease_token;

        let bait = format!("\r\n{}\r\n", LEASE.as_millis());
        behind.proxy.hold_request_with(bait.as_bytes());
        let request = PopRequest { ack_lease_tokens: vec![done.clone()], ..long_pop(&queue) };
        unavailable("a pop that Redis did not get", client.pop(request).await);
        // Behind the lease stands what all tokens of this pop begin with, and the give-back names it, too.
        let caught = behind.proxy.caught();
        let lease = caught.windows(bait.len()).position(|window| window == bait.as_bytes()).expect("the pop was caught");
        let stem = caught[lease + bait.len()..].splitn(2, |byte| *byte == b'\n').nth(1).expect("the stem")[..14].to_vec();
        poll_until("the give-back", PATIENCE, async || behind.proxy.passed(&stem).then_some(())).await;
        assert_eq!(keys::counter(&behind.redis, "acked"), 1, "the pop has reached Redis");

        behind.proxy.let_go();
        let late = async || (keys::counter(&behind.redis, "acked") == 2).then_some(());
        poll_until("the late pop to be done", PATIENCE, late).await;
        let task = comes_back(&mut client, &behind.redis, &queue, &id).await;
        assert_eq!(ack(&mut client, &queue, &done).await, Outcome::AlreadyAcked);
        assert_eq!(ack(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
        all_done(&mut client, &behind.redis, &queue, 3).await;
    }

    /// G8, G14: a pop and its repetition, through the same server and through another one, are both done and no answer
    /// arrives: once both are given up the task is ready again, uncounted.
    async fn a_repeated_pop_of_which_no_answer_arrives_gives_its_task_back() {
        let behind = Behind::start(Persistence::None, FLAGS).await;
        let other = Server::launch(&behind.proxy.url(), FLAGS, None);
        other.ready().await;
        let queue = unique_queue("unheard");
        let mut clients = [behind.server.client().await, other.client().await];
        for client in &mut clients {
            behind.warm(client, &queue).await;
        }
        for again_through in [0, 1] {
            let ids = insert_json(&mut clients[0], &queue, &["1"]).await;
            let request_id = format!("once {again_through}");
            let request = PopRequest { request_id, ..long_pop(&queue) };
            behind.proxy.hold_replies();
            let first = tokio::spawn({
                let (mut client, request) = (clients[0].clone(), request.clone());
                async move { client.pop(request).await }
            });
            behind.holds("leases", 1).await;
            unavailable("the second try", clients[again_through].pop(request.clone()).await);
            unavailable("the first try", first.await.unwrap());
            behind.proxy.let_go();

            let serving = async || (clients[0].clone().pop(pop_request(&unique_queue("any"))).await).ok();
            poll_until("the server to serve again", PATIENCE, serving).await;
            let task = comes_back(&mut clients[0], &behind.redis, &queue, &ids[0]).await;
            assert_eq!(ack(&mut clients[0], &queue, &task.lease_token).await, Outcome::Applied);
            // The same request again finds nothing of its own and nothing new.
            assert_eq!(clients[0].pop(request).await.unwrap().into_inner().task, None);
        }
        all_done(&mut clients[0], &behind.redis, &queue, 4).await;
    }
}
