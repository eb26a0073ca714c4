//! Clients that leave before their answer was handed over.

use std::time::Duration;

use data_queue_proto::v1::{Outcome, PopBatchRequest, PopBatchResponse, PopRequest, Task};
use tokio::time::timeout;
use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{
        ack, ack_request, counts, five, held_for_request, insert_json, insert_request, json, outcomes, pop, pop_batch,
        pop_batch_request, pop_for, pop_request, pop_waiting, proto, text,
    },
    keys, on_every_store, poll_until,
    raw::Connection,
    server::Backend,
    unique_queue,
};

/// So long that a task which comes again within a test did not come because its lease ran out.
const LEASE: Duration = Duration::from_secs(12 * 3_600);
const ROUNDS: usize = 20;
const POP: &str = "/dataqueue.v1.DataQueue/Pop";
const POP_BATCH: &str = "/dataqueue.v1.DataQueue/PopBatch";

fn long_pop(queue: &str) -> PopRequest {
    PopRequest { lease: Some(proto(LEASE)), wait: Some(proto(Duration::from_secs(60))), ..pop_request(queue) }
}

/// How a reader leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    Cancels,
    Vanishes,
}

/// Several messages' worth: a PopBatch has at most 200 tasks in each.
const MANY: usize = 650;
const IN_A_MESSAGE: usize = 200;
/// A message of 200 tasks has more bytes than this, and less than twice as many.
const MESSAGE: u32 = 100_000;
const PADDING: usize = MESSAGE as usize / IN_A_MESSAGE;

fn long_batch(queue: &str, max_tasks: usize) -> PopBatchRequest {
    let max_tasks = u32::try_from(max_tasks).unwrap();
    PopBatchRequest { max_tasks, lease: Some(proto(LEASE)), ..pop_batch_request(queue) }
}

