//! SIGTERM.

use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::{Outcome, PopBatchRequest, PopRequest};
use tokio::time::{Instant, timeout};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::support::{
    PATIENCE,
    call::{
        ack, insert_json, insert_request, outcomes, pop, pop_batch, pop_batch_request, pop_request, pop_waiting, proto,
    },
    on_every_store,
    raw::Connection,
    server::{Backend, Client, Server},
    status::Details,
    unique_queue,
};

const LONG_WAIT: Duration = Duration::from_secs(60);
/// Far less than the wait, far more than the work.
const AT_ONCE: Duration = Duration::from_secs(8);

/// Waits that the server has read, on this client's connection.
async fn sync(client: &mut Client) {
    pop(client, &unique_queue("sync")).await;
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
            tokio::spawn(async move { client.pop(fused).await })
        };
        let many = (0..20).map(|number| {
            let mut client = client.clone();
            let request = PopRequest { wait, ..pop_request(&format!("{queue}.{number}")) };
            tokio::spawn(async move { client.pop(request).await })
        });
        let many = many.collect::<Vec<_>>();
        let batch = PopBatchRequest { wait, ..pop_batch_request(&format!("{queue}.batch")) };
        let mut batch_client = client.clone();
        let batch = tokio::spawn(async move { pop_batch(&mut batch_client, batch).await });
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

    /// G16: health turns to not serving, and what is called afterwards is refused.
    async fn health_turns_and_new_calls_are_refused(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut watches = Vec::new();
        for service in ["", "dataqueue.v1.DataQueue"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let mut watch = server.health_client().await.watch(request).await.unwrap().into_inner();
            let first = watch.message().await.unwrap().expect("the health now");
            assert_eq!(first.status(), ServingStatus::Serving);
            watches.push(watch);
        }
        server.terminate();
        for watch in &mut watches {
            let next = timeout(PATIENCE, watch.message()).await.expect("news in time").unwrap();
            assert_eq!(next.expect("news").status(), ServingStatus::NotServing);
        }
        let refused = client.insert(insert_request("late", vec![])).await.unwrap_err();
        if let Some(found) = refused.reason() {
            assert_eq!((refused.code(), found.as_str()), (Code::Unavailable, reason::SHUTTING_DOWN), "{refused:?}");
        }
        drop((client, watches));
        exited_well(&server, Duration::from_secs(20));
    }

    /// G16, G8: what was leased and not sent is put back, a client that never reads holds up nothing past the grace.
    async fn reader_that_never_reads(backend) {
        let server = backend.start(&["--grace", "2s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("unread");
        insert_json(&mut client, &queue, &["1", "2"]).await;
        let connection = Connection::without_window(server.address()).await;
        let request = PopRequest { lease: Some(proto(Duration::from_secs(3_600))), ..pop_request(&queue) };
        let answering = connection.call("/dataqueue.v1.DataQueue/Pop", &[], &request).await;
        server.terminate();
        exited_well(&server, Duration::from_secs(20));
        drop(answering);
        if backend == Backend::Redis {
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
