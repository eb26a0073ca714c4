//! Leases, waits and ages that are out of range, and deadlines of calls.

use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::{HeartbeatRequest, Outcome, PopBatchRequest, PopRequest, PutbackRequest, Task};
use prost_types::Duration as ProtoDuration;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use crate::support::{
    call::{
        Call, Witness, duration, heartbeat_request, held_for_request, insert_json, insert_request, json, outcomes, pop,
        pop_batch_request, pop_for, pop_request, proto,
    },
    on_every_store,
    raw::{Connection, grpc_timeout},
    status::{Details, Refusal},
    unique_queue,
};

const HOUR: i64 = 3_600;

fn span(seconds: i64, nanos: i32) -> ProtoDuration {
    ProtoDuration { seconds, nanos }
}

/// What no field of any method takes.
fn malformed() -> Vec<ProtoDuration> {
    vec![
        span(-1, 0),
        span(0, -1),
        span(i64::MIN, 0),
        span(i64::MAX, 0),
        span(i64::MIN, i32::MIN),
        span(i64::MAX, i32::MAX),
        span(1, -1),
        span(1, 1_000_000_000),
        span(1, i32::MAX),
    ]
}

on_every_store! {
    /// Row 20: lease out of range, in every method that takes one.
    async fn row_20_lease_out_of_range(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let mut leases = malformed();
        leases.extend([span(0, 0), span(0, 99_999_999), span(12 * HOUR, 1), span(12 * HOUR + 1, 0)]);
        for lease in leases {
            let calls = [
                Call::Pop(PopRequest { lease: Some(lease), ..pop_request(&queue) }),
                Call::PopBatch(PopBatchRequest { lease: Some(lease), ..pop_batch_request(&queue) }),
                Call::Heartbeat(HeartbeatRequest {
                    lease: Some(lease),
                    ..heartbeat_request(&queue, std::slice::from_ref(&witness.token))
                }),
            ];
            for call in calls {
                let case = format!("{call:?}");
                Refusal::invalid(reason::LEASE_OUT_OF_RANGE, "lease").check(&case, call.send(&mut client).await);
            }
            witness.unchanged(&mut client, &format!("{lease:?}")).await;
        }
    }

    /// Row 20: an unset lease is the default, and both ends of the range are in it.
    async fn row_20_lease_in_range(backend) {
        let server = backend.start(&["--default-lease", "77s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("lease");
        insert_json(&mut client, &queue, &["1", "2", "3"]).await;
        let task = pop(&mut client, &queue).await.unwrap();
        let left = duration(task.lease);
        assert!(left <= Duration::from_secs(77) && left > Duration::from_secs(40), "{left:?}");
        let request = heartbeat_request(&queue, &[task.lease_token]);
        let answer = client.heartbeat(request).await.unwrap().into_inner();
        let left = duration(answer.lease);
        assert!(left <= Duration::from_secs(77) && left > Duration::from_secs(40), "{left:?}");

        let longest = Duration::from_secs(12 * 3_600);
        let left = duration(pop_for(&mut client, &queue, longest).await.lease);
        assert!(left <= longest && left > longest / 2, "{left:?}");
        let shortest = Duration::from_millis(100);
        let left = duration(pop_for(&mut client, &queue, shortest).await.lease);
        assert!(left <= shortest, "{left:?}");
    }

    /// Row 21: wait out of range.
    async fn row_21_wait_out_of_range(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let mut waits = malformed();
        waits.extend([span(60, 1), span(61, 0)]);
        for wait in waits {
            let calls = [
                Call::Pop(PopRequest { wait: Some(wait), ..pop_request(&queue) }),
                Call::PopBatch(PopBatchRequest { wait: Some(wait), ..pop_batch_request(&queue) }),
            ];
            for call in calls {
                let case = format!("{call:?}");
                Refusal::invalid(reason::WAIT_OUT_OF_RANGE, "wait").check(&case, call.send(&mut client).await);
            }
            witness.unchanged(&mut client, &format!("{wait:?}")).await;
        }
    }

    /// Row 22: a wait longer than the call's deadline ends empty just before it. A machine that stands still just then lets the
    /// deadline pass: one of some calls must be answered.
    async fn row_22_wait_longer_than_the_deadline(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let empty = unique_queue("empty");
        let limit = Duration::from_secs(4);
        let wait = Some(span(60, 0));

        let (mut popper, queue) = (client.clone(), empty.clone());
        of_some_calls(limit, async || {
            let mut request = Request::new(PopRequest { wait, ..pop_request(&queue) });
            request.set_timeout(limit);
            Ok(popper.pop(request).await?.into_inner().task)
        })
        .await;
        let (mut popper, queue) = (client.clone(), empty.clone());
        of_some_calls(limit, async || {
            let mut request = Request::new(PopBatchRequest { wait, ..pop_batch_request(&queue) });
            request.set_timeout(limit);
            let message = popper.pop_batch(request).await?.into_inner().message().await?;
            Ok(message.and_then(|message| message.tasks.into_iter().next()))
        })
        .await;
        witness.unchanged(&mut client, "waits that found nothing").await;
    }

    /// Row 31, G6: a heartbeat never shortens a lease.
    async fn row_31_heartbeat_shorter_than_what_is_left(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("heartbeat");
        insert_json(&mut client, &queue, &["1"]).await;
        let task = pop_for(&mut client, &queue, Duration::from_secs(3_600)).await;
        let lease = Some(proto(Duration::from_secs(1)));
        let request = HeartbeatRequest { lease, ..heartbeat_request(&queue, &[task.lease_token]) };
        let answer = client.heartbeat(request).await.unwrap().into_inner();
        assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied]);
        assert_eq!(answer.lease_expires_at, task.lease_expires_at);
        assert!(duration(answer.lease) > Duration::from_secs(1_800), "{answer:?}");
    }

    /// Row 33: Putback that says nothing about what, or an age that cannot be.
    async fn row_33_putback_selection(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let answer = client.putback(PutbackRequest { queue: queue.clone(), selection: None }).await;
        Refusal::of(Code::InvalidArgument, reason::PUTBACK_SELECTION_MISSING).check("no selection", answer);
        let negative_or_malformed =
            malformed().into_iter().filter(|held_for| *held_for != span(i64::MAX, 0));
        for held_for in negative_or_malformed {
            let answer = client.putback(held_for_request(&queue, held_for)).await;
            let refusal = Refusal::invalid(reason::HELD_FOR_OUT_OF_RANGE, "held_for");
            refusal.check(&format!("{held_for:?}"), answer);
            witness.unchanged(&mut client, &format!("{held_for:?}")).await;
        }
        // As old as can be is a good age, which nothing has: refused or not, nothing is put back.
        if let Err(status) = client.putback(held_for_request(&queue, span(i64::MAX, 0))).await {
            assert_eq!(status.reason().as_deref(), Some(reason::HELD_FOR_OUT_OF_RANGE));
        }
        witness.unchanged(&mut client, "the longest held_for").await;
    }

    /// Row 37: a deadline that has passed before the call begins, and one that cannot be read.
    async fn row_37_deadline_passed_or_malformed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let connection = Connection::open(server.address()).await;
        let insert = insert_request(&queue, vec![json("1")]);
        let soon = grpc_timeout(Duration::from_nanos(1));
        let headers = [("grpc-timeout", soon.as_str())];
        for status in [
            connection.status("Insert", &headers, &insert).await,
            connection.status("Pop", &headers, &pop_request(&queue)).await,
        ] {
            // No reason: that would promise that nothing happened, and of a call that was under way nobody knows.
            assert_eq!((status.code(), status.reason()), (Code::DeadlineExceeded, None), "{status:?}");
        }
        witness.unchanged(&mut client, &soon).await;
        for (timeout, refusal) in [
            ("abc", Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID)),
            ("", Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID)),
            ("-1S", Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID)),
            ("123456789S", Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID)),
            ("1.5S", Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID)),
        ] {
            let headers = [("grpc-timeout", timeout)];
            let status = connection.status("Insert", &headers, &insert).await;
            refusal.check(&format!("Insert, {timeout:?}"), Err::<(), _>(status));
            let status = connection.status("Pop", &headers, &pop_request(&queue)).await;
            refusal.check(&format!("Pop, {timeout:?}"), Err::<(), _>(status));
            witness.unchanged(&mut client, timeout).await;
        }
        for timeout in ["99999999H", "60S", "60000m"] {
            let status = connection.status("Pop", &[("grpc-timeout", timeout)], &pop_request("other")).await;
            assert_eq!(status.code(), Code::Ok, "{timeout}: {status:?}");
        }
    }
}

/// One of a few calls is answered, with nothing, and not much before its time.
async fn of_some_calls(limit: Duration, mut call: impl AsyncFnMut() -> Result<Option<Task>, Status>) {
    const CALLS: usize = 5;
    for left in (0..CALLS).rev() {
        let start = Instant::now();
        match call().await {
            Ok(task) => {
                assert_eq!(task, None);
                assert!(start.elapsed() > limit / 2, "gave up after {:?}", start.elapsed());
                return;
            }
            Err(status) => assert!(left > 0, "no empty answer before the deadline: {status:?}"),
        }
    }
}