/// A PopBatch whose reader leaves when it has received the first message and the beginning of the second, or nothing. What
/// was handed over, these two messages or nothing, stays leased; all else is back at the head, in order and uncounted.
async fn batch_is_left(backend: Backend, leaving: Leaving, reads: bool) {
    // One thread, so that it has seen whoever left before it answers who comes later.
    let server = backend.start(&["--threads", "1"]).await;
    let mut client = server.client().await;
    let queue = unique_queue("batch");
    let padding = "x".repeat(PADDING);
    let tasks = (0..MANY).map(|number| json(&format!("\"{number} {padding}\""))).collect();
    let inserted = client.insert(insert_request(&queue, tasks)).await.unwrap().into_inner();
    let ids = inserted.results.into_iter().map(|result| result.id).collect::<Vec<_>>();
    let handed_over = if reads { 2 * IN_A_MESSAGE } else { 0 };

    let connection = Connection::with_window(server.address(), if reads { 2 * MESSAGE } else { 0 }).await;
    let mut answering = connection.call(POP_BATCH, &[], &long_batch(&queue, MANY)).await;
    let mut received = Vec::new();
    if reads {
        received = answering.first_message::<PopBatchResponse>().await.tasks;
        is_each(&received, &ids[..IN_A_MESSAGE], (1, 0));
    }
    match leaving {
        Leaving::Cancels => {
            answering.cancel();
            // An answer without a body, for which there is room.
            let refused = connection.status("Ack", &[], &ack_request("", &[])).await;
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
        Leaving::Vanishes => {
            connection.vanish().await;
            drop(answering);
        }
    }
    for _ in 0..8 {
        pop(&mut server.client().await, &unique_queue("other")).await;
    }
    let back = async || (counts(&mut client, &queue).await.ready == count(MANY - handed_over)).then_some(());
    poll_until("the tasks to be back", PATIENCE, back).await;
    let rest = pop_batch(&mut client, long_batch(&queue, MANY)).await.unwrap();
    is_each(&rest, &ids[handed_over..], (1, 0));

    // Nothing is lost: what was received is held, and the rest of what was handed over runs out or is taken back.
    let held = received.iter().chain(&rest).map(|task| task.lease_token.clone()).collect::<Vec<_>>();
    let acked = client.ack(ack_request(&queue, &held)).await.unwrap().into_inner();
    assert_eq!(outcomes(&acked.outcomes), vec![Outcome::Applied; held.len()]);
    let all_held = held_for_request(&queue, proto(Duration::ZERO));
    let put_back = client.putback(all_held).await.unwrap().into_inner().put_back;
    assert_eq!(put_back, (MANY - held.len()) as u64);
    if put_back > 0 {
        let unread = pop_batch(&mut client, long_batch(&queue, MANY)).await.unwrap();
        is_each(&unread, &ids[received.len()..handed_over], (2, 1));
        let tokens = unread.into_iter().map(|task| task.lease_token).collect::<Vec<_>>();
        client.ack(ack_request(&queue, &tokens)).await.unwrap();
    }
    assert_eq!(pop(&mut client, &queue).await, None, "there were more");
    assert_eq!(five(&mut client, &queue).await, [0, 0, 0, count(MANY), count(MANY)]);
    if backend == Backend::Redis {
        assert_eq!((keys::fields(server.redis(), "tasks"), keys::fields(server.redis(), "leases")), (0, 0));
    }
}

fn count(tasks: usize) -> u64 {
    u64::try_from(tasks).unwrap()
}

/// These tasks, in this order, with these deliveries and expiries.
#[track_caller]
fn is_each(tasks: &[Task], ids: &[String], counted: (u32, u32)) {
    assert_eq!(tasks.len(), ids.len());
    for (position, (task, id)) in tasks.iter().zip(ids).enumerate() {
        assert_eq!((&task.id, (task.deliveries, task.expiries)), (id, counted), "at position {position}");
    }
}

on_every_store! {
    /// Row 38, G8, G11, G14: a PopBatch whose reader has room for no answer and leaves: everything is back.
    async fn row_38_batch_left_before_its_first_message(backend) {
        for leaving in [Leaving::Cancels, Leaving::Vanishes] {
            batch_is_left(backend, leaving, false).await;
        }
    }

    /// Row 38, G8, G11, G14: a PopBatch whose reader leaves in the middle of its second message.
    async fn row_38_batch_left_in_its_second_message(backend) {
        for leaving in [Leaving::Cancels, Leaving::Vanishes] {
            batch_is_left(backend, leaving, true).await;
        }
    }

    /// Row 38, G8: who stops waiting takes no task, and no delivery is counted.
    async fn row_38_cancelled_while_waiting(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let connection = Connection::open(server.address()).await;
        for round in 0..ROUNDS {
            let queue = unique_queue("cancel");
            let waiting = connection.send(POP, &[], &long_pop(&queue)).await;
            if round % 2 == 0 {
                // An answer on the same connection: the server has read the pop before, and the pop waits.
                connection.status("Pop", &[], &pop_request(&unique_queue("other"))).await;
            }
            waiting.cancel();
            // On the same connection: the server reads that the pop was cancelled before it reads the insert.
            let insert = insert_request(&queue, vec![json("\"a\""), json("\"b\"")]);
            assert_eq!(connection.status("Insert", &[], &insert).await.code(), Code::Ok);
            let mut texts = Vec::new();
            for _ in 0..2 {
                let task = pop_waiting(&mut client, &queue).await;
                assert_eq!((task.deliveries, task.expiries), (1, 0), "round {round}: {task:?}");
                texts.push(text(&task).to_owned());
                ack(&mut client, &queue, &task.lease_token).await;
            }
            texts.sort();
            assert_eq!(texts, ["\"a\"", "\"b\""], "round {round}");
        }
    }

    /// Row 38, G8: the whole connection vanishes while pops wait on it.
    async fn row_38_vanished_while_waiting(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("vanish");
        let leaving = Connection::open(server.address()).await;
        let mut waiting = Vec::new();
        for _ in 0..10 {
            waiting.push(leaving.send(POP, &[], &long_pop(&queue)).await);
        }
        leaving.status("Pop", &[], &pop_request(&unique_queue("other"))).await;
        leaving.vanish().await;
        // Each thread of the server has answered somebody who came later, so it has seen the end of that connection.
        for _ in 0..8 {
            pop(&mut server.client().await, &unique_queue("other")).await;
        }
        insert_json(&mut client, &queue, &["1", "2", "3"]).await;
        for _ in 0..3 {
            let task = pop_waiting(&mut client, &queue).await;
            assert_eq!((task.deliveries, task.expiries), (1, 0), "{task:?}");
            ack(&mut client, &queue, &task.lease_token).await;
        }
        assert_eq!(pop(&mut client, &queue).await, None);
    }

    /// Row 38, G8 and G11: leased for an answer that HTTP/2 had no room for, the task is back at the head, uncounted.
    async fn row_38_cancelled_before_the_answer_was_taken(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut at_head = 0;
        for round in 0..ROUNDS {
            let queue = unique_queue("window");
            let [a, _] = insert_json(&mut client, &queue, &["\"a\"", "\"b\""]).await.try_into().unwrap();
            let connection = Connection::without_window(server.address()).await;
            let request = PopRequest { wait: None, ..long_pop(&queue) };
            let answering = connection.call(POP, &[], &request).await;
            answering.cancel();

            let first = pop_for(&mut client, &queue, LEASE).await;
            assert_eq!((first.deliveries, first.expiries), (1, 0), "round {round}: {first:?}");
            at_head += usize::from(first.id == a);
            // If the task was not back yet, it comes now.
            let second = timeout(PATIENCE, client.pop(long_pop(&queue))).await.expect("the task in time");
            let second = second.unwrap().into_inner().task.expect("the task that was taken back");
            assert_eq!((second.deliveries, second.expiries), (1, 0), "round {round}: {second:?}");
            assert_ne!(first.id, second.id);
        }
        // Back at the tail it would never be first.
        assert!(at_head > 0, "in none of {ROUNDS} rounds was the task at the head");
    }

    /// Row 38, G8: the connection breaks instead.
    async fn row_38_vanished_before_the_answer_was_taken(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        for round in 0..ROUNDS {
            let queue = unique_queue("window");
            let [id] = insert_json(&mut client, &queue, &["1"]).await.try_into().unwrap();
            let connection = Connection::without_window(server.address()).await;
            let request = PopRequest { wait: None, ..long_pop(&queue) };
            let answering = connection.call(POP, &[], &request).await;
            connection.vanish().await;
            drop(answering);
            let task = pop_waiting(&mut client, &queue).await;
            assert_eq!((task.id, task.deliveries, task.expiries), (id, 1, 0), "round {round}");
        }
    }
}
