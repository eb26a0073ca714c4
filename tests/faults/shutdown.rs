//! SIGTERM.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use data_queue_proto::reason;
use data_queue_proto::v1::{Outcome, PopBatchRequest, PopRequest};
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};

use crate::support::{
    PATIENCE,
    call::{
        Call, ack, insert_json, insert_request, json, outcomes, pop, pop_batch, pop_batch_request, pop_request,
        pop_waiting, proto, text,
    },
    keys, on_every_store, poll_until,
    proxy::Proxy,
    raw::Connection,
    redis::Redis,
    server::{Backend, Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

type Watch = Streaming<HealthCheckResponse>;

const LONG_WAIT: Duration = Duration::from_secs(60);
const LONG_LEASE: Duration = Duration::from_secs(3_600);
const POP: &str = "/dataqueue.v1.DataQueue/Pop";
/// Far less than the wait, far more than the work.
const AT_ONCE: Duration = Duration::from_secs(8);

/// A call that is sent before whatever is sent on its connection later.
async fn begun<T: Send + 'static>(call: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let mut call = Box::pin(call);
    let answered = poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_ready())).await;
    assert!(!answered, "answered before it could be sent");
    tokio::spawn(call)
}

/// Waits that the server has read, on this client's connection.
async fn sync(client: &mut Client) {
    pop(client, &unique_queue("sync")).await;
}

/// News of the health of a service that serves.
async fn watch(server: &Server, service: &str) -> Watch {
    let request = HealthCheckRequest { service: service.to_owned() };
    let mut watch = server.health_client().await.watch(request).await.unwrap().into_inner();
    told(&mut watch, ServingStatus::Serving).await;
    watch
}

async fn told(watch: &mut Watch, status: ServingStatus) {
    let next = timeout(PATIENCE, watch.message()).await.expect("news in time").unwrap();
    assert_eq!(next.expect("news").status(), status);
}

fn refused(case: &str, answer: Result<(), Status>) {
    let status = Refusal::of(Code::Unavailable, reason::SHUTTING_DOWN).check(case, answer);
    assert!(status.retry_delay().is_some(), "{case}: no RetryInfo in {status:?}");
}

