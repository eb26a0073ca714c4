//! Tasks that are given up.

use std::time::Duration;

use data_queue_proto::v1::{Outcome, PopRequest};

use super::{HOUR, take_back};
use crate::support::{
    PATIENCE,
    call::{
        ack, five, heartbeat, insert_json, pop, pop_batch, pop_batch_request, pop_for, pop_request, pop_waiting, proto,
        putback, text,
    },
    on_every_store, poll_until,
    server::Backend,
    unique_queue,
};
on_every_store! {
    /// A task is given up with the expiry that is one of as many as are allowed, and not before; by Putback, which says so.
    async fn a_task_is_given_up_by_putback(backend) {
        let server = backend.start(&["--max-expiries", "2"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("dead");
        insert_json(&mut client, &queue, &["1"]).await;
        let first = pop_for(&mut client, &queue, HOUR).await;
        assert_eq!(take_back(&mut client, &queue).await, (1, 0));
        // Its holder may give it back as often as it likes.
        for _ in 0..5 {
            let token = pop_for(&mut client, &queue, HOUR).await.lease_token;
            assert_eq!(putback(&mut client, &queue, &token).await, Outcome::Applied);
        }
        insert_json(&mut client, &queue, &["2"]).await;
        let request = PopRequest { lease: Some(proto(HOUR)), request_id: "r".to_owned(), ..pop_request(&queue) };
        let last = client.pop(request.clone()).await.unwrap().into_inner().task.expect("the task");
        assert_eq!((&last.id, last.deliveries, last.expiries), (&first.id, 7, 1));
        let other = pop_for(&mut client, &queue, HOUR).await;
        assert_eq!(take_back(&mut client, &queue).await, (1, 1), "one of the two was given up");
        assert_eq!(five(&mut client, &queue).await, [1, 0, 1, 2, 0]);

        for token in [&first.lease_token, &last.lease_token] {
            assert_eq!(heartbeat(&mut client, &queue, token).await, Outcome::LeaseLost);
            assert_eq!(putback(&mut client, &queue, token).await, Outcome::LeaseLost);
            assert_eq!(ack(&mut client, &queue, token).await, Outcome::LeaseLost);
        }
        // Nor does the pop that had it get it again.
        let retried = client.pop(request).await.unwrap().into_inner().task.expect("the other task");
        assert_eq!((&retried.id, retried.expiries), (&other.id, 1));
        assert_eq!(pop(&mut client, &queue).await, None, "a dead letter was delivered");
        assert_eq!(take_back(&mut client, &queue).await, (0, 1));
        assert_eq!(take_back(&mut client, &queue).await, (0, 0));
        assert_eq!(pop_batch(&mut client, pop_batch_request(&queue)).await.unwrap(), []);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 2, 2, 0]);
    }

    /// A task is given up when its lease runs out once too often, whoever takes it back; a pop that waits gets the next one.
    async fn a_task_is_given_up_when_leases_run_out(backend) {
        let server = backend.start(&["--max-expiries", "2"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("dead");
        let short = Duration::from_millis(100);
        insert_json(&mut client, &queue, &["\"dies\""]).await;
        let first = pop_for(&mut client, &queue, short).await;
        let request = PopRequest { lease: Some(proto(short)), wait: Some(proto(PATIENCE)), ..pop_request(&queue) };
        let second = client.pop(request).await.unwrap().into_inner().task.expect("the task again");
        assert_eq!((&second.id, second.deliveries, second.expiries), (&first.id, 2, 1));
        poll_until("the task to be given up", PATIENCE, async || {
            (five(&mut client, &queue).await == [0, 0, 1, 1, 0]).then_some(())
        })
        .await;
        let waiting = tokio::spawn({
            let (mut client, queue) = (client.clone(), queue.clone());
            async move { text(&pop_waiting(&mut client, &queue).await).to_owned() }
        });
        pop(&mut client, &unique_queue("sync")).await;
        insert_json(&mut client, &queue, &["\"lives\""]).await;
        assert_eq!(waiting.await.unwrap(), "\"lives\"");
        assert_eq!(ack(&mut client, &queue, &second.lease_token).await, Outcome::LeaseLost);
        assert_eq!(five(&mut client, &queue).await, [0, 1, 1, 2, 0]);
    }

    /// Unless told otherwise, a task is given up with its 20th expiry; it stays so when the server is started again.
    async fn a_task_is_given_up_after_twenty(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("dead");
        insert_json(&mut client, &queue, &["1"]).await;
        for expiries in 0..20 {
            let task = pop_for(&mut client, &queue, HOUR).await;
            assert_eq!((task.deliveries, task.expiries), (expiries + 1, expiries));
            let given_up = u64::from(expiries == 19);
            assert_eq!(take_back(&mut client, &queue).await, (1 - given_up, given_up), "{expiries}");
        }
        assert_eq!(pop(&mut client, &queue).await, None);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 1, 1, 0]);
        if backend != Backend::Memory {
            server.restart().await;
            let mut client = server.client().await;
            assert_eq!(pop(&mut client, &queue).await, None, "a restart brought it back");
            assert_eq!(five(&mut client, &queue).await, [0, 0, 1, 1, 0]);
        }
    }
}
