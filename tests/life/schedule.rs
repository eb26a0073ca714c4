//! When a task can be popped, until when, and what comes first.

use std::time::{Duration, SystemTime};

use data_queue_proto::v1::{NewTask, PutbackTokens, QueueSettings, TaskState};
use tokio::time::Instant;

use super::{in_state, insert, like, put_back, set, span, task_info};
use crate::support::{
    PATIENCE,
    call::{ack, counts, duration, json, pop, pop_for, pop_waiting, putback, text},
    on_every_store, poll_until, unique_queue,
};

/// Long enough to look at what is not due yet, short enough to wait for.
const SOON: Duration = Duration::from_millis(900);
const HOUR: Duration = Duration::from_secs(3_600);

on_every_store! {
    /// G10: a task is not delivered before it is due, and then without anything else happening in its queue; a waiting pop gets it.
    async fn a_delayed_task_comes_when_it_is_due(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("delay");
        let before = Instant::now();
        let results = insert(&mut client, &queue, vec![NewTask { delay: span(SOON), ..json("1") }]).await;
        let info = task_info(&mut client, &queue, &results[0].id).await;
        assert_eq!(info.state(), TaskState::Scheduled);
        let due: SystemTime = info.due_at.unwrap().try_into().unwrap();
        let inserted: SystemTime = info.task.unwrap().inserted_at.unwrap().try_into().unwrap();
        assert_eq!(due.duration_since(inserted).unwrap(), SOON);
        assert_eq!(counts(&mut client, &queue).await.scheduled, 1);
        let task = pop_waiting(&mut client, &queue).await;
        assert!(before.elapsed() >= SOON, "it came after {:?}", before.elapsed());
        assert_eq!((text(&task), task.deliveries), ("1", 1));
    }

    /// The same for a time, and for many: they come in the order in which they fall due.
    async fn what_falls_due_comes_in_that_order(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("due");
        let at = |millis: u64| Some((SystemTime::now() + Duration::from_millis(millis)).into());
        let tasks = vec![
            NewTask { deliver_at: at(700), ..json("2") },
            NewTask { deliver_at: at(350), ..json("1") },
            json("0"),
            NewTask { delay: span(Duration::from_millis(1_050)), ..json("3") },
        ];
        insert(&mut client, &queue, tasks).await;
        for expected in ["0", "1", "2", "3"] {
            let task = pop_waiting(&mut client, &queue).await;
            assert_eq!(text(&task), expected);
            ack(&mut client, &queue, &task.lease_token).await;
        }
    }

    /// A task whose time is over is never delivered, and counted as expired; one that is held may be finished.
    async fn a_task_expires(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("ttl");
        let short = NewTask { ttl: span(SOON), ..json("") };
        insert(&mut client, &queue, like(0..300, &short)).await;
        let finished = pop_for(&mut client, &queue, HOUR).await;
        let put_back_late = pop_for(&mut client, &queue, HOUR).await;
        insert(&mut client, &queue, vec![NewTask { ttl: span(SOON), delay: span(HOUR), ..json("300") }, json("301")]).await;
        let mut watcher = client.clone();
        poll_until("tasks to expire", PATIENCE, async || {
            (counts(&mut watcher, &queue).await.expired == 299).then_some(())
        })
        .await;
        assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), "301");
        assert_eq!(pop(&mut client, &queue).await, None);
        ack(&mut client, &queue, &finished.lease_token).await;
        let answer = put_back(&mut client, &queue, tokens(&put_back_late.lease_token)).await;
        assert_eq!((answer.put_back, answer.dead_lettered), (0, 0));
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.expired, counted.acked, counted.ready, counted.scheduled), (300, 1, 0, 0));
    }

    /// Strictly the highest priority first, whenever it came; in order within one, also for what was put back.
    async fn the_highest_priority_comes_first(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("priority");
        for priority in [0, 5, 9, 5] {
            let first = 10 * counts_or_zero(&mut client, &queue).await;
            insert(&mut client, &queue, like(first..first + 2, &NewTask { priority, ..json("") })).await;
        }
        let first = pop(&mut client, &queue).await.unwrap();
        let second = pop(&mut client, &queue).await.unwrap();
        assert_eq!([text(&first), text(&second)], ["40", "41"]);
        putback(&mut client, &queue, &second.lease_token).await;
        let order = ["41", "20", "21", "60", "61", "0", "1"];
        for expected in order {
            assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), expected);
        }
        assert_eq!(pop(&mut client, &queue).await, None);
    }

    /// A putback with a delay: the task waits, joins the tail when it is due, and its failures are what they were.
    async fn a_putback_may_wait(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("putback");
        insert(&mut client, &queue, like(0..2, &json(""))).await;
        let task = pop(&mut client, &queue).await.unwrap();
        let answer = put_back(&mut client, &queue, PutbackTokens { delay: span(SOON), ..tokens(&task.lease_token) }).await;
        assert_eq!(answer.put_back, 1);
        assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), "1");
        assert_eq!(in_state(&mut client, &queue, TaskState::Scheduled, 0).await.len(), 1);
        let again = pop_waiting(&mut client, &queue).await;
        assert_eq!((text(&again), again.deliveries, again.failures, again.expiries), ("0", 2, 0, 0));
    }

    /// A queue's own lease holds for pops and heartbeats that do not say, from the next call on.
    async fn a_queue_has_a_lease_of_its_own(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("lease");
        let settings = QueueSettings { lease: span(HOUR), ..QueueSettings::default() };
        set(&mut client, &queue, &["lease"], settings).await;
        insert(&mut client, &queue, vec![json("1")]).await;
        let task = pop(&mut client, &queue).await.unwrap();
        assert!(duration(task.lease) > HOUR / 2);
        let settings = QueueSettings { lease: span(2 * HOUR), ..QueueSettings::default() };
        set(&mut client, &queue, &["lease"], settings).await;
        let request = crate::support::call::heartbeat_request(&queue, &[task.lease_token]);
        let left = client.heartbeat(request).await.unwrap().into_inner().lease;
        assert!(duration(left) > HOUR);
    }
}

fn tokens(token: &str) -> PutbackTokens {
    PutbackTokens { lease_tokens: vec![token.to_owned()], ..PutbackTokens::default() }
}

async fn counts_or_zero(client: &mut crate::support::server::Client, queue: &str) -> usize {
    let answer = client.admin.get_queue(crate::support::call::get_queue_request(queue)).await;
    answer.map_or(0, |answer| answer.into_inner().queue.unwrap().counts.unwrap().inserted as usize)
}
