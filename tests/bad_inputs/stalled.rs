//! Readers of a stream that do not read it.

use data_queue_proto::v1::{
    ConsumeOpen, ConsumeResponse, Outcome, PopBatchRequest, PopBatchResponse, consume_request::Request,
};
use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{Witness, ack_request, counts, five, insert_request, json, outcomes, pop_batch, pop_batch_request, proto},
    consume::{open, request},
    on_every_store, poll_until,
    raw::Connection,
    server::Client,
    unique_queue,
};

const CONSUME: &str = "/dataqueue.v1.DataQueue/Consume";
const POP_BATCH: &str = "/dataqueue.v1.DataQueue/PopBatch";
/// So long that no task comes again because its lease ran out.
const LEASE: std::time::Duration = std::time::Duration::from_secs(12 * 3_600);
const TASKS: usize = 900;
const IN_A_MESSAGE: usize = 200;
/// A message of 200 tasks has more bytes than this, and less than twice as many.
const MESSAGE: u32 = 100_000;
/// The bytes of a value, and so fewer than those of an envelope or of a task in a message.
const VALUE: usize = MESSAGE as usize / IN_A_MESSAGE;
/// Of a stream of deliveries: the most tasks in a message, which ends with the one that makes it 64 KiB or more.
const IN_A_DELIVERY: u64 = (64 << 10) / VALUE as u64 + 1;

async fn fill(client: &mut Client, queue: &str) {
    let padding = "x".repeat(VALUE);
    let tasks = (0..TASKS).map(|number| json(&format!("\"{number} {padding}\""))).collect();
    client.insert(insert_request(queue, tasks)).await.unwrap();
}

on_every_store! {
    /// Row 39: a PopBatch whose reader never reads leases what the window holds and one message more; after the timeout
    /// that message is back, uncounted, its tokens are void, and the stream ends and says why.
    async fn row_39_batch_that_is_never_read(backend) {
        let server = backend.start(&["--stall-timeout", "2s"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for (window, handed_over) in [(0, 0), (2 * MESSAGE, 2 * IN_A_MESSAGE)] {
            let queue = unique_queue("stalled");
            fill(&mut client, &queue).await;

            let connection = Connection::with_window(server.address(), window).await;
            let all = PopBatchRequest {
                max_tasks: u32::try_from(TASKS).unwrap(),
                lease: Some(proto(LEASE)),
                ..pop_batch_request(&queue)
            };
            let answering = connection.call(POP_BATCH, &[], &all).await;
            let most = (handed_over + IN_A_MESSAGE) as u64;
            let mut seen = 0;
            poll_until("what was not sent to be back", PATIENCE, async || {
                let leased = counts(&mut client, &queue).await.leased;
                assert!(leased <= most, "{leased} leased, and only {most} may be");
                seen = seen.max(leased);
                (seen == most && leased == handed_over as u64).then_some(())
            })
            .await;
            let rest = pop_batch(&mut client, all).await.unwrap();
            assert_eq!(rest.len(), TASKS - handed_over, "window {window}");
            assert!(rest.iter().all(|task| (task.deliveries, task.expiries) == (1, 0)), "counted: {rest:?}");

            connection.set_window(1 << 24);
            let (messages, status) = answering.messages::<PopBatchResponse>().await;
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
            assert!(status.message().contains("did not read for 2s"), "{status:?}");
            let tokens = messages.into_iter().flat_map(|message| message.tasks).map(|task| task.lease_token);
            let tokens = tokens.collect::<Vec<_>>();
            assert_eq!(tokens.len() as u64, most, "window {window}");
            let acked = client.ack(ack_request(&queue, &tokens)).await.unwrap().into_inner();
            let (good, void) = (vec![Outcome::Applied; handed_over], vec![Outcome::LeaseLost; IN_A_MESSAGE]);
            assert_eq!(outcomes(&acked.outcomes), [good, void].concat(), "window {window}");
            let (left, gone) = ((TASKS - handed_over) as u64, handed_over as u64);
            assert_eq!(five(&mut client, &queue).await, [0, left, 0, TASKS as u64, gone]);
        }
        witness.unchanged(&mut client, "readers that do not read").await;
    }

    /// Row 39, the same of Consume: a client that never reads is leased what the window holds and one message more, and
    /// never more than it wants to hold; after the timeout what was not sent is back, uncounted, and the stream ends.
    async fn row_39_stream_that_is_never_read(backend) {
        let server = backend.start(&["--stall-timeout", "2s"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for (window, max_outstanding) in [(0, 10_000), (2 * MESSAGE, 10_000), (0, 10)] {
            let case = format!("window {window}, {max_outstanding} outstanding");
            let queue = unique_queue("stalled");
            fill(&mut client, &queue).await;
            // What begins in the window is sent.
            let sent_at_most = if window == 0 { 0 } else { u64::from(window) / VALUE as u64 + IN_A_DELIVERY };
            let most = u64::from(max_outstanding).min(sent_at_most + IN_A_DELIVERY);

            let connection = Connection::with_window(server.address(), window).await;
            let first = ConsumeOpen { lease: Some(proto(LEASE)), ..open(&queue, max_outstanding) };
            let answering = connection.open_stream(CONSUME, &request(Request::Open(first))).await;
            let mut seen = 0;
            let sent = poll_until("what was not sent to be back", PATIENCE, async || {
                let leased = counts(&mut client, &queue).await.leased;
                assert!(leased <= most, "{case}: {leased} leased, and only {most} may be");
                seen = seen.max(leased);
                (leased < seen).then_some(leased)
            })
            .await;
            assert!(sent <= sent_at_most && (sent > 0) == (window > 0), "{case}: {sent} count as sent");
            let rest = PopBatchRequest {
                max_tasks: u32::try_from(TASKS).unwrap(),
                lease: Some(proto(LEASE)),
                ..pop_batch_request(&queue)
            };
            let rest = pop_batch(&mut client, rest).await.unwrap();
            assert_eq!(rest.len() as u64, TASKS as u64 - sent, "{case}");
            assert!(rest.iter().all(|task| (task.deliveries, task.expiries) == (1, 0)), "{case}, counted: {rest:?}");

            connection.set_window(1 << 24);
            let (messages, status) = answering.messages::<ConsumeResponse>().await;
            assert_eq!(status.code(), Code::DeadlineExceeded, "{case}: {status:?}");
            assert!(status.message().contains("did not read for 2s"), "{case}: {status:?}");
            let tokens = messages.into_iter().flat_map(|message| message.tasks).map(|task| task.lease_token);
            let tokens = tokens.collect::<Vec<_>>();
            assert_eq!(tokens.len() as u64, seen, "{case}");
            let acked = outcomes(&client.ack(ack_request(&queue, &tokens)).await.unwrap().into_inner().outcomes);
            let (good, void) = acked.split_at(usize::try_from(sent).unwrap());
            assert!(good.iter().all(|outcome| *outcome == Outcome::Applied), "{case}: {good:?}");
            assert!(void.iter().all(|outcome| *outcome == Outcome::LeaseLost), "{case}: {void:?}");
            assert_eq!(five(&mut client, &queue).await, [0, TASKS as u64 - sent, 0, TASKS as u64, sent], "{case}");
        }
        witness.unchanged(&mut client, "streams that are not read").await;
    }
}
