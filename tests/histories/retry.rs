//! Calls that are repeated because the answer to the first try never came.

use std::time::Duration;

use data_queue_proto::v1::{InsertRequest, Outcome, PopRequest, Task};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::{Response, Status};

use super::{behind::Behind, random::Random};
use crate::support::{
    PATIENCE,
    call::{ack, heartbeat, insert_json, insert_request, json, pop, pop_request, pop_waiting, proto, text},
    keys, poll_until,
    redis::Persistence,
    rounds,
    server::Client,
    unique_queue, wire_tests,
};

const FLAGS: &[&str] = &["--threads", "1"];
/// So long that no lease runs out.
const LEASE: Duration = Duration::from_secs(3_600);

fn named_pop(queue: &str) -> PopRequest {
    PopRequest { lease: Some(proto(LEASE)), request_id: "once".to_owned(), ..pop_request(queue) }
}

async fn answered(client: &mut Client, request: &PopRequest) -> Task {
    client.pop(request.clone()).await.expect("a pop").into_inner().task.expect("a task")
}

fn spawned<T: Send + 'static>(
    call: impl Future<Output = Result<Response<T>, Status>> + Send + 'static,
) -> JoinHandle<Option<T>> {
    tokio::spawn(async move { call.await.ok().map(Response::into_inner) })
}

wire_tests! {
    /// G3: an Insert whose server was killed between commit and answer, repeated through another server, happened once.
    async fn an_insert_repeated_after_a_kill_before_its_answer() {
        for _ in 0..rounds(3, 30) {
            let behind = Behind::start(Persistence::Always, FLAGS).await;
            let queue = unique_queue("insert");
            let mut client = behind.server.client().await;
            behind.warm(&mut client, &queue).await;
            let values = (0..100).map(|value| json(&value.to_string())).collect();
            let request = InsertRequest { request_id: "once".to_owned(), ..insert_request(&queue, values) };

            behind.proxy.hold_replies();
            let first = spawned({
                let request = request.clone();
                async move { client.insert(request).await }
            });
            behind.holds("tasks", 100).await;
            assert!(!first.is_finished(), "answered without Redis' reply");
            behind.server.kill();
            assert_eq!(first.await.unwrap(), None);

            let server = behind.straight().await;
            let mut client = server.client().await;
            let again = client.insert(request.clone()).await.expect("the repeated insert").into_inner();
            assert!(again.replayed);
            let thrice = client.insert(request).await.expect("the repeated insert").into_inner();
            assert_eq!(again, thrice);
            for (value, result) in again.results.iter().enumerate() {
                let task = pop(&mut client, &queue).await.expect("a task of the insert");
                assert_eq!((&task.id, text(&task), task.deliveries), (&result.id, &value.to_string()[..], 1));
                assert_eq!(ack(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
            }
            assert_eq!(pop(&mut client, &queue).await, None, "inserted twice");
        }
    }

    /// G4, G8: a Pop whose server was killed between commit and answer, repeated through another server, gets the same
    /// delivery, and so does each further try.
    async fn a_pop_repeated_after_a_kill_before_its_answer() {
        for _ in 0..rounds(3, 30) {
            let behind = Behind::start(Persistence::Always, FLAGS).await;
            let queue = unique_queue("pop");
            let mut client = behind.server.client().await;
            behind.warm(&mut client, &queue).await;
            let [id, other] = insert_json(&mut client, &queue, &["1", "2"]).await.try_into().unwrap();
            let request = named_pop(&queue);

            behind.proxy.hold_replies();
            let first = spawned({
                let request = request.clone();
                async move { client.pop(request).await }
            });
            behind.holds("leases", 1).await;
            assert!(!first.is_finished(), "answered without Redis' reply");
            let tokens = keys::tokens(&behind.redis);
            behind.server.kill();
            assert_eq!(first.await.unwrap(), None);

            let server = behind.straight().await;
            let mut client = server.client().await;
            for _ in 0..3 {
                let task = answered(&mut client, &request).await;
                assert_eq!((&task.id, task.deliveries, task.expiries), (&id, 1, 0));
                assert_eq!(std::slice::from_ref(&task.lease_token), &tokens[..]);
            }
            assert_eq!(keys::tokens(&behind.redis), tokens);
            assert_eq!(ack(&mut client, &queue, &tokens[0]).await, Outcome::Applied);
            // What the request got is done: it pops anew.
            let next = answered(&mut client, &request).await;
            assert_eq!((&next.id, next.deliveries), (&other, 1));
            assert_eq!(ack(&mut client, &queue, &next.lease_token).await, Outcome::Applied);
            assert_eq!(pop(&mut client, &queue).await, None);
        }
    }

    /// G5, G8: the clean-up after a first try that nobody waits for any more leaves the second try its task, whichever
    /// server it went to, and whether the first was done before it or after it.
    async fn a_pop_repeated_while_its_first_try_is_cleaned_up() {
        let behind = Behind::start(Persistence::None, FLAGS).await;
        let straight = behind.straight().await;
        let mut watcher = straight.client().await;
        behind.warm(&mut behind.server.client().await, "warm").await;
        let mut random = Random::new("clean-ups");
        for round in 0..rounds(60, 600) {
            let (same_server, requests) = (random.chance(400), random.chance(500));
            let case = format!("round {round}, same server {same_server}, requests held {requests}");
            let queue = unique_queue("clean-up");
            insert_json(&mut watcher, &queue, &["1", "2"]).await;
            let request = named_pop(&queue);
            let mut client = behind.server.client().await;
            let mut retrying = if same_server { behind.server.client().await } else { straight.client().await };

            if requests { behind.proxy.hold_requests() } else { behind.proxy.hold_replies() }
            let first = client.pop(request.clone());
            // Another moment in each round: before it is sent, while it is under way, when it is stuck.
            let left = timeout(random.up_to(Duration::from_millis(10)), first).await;
            assert!(left.is_err(), "{case}: answered without Redis");
            let again = spawned(async move { retrying.pop(request).await });
            if random.chance(700) {
                sleep(random.up_to(Duration::from_millis(10))).await;
            } else if !same_server {
                poll_until("the second try", PATIENCE, async || again.is_finished().then_some(())).await;
            }
            behind.proxy.let_go();
            let task = again.await.unwrap().and_then(|answer| answer.task).unwrap_or_else(|| panic!("{case}: no task"));
            assert_eq!((task.deliveries, task.expiries), (1, 0), "{case}");

            // A call behind everything that is under way, and more of them while the clean-up comes.
            for _ in 0..10 {
                insert_json(&mut client, "other", &["1"]).await;
                let held = heartbeat(&mut watcher, &queue, &task.lease_token).await;
                assert_eq!(held, Outcome::Applied, "{case}: taken back from the second try");
            }
            let rest = pop_waiting(&mut watcher, &queue).await;
            assert_ne!(rest.id, task.id, "{case}: delivered twice");
            assert_eq!((rest.deliveries, rest.expiries), (1, 0), "{case}");
            for token in [&task.lease_token, &rest.lease_token] {
                assert_eq!(ack(&mut watcher, &queue, token).await, Outcome::Applied, "{case}");
            }
            assert_eq!(pop(&mut watcher, &queue).await, None, "{case}");
        }
    }
}
