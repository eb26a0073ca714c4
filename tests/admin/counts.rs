//! Counts that add up, of one queue.

use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::{InsertRequest, NewTask, Outcome, PopBatchRequest, PopRequest, QueueCounts, Task};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Request};

use super::{HOUR, names, page, pages, take_back};
use crate::support::{
    PATIENCE,
    call::{
        Call, ack, add_up, counts, duration, five, get_queue_request, heartbeat, insert_json, insert_request, json,
        pop, pop_batch, pop_batch_request, pop_for, pop_request, proto, putback, unknown_token,
    },
    on_every_store, poll_until,
    redis::Options,
    server::{Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

/// A queue that nobody ever inserted into is none.
async fn unknown(client: &mut Client, queue: &str, case: &str) {
    let answer = client.admin.get_queue(get_queue_request(queue)).await;
    let status = Refusal::of(Code::NotFound, reason::QUEUE_NOT_FOUND).check(case, answer);
    assert_eq!(status.retry_delay(), None, "{case}: the queue does not come by itself");
    let (_, listed) = pages(client, 0).await;
    assert!(!names(&listed).contains(&queue), "{case}: {listed:?}");
}

/// What the store's clock said at a delivery.
fn delivered_at(task: &Task) -> i64 {
    millis(task.lease_expires_at) - i64::try_from(duration(task.lease).as_millis()).unwrap()
}

fn millis(time: Option<prost_types::Timestamp>) -> i64 {
    let time = time.expect("a time");
    time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000
}

fn age(counts: &QueueCounts) -> Option<i64> {
    counts.oldest_ready_age.map(|age| i64::try_from(duration(Some(age)).as_millis()).unwrap())
}
on_every_store! {
    /// G14: the counts through a life: ready, leased, dead, inserted, acked.
    async fn counts_through_a_life(backend) {
        let server = backend.start(&["--max-expiries", "3"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("life");
        let request = InsertRequest { request_id: "once".to_owned(), ..insert_request(&queue, vec![json("0"); 5]) };
        client.insert(request.clone()).await.unwrap();
        assert_eq!(five(&mut client, &queue).await, [5, 0, 0, 5, 0]);
        assert!(client.insert(request).await.unwrap().into_inner().replayed);
        client.insert(insert_request(&queue, vec![json("1"), json("no JSON"), NewTask::default()])).await.unwrap_err();
        assert_eq!(five(&mut client, &queue).await, [5, 0, 0, 5, 0], "counted what was not inserted");

        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(pop_for(&mut client, &queue, HOUR).await.lease_token);
        }
        assert_eq!(five(&mut client, &queue).await, [2, 3, 0, 5, 0]);
        assert_eq!(heartbeat(&mut client, &queue, &held[0]).await, Outcome::Applied);
        for outcome in [Outcome::Applied, Outcome::AlreadyAcked] {
            assert_eq!(ack(&mut client, &queue, &held[0]).await, outcome);
            assert_eq!(five(&mut client, &queue).await, [2, 2, 0, 5, 1]);
        }
        assert_eq!(ack(&mut client, &queue, &unknown_token()).await, Outcome::LeaseLost);
        for outcome in [Outcome::Applied, Outcome::LeaseLost] {
            assert_eq!(putback(&mut client, &queue, &held[1]).await, outcome);
            assert_eq!(five(&mut client, &queue).await, [3, 1, 0, 5, 1]);
        }
        assert_eq!(take_back(&mut client, &queue).await, (1, 0));
        assert_eq!(five(&mut client, &queue).await, [4, 0, 0, 5, 1]);

        // Whoever counts sees no lease that ran out.
        let short = pop_for(&mut client, &queue, Duration::from_millis(100)).await;
        let counted = poll_until("the lease to run out", PATIENCE, async || {
            let counted = five(&mut client, &queue).await;
            (counted[1] == 0).then_some(counted)
        });
        assert_eq!(counted.await, [4, 0, 0, 5, 1]);
        assert_eq!(ack(&mut client, &queue, &short.lease_token).await, Outcome::LeaseLost);

        for round in 0..3 {
            let request = PopBatchRequest { lease: Some(proto(HOUR)), ..pop_batch_request(&queue) };
            let tasks = pop_batch(&mut client, request).await.unwrap();
            assert_eq!(five(&mut client, &queue).await[1], u64::try_from(tasks.len()).unwrap(), "round {round}");
            take_back(&mut client, &queue).await;
            let _ = five(&mut client, &queue).await;
        }
        assert_eq!(five(&mut client, &queue).await, [0, 0, 4, 5, 1]);
        insert_json(&mut client, &queue, &["6"]).await;
        let last = pop(&mut client, &queue).await.expect("the new task").lease_token;
        let done = PopRequest { ack_lease_tokens: vec![last], ..pop_request(&queue) };
        assert_eq!(client.pop(done).await.unwrap().into_inner().task, None);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 4, 6, 2]);
    }

    /// G14: at any moment, whatever is done meanwhile, the counts add up, and what only grows does not shrink; with the list
    /// as with the queue alone.
    async fn counts_add_up_at_any_moment(backend) {
        const WORKERS: u64 = 4;
        const ROUNDS: u64 = 40;
        let server = backend.start(&["--max-expiries", "2"]).await;
        let queue = unique_queue("moments");
        let mut client = server.client().await;
        insert_json(&mut client, &queue, &["0"]).await;
        let mut workers = JoinSet::new();
        for worker in 0..WORKERS {
            let (mut client, queue) = (server.client().await, queue.clone());
            workers.spawn(async move {
                let mut acked = 0;
                for round in 0..ROUNDS {
                    insert_json(&mut client, &queue, &["1", "2", "3"]).await;
                    let request = PopBatchRequest { max_tasks: 3, ..pop_batch_request(&queue) };
                    let tasks = pop_batch(&mut client, request).await.unwrap();
                    for (position, task) in tasks.iter().enumerate() {
                        match position {
                            0 => acked += u64::from(ack(&mut client, &queue, &task.lease_token).await == Outcome::Applied),
                            1 => drop(putback(&mut client, &queue, &task.lease_token).await),
                            _ => {}
                        }
                    }
                    if round % 5 == worker {
                        take_back(&mut client, &queue).await;
                    }
                }
                acked
            });
        }
        let mut before = QueueCounts::default();
        let mut acked = 0;
        while !workers.is_empty() {
            let alone = counts(&mut client, &queue).await;
            let (listed, _) = page(&mut client, 0, "").await;
            let listed = listed[0].counts.expect("counts");
            add_up(&listed);
            for now in [alone, listed] {
                let grown = now.inserted >= before.inserted && now.acked >= before.acked && now.dead >= before.dead;
                assert!(grown, "{now:?} after {before:?}");
                before = now;
            }
            while let Some(worker) = workers.try_join_next() {
                acked += worker.unwrap();
            }
        }
        take_back(&mut client, &queue).await;
        let all = counts(&mut client, &queue).await;
        assert_eq!((all.leased, all.inserted, all.acked), (0, 1 + 3 * WORKERS * ROUNDS, acked));
    }

    /// How long the task at the head has been in the queue, from its insert on, however often it was held; unset if none is
    /// ready.
    async fn oldest_ready_age(backend) {
        let server = backend.start(&["--max-expiries", "1"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("age");
        insert_json(&mut client, &queue, &["1"]).await;
        let first = age(&counts(&mut client, &queue).await).expect("an age");
        let grown = poll_until("the task to be older", PATIENCE, async || {
            age(&counts(&mut client, &queue).await).filter(|age| *age >= first + 20)
        });
        let grown = grown.await;
        insert_json(&mut client, &queue, &["2"]).await;
        assert!(age(&counts(&mut client, &queue).await).expect("an age") >= grown, "not that of the head");

        // Of the second, once the first is held. When the count was taken, by the store's clock, is between two deliveries.
        let first = pop_for(&mut client, &queue, HOUR).await;
        let second_age = age(&counts(&mut client, &queue).await).expect("an age");
        let second = pop_for(&mut client, &queue, HOUR).await;
        let counted_at = millis(second.inserted_at) + second_age;
        assert!((delivered_at(&first)..=delivered_at(&second)).contains(&counted_at), "{first:?} {second_age} {second:?}");
        assert_eq!(age(&counts(&mut client, &queue).await), None);

        assert_eq!(putback(&mut client, &queue, &first.lease_token).await, Outcome::Applied);
        let back = age(&counts(&mut client, &queue).await).expect("an age");
        assert!(millis(first.inserted_at) + back >= delivered_at(&second), "counted from the putback on");
        let again = pop_for(&mut client, &queue, HOUR).await;
        assert_eq!(ack(&mut client, &queue, &again.lease_token).await, Outcome::Applied);
        // A dead letter is not ready.
        assert_eq!(take_back(&mut client, &queue).await, (0, 1));
        let counted = counts(&mut client, &queue).await;
        assert_eq!((age(&counted), counted.dead), (None, 1));
    }

    /// A queue that was asked for, popped, acked in, is none until something is inserted.
    async fn a_look_makes_no_queue(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("unknown");
        unknown(&mut client, &queue, "GetQueue").await;
        assert_eq!(pop(&mut client, &queue).await, None);
        unknown(&mut client, &queue, "Pop").await;
        let wait = Some(proto(Duration::from_millis(1)));
        let request = PopRequest { wait, request_id: "r".to_owned(), ..pop_request(&queue) };
        assert_eq!(client.pop(request).await.unwrap().into_inner().task, None);
        unknown(&mut client, &queue, "a Pop that waits, with a request id").await;
        for call in Call::every_with_tokens(&queue, &[unknown_token()]) {
            let case = format!("{call:?}");
            call.send(&mut client).await.unwrap();
            unknown(&mut client, &queue, &case).await;
        }
        assert_eq!(take_back(&mut client, &queue).await, (0, 0));
        unknown(&mut client, &queue, "Putback").await;
        assert_eq!(pop_batch(&mut client, pop_batch_request(&queue)).await.unwrap(), []);
        unknown(&mut client, &queue, "PopBatch").await;
        client.insert(insert_request(&queue, vec![json("no JSON")])).await.unwrap_err();
        unknown(&mut client, &queue, "an Insert that was refused").await;

        insert_json(&mut client, &queue, &["1"]).await;
        assert_eq!(five(&mut client, &queue).await, [1, 0, 0, 1, 0]);
        let token = pop(&mut client, &queue).await.unwrap().lease_token;
        ack(&mut client, &queue, &token).await;
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, 1, 1], "an empty queue is a queue");
        assert_eq!(names(&pages(&mut client, 0).await.1), [&queue]);
    }

    /// G12: what is given up in one queue leaves others as they are, and their counts too.
    async fn counts_are_of_one_queue(backend) {
        let server = backend.start(&["--max-expiries", "1"]).await;
        let mut client = server.client().await;
        let queues = ["q", "q:", "q::", "q::a", "Q"];
        for queue in queues {
            insert_json(&mut client, queue, &["1", "2"]).await;
            pop_for(&mut client, queue, HOUR).await;
        }
        assert_eq!(take_back(&mut client, "q::").await, (0, 1));
        for queue in queues {
            let expected = if queue == "q::" { [1, 0, 1, 2, 0] } else { [1, 1, 0, 2, 0] };
            assert_eq!(five(&mut client, queue).await, expected, "{queue}");
        }
    }
}

wire_tests! {
    /// A count that waits for a Redis that hangs ends with the caller's deadline.
    async fn deadline_of_a_count_while_redis_hangs() {
        let server = Server::on_redis_with(Options::default(), &["--store-timeout", "60s"]);
        server.ready().await;
        let mut client = server.client().await;
        insert_json(&mut client, "q", &["1"]).await;
        server.redis().stop();
        let began = Instant::now();
        let mut request = Request::new(get_queue_request("q"));
        request.set_timeout(Duration::from_millis(500));
        let status = client.admin.get_queue(request).await.unwrap_err();
        assert_eq!((status.code(), status.reason()), (Code::DeadlineExceeded, None), "{status:?}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        server.redis().cont();
        let counted = poll_until("the server to count again", PATIENCE, async || {
            let answer = client.admin.get_queue(get_queue_request("q")).await.ok()?;
            answer.into_inner().queue?.counts
        })
        .await;
        assert_eq!(counted.ready, 1);
    }
}