fn exited_well(server: &Server, limit: Duration) {
    let status = server.wait_exit(limit);
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

on_every_store! {
    /// G16: waiting pops are answered empty at once, their acks applied, and the server exits with code 0.
    async fn waiting_pops_are_answered(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("waiting");
        insert_json(&mut client, &queue, &["1"]).await;
        let token = pop(&mut client, &queue).await.unwrap().lease_token;

        let wait = Some(proto(LONG_WAIT));
        let fused = PopRequest { wait, ack_lease_tokens: vec![token], ..pop_request(&queue) };
        let waiting = {
            let mut client = client.clone();
            begun(async move { client.pop(fused).await }).await
        };
        let mut many = Vec::new();
        for number in 0..20 {
            let mut client = client.clone();
            let request = PopRequest { wait, ..pop_request(&format!("{queue}.{number}")) };
            many.push(begun(async move { client.pop(request).await }).await);
        }
        let batch = PopBatchRequest { wait, ..pop_batch_request(&format!("{queue}.batch")) };
        let mut batch_client = client.clone();
        let batch = begun(async move { pop_batch(&mut batch_client, batch).await }).await;
        sync(&mut client).await;

        let start = Instant::now();
        server.terminate();
        let answer = waiting.await.unwrap().expect("an empty answer").into_inner();
        assert_eq!(answer.task, None);
        assert_eq!(outcomes(&answer.ack_outcomes), [Outcome::Applied]);
        for waiting in many {
            assert_eq!(waiting.await.unwrap().expect("an empty answer").into_inner().task, None);
        }
        assert_eq!(batch.await.unwrap().expect("an end of the stream"), []);
        assert!(start.elapsed() < AT_ONCE, "answered after {:?}", start.elapsed());
        exited_well(&server, AT_ONCE);
    }

    /// G16: health turns to not serving, and every call that comes afterwards is refused, with the reason and when to try
    /// again, on old connections and new ones.
    async fn health_turns_and_new_calls_are_refused(backend) {
        let server = backend.start(&["--grace", "60s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("refused");
        insert_json(&mut client, &queue, &["\"kept\""]).await;
        let connection = Connection::without_window(server.address()).await;
        let under_way = connection.call(POP, &[], &PopRequest { lease: Some(proto(LONG_LEASE)), ..pop_request(&queue) }).await;
        let mut watches = [watch(&server, "").await, watch(&server, "dataqueue.v1.DataQueue").await];
        server.terminate();
        for watch in &mut watches {
            told(watch, ServingStatus::NotServing).await;
        }

        // The call that is under way keeps the server: connections that were open and new ones are answered.
        let late = server.client().await;
        for mut client in [client, late] {
            for call in Call::every(&queue) {
                refused(&format!("{call:?}"), call.send(&mut client).await);
            }
        }
        // A connection with a call under way takes no other.
        let status = connection.status("Insert", &[], &insert_request(&queue, vec![json("1")])).await;
        refused("an insert behind a pop", Err::<(), _>(status));
        assert_eq!(server.health("").await, ServingStatus::NotServing);

        under_way.cancel();
        exited_well(&server, Duration::from_secs(20));
        if backend != Backend::Memory {
            server.restart().await;
            let mut client = server.client().await;
            let task = pop_waiting(&mut client, &queue).await;
            assert_eq!((text(&task), task.deliveries, task.expiries), ("\"kept\"", 1, 0));
            assert_eq!(pop(&mut client, &queue).await, None, "an insert that was refused was done");
        }
    }

    /// G16, G8: what was leased and not sent is put back, a client that never reads holds up nothing past the grace.
    async fn reader_that_never_reads(backend) {
        let server = backend.start(&["--grace", "2s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("unread");
        insert_json(&mut client, &queue, &["1", "2"]).await;
        let connection = Connection::without_window(server.address()).await;
        let request = PopRequest { lease: Some(proto(LONG_LEASE)), ..pop_request(&queue) };
        let answering = connection.call(POP, &[], &request).await;
        server.terminate();
        exited_well(&server, Duration::from_secs(20));
        drop(answering);
        if backend != Backend::Memory {
            server.restart().await;
            let mut client = server.client().await;
            for _ in 0..2 {
                let task = pop_waiting(&mut client, &queue).await;
                assert_eq!((task.deliveries, task.expiries), (1, 0), "{task:?}");
                ack(&mut client, &queue, &task.lease_token).await;
            }
        }
    }

    /// G16: with nothing to do the server ends at once, and an open connection does not keep it.
    async fn idle_server_ends(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        sync(&mut client).await;
        server.terminate();
        exited_well(&server, AT_ONCE);
    }
}

wire_tests! {
    /// G16: a call that waits for Redis when the server is told to stop is answered, and then the server ends.
    async fn running_calls_are_answered() {
        let redis = Arc::new(Redis::start());
        let proxy = Proxy::start(&redis).await;
        let flags = ["--store-timeout", "60s", "--grace", "120s", "--threads", "1"];
        let server = Server::launch(&proxy.url(), &flags, Some(Arc::clone(&redis)));
        server.ready().await;
        let mut client = server.client().await;
        let queue = unique_queue("running");
        insert_json(&mut client, &queue, &["0", "1"]).await;
        // Once before, so that Redis knows the scripts.
        let warm = pop(&mut client, &queue).await.expect("a task").lease_token;
        assert_eq!(ack(&mut client, &queue, &warm).await, Outcome::Applied);
        let token = pop(&mut client, &queue).await.expect("a task").lease_token;
        let mut watch = watch(&server, "").await;

        proxy.hold_replies();
        let insert = tokio::spawn({
            let (mut client, queue) = (client.clone(), queue.clone());
            async move { client.insert(insert_request(&queue, vec![json("2")])).await }
        });
        let inserted = async || (keys::fields(&redis, "tasks") == 2).then_some(());
        poll_until("the insert to be done", PATIENCE, inserted).await;
        let acked = tokio::spawn({
            let (mut client, queue) = (client.clone(), queue.clone());
            async move { ack(&mut client, &queue, &token).await }
        });
        let done = async || (keys::counter(&redis, "acked") == 2).then_some(());
        poll_until("the ack to be done", PATIENCE, done).await;
        assert!(!insert.is_finished() && !acked.is_finished(), "answered without Redis' reply");
        server.terminate();
        told(&mut watch, ServingStatus::NotServing).await;
        refused("an insert", client.insert(insert_request(&queue, vec![json("3")])).await.map(drop));
        assert!(!insert.is_finished() && !acked.is_finished(), "answered without Redis' reply");

        proxy.let_go();
        let answer = insert.await.unwrap().expect("an answer").into_inner();
        assert_eq!((answer.results.len(), answer.replayed), (1, false));
        assert_eq!(acked.await.unwrap(), Outcome::Applied);
        exited_well(&server, PATIENCE);
        assert_eq!((keys::counter(&redis, "inserted"), keys::counter(&redis, "ready")), (3, 1));
    }
}
