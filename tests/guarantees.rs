//! The guarantees of the contract in plain use, over the wire, on every store.

use std::{collections::BTreeSet, time::Duration};

use data_queue_proto::v1::{HeartbeatRequest, Outcome, PopBatchRequest, PopRequest, Task};
use prost_types::Timestamp;
use tokio::task::JoinSet;

use crate::support::{
    PATIENCE,
    call::{
        ack, ack_request, duration, heartbeat, heartbeat_request, held_for_request, insert_json, insert_request, json,
        outcomes, pop, pop_batch, pop_batch_request, pop_for, pop_request, pop_waiting, proto, putback, putback_answer,
        text,
    },
    on_every_store, poll_until, rounds, unique_queue,
};

/// Milliseconds since the epoch, by the store's clock.
fn millis(time: Option<Timestamp>) -> i64 {
    let time = time.expect("a time");
    time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000
}

fn texts(tasks: &[Task]) -> Vec<&str> {
    tasks.iter().map(text).collect()
}

on_every_store! {
    /// G4: callers that pop at once get different tasks under different tokens, each task once.
    async fn one_holder(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("holders");
        let values = (0..500).map(|value| json(&value.to_string())).collect();
        client.insert(insert_request(&queue, values)).await.unwrap();
        let mut workers = JoinSet::new();
        for _ in 0..8 {
            let (mut client, queue) = (server.client().await, queue.clone());
            workers.spawn(async move {
                let mut held = Vec::new();
                while let Some(task) = pop(&mut client, &queue).await {
                    held.push(task);
                }
                held
            });
        }
        let held = workers.join_all().await.concat();
        assert_eq!(held.len(), 500);
        let ids = held.iter().map(|task| &task.id).collect::<BTreeSet<_>>();
        let tokens = held.iter().map(|task| &task.lease_token).collect::<BTreeSet<_>>();
        let values = held.iter().map(text).collect::<BTreeSet<_>>();
        assert_eq!((ids.len(), tokens.len(), values.len()), (500, 500, 500));
        assert!(ids.iter().all(|id| id.len() == 36));
        assert!(tokens.iter().all(|token| token.len() == 32 && token.bytes().all(|byte| b"0123456789abcdef".contains(&byte))));
    }

    /// G6, G8, G15: no reclaim before the announced deadline, and then soon; the expiry is counted.
    async fn lease_runs_out(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let lease = Duration::from_millis(700);
        let mut late = Vec::new();
        for _ in 0..rounds(5, 50) {
            let queue = unique_queue("deadline");
            insert_json(&mut client, &queue, &["1"]).await;
            let first = pop_for(&mut client, &queue, lease).await;
            let request = PopRequest { lease: Some(proto(lease)), wait: Some(proto(PATIENCE)), ..pop_request(&queue) };
            let second = client.pop(request).await.unwrap().into_inner().task.expect("the task again");
            assert_eq!((&second.id, second.deliveries, second.expiries), (&first.id, 2, 1));
            // When it was delivered again is told by its own deadline: one clock, the store's.
            let again = millis(second.lease_expires_at) - i64::try_from(lease.as_millis()).unwrap();
            let deadline = millis(first.lease_expires_at);
            assert!(again >= deadline, "{} ms before the deadline", deadline - again);
            late.push(again - deadline);
        }
        late.sort_unstable();
        assert!(late[late.len() / 2] <= 1_000, "ms after the deadline: {late:?}");
    }

    /// G6: a heartbeat moves the deadline, and the task stays where it is until then.
    async fn heartbeat_holds(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("heartbeat");
        insert_json(&mut client, &queue, &["1"]).await;
        let first = pop_for(&mut client, &queue, Duration::from_secs(2)).await;
        let lease = Some(proto(Duration::from_secs(4)));
        let request = HeartbeatRequest { lease, ..heartbeat_request(&queue, std::slice::from_ref(&first.lease_token)) };
        let answer = client.heartbeat(request).await.unwrap().into_inner();
        assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied]);
        assert!(millis(answer.lease_expires_at) > millis(first.lease_expires_at));
        assert!(duration(answer.lease) > Duration::from_secs(2));
        let lease = Duration::from_secs(600);
        let request = PopRequest { lease: Some(proto(lease)), wait: Some(proto(PATIENCE)), ..pop_request(&queue) };
        let second = client.pop(request).await.unwrap().into_inner().task.expect("the task again");
        let again = millis(second.lease_expires_at) - i64::try_from(lease.as_millis()).unwrap();
        assert!(again >= millis(answer.lease_expires_at), "taken back before the moved deadline");
    }

    /// G8: putbacks keep the counters, which tell deliveries and expiries apart.
    async fn counters_tell_the_truth(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("counters");
        insert_json(&mut client, &queue, &["1"]).await;
        for (deliveries, expiries, held_for) in [(1, 0, false), (2, 0, true), (3, 1, false), (4, 1, true), (5, 2, true)] {
            let task = pop(&mut client, &queue).await.expect("the task");
            assert_eq!((task.deliveries, task.expiries), (deliveries, expiries));
            if held_for {
                let answer = client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap();
                assert_eq!(answer.into_inner().put_back, 1);
            } else {
                assert_eq!(putback(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
            }
        }
    }

    /// G11: first in, first out; what is put back returns to the head, together in the order of its delivery.
    async fn order(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("order");
        insert_json(&mut client, &queue, &["0", "1", "2"]).await;
        insert_json(&mut client, &queue, &["3", "4"]).await;
        insert_json(&mut client, &queue, &["5"]).await;
        let first = pop_batch(&mut client, PopBatchRequest { max_tasks: 4, ..pop_batch_request(&queue) }).await.unwrap();
        assert_eq!(texts(&first), ["0", "1", "2", "3"]);
        // In another order than that of the deliveries.
        let tokens = [2, 0, 1].map(|task: usize| first[task].lease_token.clone());
        let answer = putback_answer(&mut client, &queue, &tokens).await;
        assert_eq!((outcomes(&answer.outcomes), answer.put_back), (vec![Outcome::Applied; 3], 3));
        let second = pop_batch(&mut client, pop_batch_request(&queue)).await.unwrap();
        assert_eq!(texts(&second), ["0", "1", "2", "4", "5"]);

        // 3 has been held for the longest: it comes first.
        let answer = client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap().into_inner();
        assert_eq!((answer.put_back, answer.outcomes), (6, vec![]));
        let third = pop_batch(&mut client, pop_batch_request(&queue)).await.unwrap();
        assert_eq!(texts(&third), ["3", "0", "1", "2", "4", "5"]);
        let tokens = third.into_iter().map(|task| task.lease_token).collect::<Vec<_>>();
        let answer = client.ack(ack_request(&queue, &tokens)).await.unwrap().into_inner();
        assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied; 6]);
        assert_eq!(pop(&mut client, &queue).await, None);
    }

    /// Putback by held_for takes what was not renewed for that long, and nothing else.
    async fn held_for_spares_the_renewed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("held");
        insert_json(&mut client, &queue, &["\"silent\"", "\"renewed\""]).await;
        let hour = Duration::from_secs(3_600);
        let silent = pop_for(&mut client, &queue, hour).await;
        let renewed = pop_for(&mut client, &queue, hour).await;
        let age = proto(Duration::from_secs(3));
        let mut other = client.clone();
        poll_until("the silent holder to be too old", PATIENCE, async || {
            assert_eq!(crate::support::call::heartbeat(&mut other, &queue, &renewed.lease_token).await, Outcome::Applied);
            let answer = other.putback(held_for_request(&queue, age)).await.unwrap().into_inner();
            (answer.put_back > 0).then(|| assert_eq!(answer.put_back, 1))
        })
        .await;
        let task = pop(&mut client, &queue).await.expect("what the silent holder had");
        assert_eq!((&task.id, task.expiries), (&silent.id, 1));
        assert_eq!(ack(&mut client, &queue, &silent.lease_token).await, Outcome::LeaseLost);
        assert_eq!(ack(&mut client, &queue, &renewed.lease_token).await, Outcome::Applied);
    }

    /// G15: a waiting pop gets the task that comes; of many that wait, each gets one.
    async fn waiting_pops_are_woken(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("waiting");
        let mut waiting = JoinSet::new();
        for _ in 0..10 {
            let (mut client, queue) = (client.clone(), queue.clone());
            waiting.spawn(async move { text(&pop_waiting(&mut client, &queue).await).to_owned() });
        }
        pop(&mut client, &unique_queue("sync")).await;
        insert_json(&mut client, &queue, &["0", "1", "2", "3", "4"]).await;
        for value in 5..10 {
            insert_json(&mut client, &queue, &[&value.to_string()]).await;
        }
        let mut got = waiting.join_all().await;
        got.sort();
        assert_eq!(got, (0..10).map(|value| value.to_string()).collect::<Vec<_>>());
    }

    /// G15: a waiting pop gets what is put back.
    async fn putback_wakes(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("waiting");
        insert_json(&mut client, &queue, &["1"]).await;
        let held = pop(&mut client, &queue).await.unwrap();
        let waiting = {
            let (mut client, queue) = (client.clone(), queue.clone());
            tokio::spawn(async move { pop_waiting(&mut client, &queue).await })
        };
        pop(&mut client, &unique_queue("sync")).await;
        assert_eq!(putback(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        assert_eq!(waiting.await.unwrap().deliveries, 2);
    }

    /// PopBatch streams as many as it was asked for, in order, those that come while it waits too.
    async fn pop_batch_streams(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("batch");
        for part in 0..5 {
            let values = (0..1_000).map(|value| json(&(part * 1_000 + value).to_string())).collect();
            client.insert(insert_request(&queue, values)).await.unwrap();
        }
        let request = PopBatchRequest { max_tasks: 4_999, ..pop_batch_request(&queue) };
        let tasks = pop_batch(&mut client, request).await.unwrap();
        let expected = (0..4_999).map(|value: u32| value.to_string()).collect::<Vec<_>>();
        assert_eq!(texts(&tasks), expected);

        let wait = Some(proto(PATIENCE));
        let request = PopBatchRequest { max_tasks: 3, wait, ..pop_batch_request(&queue) };
        let mut stream = client.pop_batch(request).await.unwrap().into_inner();
        let first = stream.message().await.unwrap().expect("what is there");
        assert_eq!(texts(&first.tasks), ["4999"]);
        insert_json(&mut client, &queue, &["5000"]).await;
        let second = stream.message().await.unwrap().expect("what came");
        assert_eq!(texts(&second.tasks), ["5000"]);
        insert_json(&mut client, &queue, &["5001", "5002"]).await;
        let third = stream.message().await.unwrap().expect("what came");
        assert_eq!(texts(&third.tasks), ["5001"]);
        assert_eq!(stream.message().await.unwrap(), None);
        assert_eq!(pop(&mut client, &queue).await.as_ref().map(text), Some("5002"));
    }

    /// Fused acks: done with these, next please, in one round trip.
    async fn pop_acks_and_pops(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("fused");
        insert_json(&mut client, &queue, &["1", "2"]).await;
        let first = pop(&mut client, &queue).await.unwrap();
        let request = PopRequest { ack_lease_tokens: vec![first.lease_token.clone()], ..pop_request(&queue) };
        let answer = client.pop(request).await.unwrap().into_inner();
        assert_eq!(outcomes(&answer.ack_outcomes), [Outcome::Applied]);
        assert_eq!(text(&answer.task.expect("the next task")), "2");
        assert_eq!(ack(&mut client, &queue, &first.lease_token).await, Outcome::AlreadyAcked);
    }

    /// A thousand equal values are a thousand tasks, each popped and acked for itself.
    async fn equal_values_are_separate_tasks(backend) {
        const TASKS: usize = 1_000;
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("equal");
        let ids = insert_json(&mut client, &queue, &["1"; TASKS]).await;
        let mut held = Vec::new();
        for id in &ids {
            let task = pop(&mut client, &queue).await.expect("a task for each value");
            assert_eq!((&task.id, text(&task)), (id, "1"));
            held.push(task.lease_token);
        }
        assert_eq!(pop(&mut client, &queue).await, None);
        // Half of them one by one; the others are still held then, each for itself.
        let (some, others) = held.split_at(TASKS / 2);
        for token in some {
            assert_eq!(ack(&mut client, &queue, token).await, Outcome::Applied);
        }
        let answer = client.ack(ack_request(&queue, others)).await.unwrap().into_inner();
        assert!(outcomes(&answer.outcomes).iter().all(|outcome| *outcome == Outcome::Applied));
        client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap();
        assert_eq!(pop(&mut client, &queue).await, None);
    }

    /// G5: who lost a lease can do nothing to who holds the task now, by any call.
    async fn a_late_worker_is_fenced_off(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("late");
        insert_json(&mut client, &queue, &["1"]).await;
        let late = pop_for(&mut client, &queue, Duration::from_millis(100)).await;
        let holder = pop_waiting(&mut client, &queue).await;
        assert_eq!((&holder.id, holder.deliveries, holder.expiries), (&late.id, 2, 1));
        for _ in 0..2 {
            assert_eq!(ack(&mut client, &queue, &late.lease_token).await, Outcome::LeaseLost);
            assert_eq!(heartbeat(&mut client, &queue, &late.lease_token).await, Outcome::LeaseLost);
            assert_eq!(putback(&mut client, &queue, &late.lease_token).await, Outcome::LeaseLost);
        }
        assert_eq!(pop(&mut client, &queue).await, None, "the late worker gave it back");
        assert_eq!(heartbeat(&mut client, &queue, &holder.lease_token).await, Outcome::Applied);
        assert_eq!(ack(&mut client, &queue, &holder.lease_token).await, Outcome::Applied);
    }

    /// G12: two equal values are two tasks, and what is done to one queue changes no other.
    async fn equal_values_are_two_tasks(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let (queue, other) = (unique_queue("equal"), unique_queue("equal"));
        insert_json(&mut client, &queue, &["1", "1"]).await;
        insert_json(&mut client, &other, &["1"]).await;
        let first = pop(&mut client, &queue).await.unwrap();
        let second = pop(&mut client, &queue).await.unwrap();
        assert_eq!(first.md5, second.md5);
        assert_ne!(first.id, second.id);
        assert_eq!(ack(&mut client, &queue, &first.lease_token).await, Outcome::Applied);
        client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap();
        assert_eq!(pop(&mut client, &queue).await.map(|task| task.id), Some(second.id));
        assert_eq!(pop(&mut client, &other).await.map(|task| task.deliveries), Some(1));
    }
}
