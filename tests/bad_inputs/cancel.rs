//! Clients that leave before their answer was handed over.

use std::time::Duration;

use data_queue_proto::v1::PopRequest;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{ack, insert_json, insert_request, json, pop, pop_for, pop_request, pop_waiting, proto, text},
    on_every_store,
    raw::Connection,
    unique_queue,
};

/// So long that a task which comes again within a test did not come because its lease ran out.
const LEASE: Duration = Duration::from_secs(12 * 3_600);
const ROUNDS: usize = 20;
const POP: &str = "/dataqueue.v1.DataQueue/Pop";

fn long_pop(queue: &str) -> PopRequest {
    PopRequest { lease: Some(proto(LEASE)), wait: Some(proto(Duration::from_secs(60))), ..pop_request(queue) }
}

on_every_store! {
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
