//! Administration: counts that add up, lists of queues, facts about the server, and tasks that are given up.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use data_queue_proto::reason;
use data_queue_proto::v1::{
    GetServerInfoRequest, GetServerInfoResponse, InsertRequest, ListQueuesRequest, NewTask, Outcome, PopBatchRequest,
    PopRequest, PutbackResponse, Queue, QueueCounts, ServerLimits, Survival, Task,
};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    PATIENCE,
    call::{
        Call, ack, add_up, counts, duration, five, get_queue_request, heartbeat, held_for_request, insert_json,
        insert_request, json, pop, pop_batch, pop_batch_request, pop_for, pop_request, pop_waiting, proto, putback,
        text, unknown_token,
    },
    on_every_store, poll_until,
    raw::{Connection, grpc_timeout},
    redis::{Options, Persistence, Redis},
    server::{Backend, Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

const SERVICE: &str = "dataqueue.v1.QueueAdmin";
const HOUR: Duration = Duration::from_secs(3_600);

/// Takes back everything that is held.
async fn take_back(client: &mut Client, queue: &str) -> (u64, u64) {
    let answer = client.putback(held_for_request(queue, proto(Duration::ZERO))).await.expect("a putback").into_inner();
    let PutbackResponse { outcomes, put_back, dead_lettered } = answer;
    assert!(outcomes.is_empty(), "{outcomes:?}");
    (put_back, dead_lettered)
}

async fn page(client: &mut Client, page_size: i32, page_token: &str) -> (Vec<Queue>, String) {
    let request = ListQueuesRequest { page_size, page_token: page_token.to_owned() };
    let answer = client.admin.list_queues(request).await.expect("a page").into_inner();
    (answer.queues, answer.next_page_token)
}

/// The lengths of all pages, and what was on them.
async fn pages(client: &mut Client, page_size: i32) -> (Vec<usize>, Vec<Queue>) {
    let (mut lengths, mut all, mut token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let (queues, next) = page(client, page_size, &token).await;
        lengths.push(queues.len());
        all.extend(queues);
        if next.is_empty() {
            return (lengths, all);
        }
        assert_ne!(next, token, "the list does not go on");
        token = next;
    }
}

fn names(queues: &[Queue]) -> Vec<&str> {
    queues.iter().map(|queue| queue.name.as_str()).collect()
}

/// A queue that nobody ever inserted into is none.
async fn unknown(client: &mut Client, queue: &str, case: &str) {
    let answer = client.admin.get_queue(get_queue_request(queue)).await;
    let status = Refusal::of(Code::NotFound, reason::QUEUE_NOT_FOUND).check(case, answer);
    assert_eq!(status.retry_delay(), None, "{case}: the queue does not come by itself");
    let (_, listed) = pages(client, 0).await;
    assert!(!names(&listed).contains(&queue), "{case}: {listed:?}");
}

async fn info(client: &mut Client) -> GetServerInfoResponse {
    client.admin.get_server_info(GetServerInfoRequest {}).await.expect("facts about the server").into_inner()
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

    /// Queues come in the order of their names' bytes, on pages of any size, each once, with its counts.
    async fn queues_are_listed_by_name(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        assert_eq!(pages(&mut client, 0).await, (vec![0], vec![]));
        let longest = "z".repeat(128);
        let inserted = ["a::c", "Z", "a", "a.b", "0", &longest, "a/../b", "a:b", "A", "a::b", "a-b", "za", "a_b", "9"];
        let mut expected = BTreeMap::new();
        for (number, name) in inserted.into_iter().enumerate() {
            client.insert(insert_request(name, vec![json("1"); number + 1])).await.unwrap();
            expected.insert(name, u64::try_from(number).unwrap() + 1);
        }
        let held = pop_for(&mut client, "Z", HOUR).await;
        for page_size in [0, 1, 2, 3, 5, 7, 13, 14, 15, 100, 1_000, 1_001, i32::MAX] {
            let (lengths, queues) = pages(&mut client, page_size).await;
            assert_eq!(names(&queues), expected.keys().copied().collect::<Vec<_>>(), "pages of {page_size}");
            let size = usize::try_from(page_size).unwrap();
            assert!(size == 0 || lengths.iter().all(|length| *length <= size), "pages of {page_size}: {lengths:?}");
            for queue in &queues {
                let QueueCounts { ready, leased, inserted, .. } = queue.counts.expect("counts");
                let leased_now = u64::from(queue.name == held.queue);
                let all = expected[queue.name.as_str()];
                assert_eq!((ready, leased, inserted), (all - leased_now, leased_now, all), "{queue:?}");
            }
        }
    }

    /// Of more queues than any page takes, each comes once; those made meanwhile come if they are still ahead.
    async fn every_queue_is_listed_once(backend) {
        const QUEUES: usize = 1_010;
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut inserts = JoinSet::new();
        for worker in 0..10 {
            let mut client = client.clone();
            inserts.spawn(async move {
                for number in (worker..QUEUES).step_by(10) {
                    insert_json(&mut client, &format!("many-{number:04}"), &["1"]).await;
                }
            });
        }
        inserts.join_all().await;
        let expected = (0..QUEUES).map(|number| format!("many-{number:04}")).collect::<Vec<_>>();
        for (page_size, first) in [(0, 100), (33, 33), (333, 333), (1_000, 1_000), (5_000, 1_000), (i32::MAX, 1_000)] {
            let (lengths, queues) = pages(&mut client, page_size).await;
            assert_eq!(names(&queues), expected, "pages of {page_size}");
            assert_eq!(lengths[0], first, "pages of {page_size}: {lengths:?}");
        }

        let (begun, next) = page(&mut client, 10, "").await;
        assert_eq!(names(&begun), &expected[..10]);
        for queue in ["many-0005.behind", "many-0010.ahead"] {
            insert_json(&mut client, queue, &["1"]).await;
        }
        let (went_on, _) = page(&mut client, 2, &next).await;
        assert_eq!(names(&went_on), ["many-0010", "many-0010.ahead"]);
        let (_, last) = page(&mut client, 1_000, "").await;
        let (rest, end) = page(&mut client, 1_000, &last).await;
        assert_eq!((rest.len(), end.as_str()), (12, ""));
    }

    /// What the server is and what it is set to; what OK survives is the least that the store keeps.
    async fn facts_about_the_server(backend) {
        let flags = [
            "--max-value", "54321", "--max-message", "765432", "--default-lease", "41s", "--max-expiries", "7",
            "--memory-window", "90s", "--memory-entries", "1234",
        ];
        let server = backend.start(&flags).await;
        let facts = info(&mut server.client().await).await;
        let limits = ServerLimits {
            max_value_bytes: 54_321,
            max_message_bytes: 765_432,
            max_batch: 1_000,
            max_pop_batch: 10_000,
            default_lease: Some(proto(Duration::from_secs(41))),
            min_lease: Some(proto(Duration::from_millis(100))),
            max_lease: Some(proto(12 * HOUR)),
            max_wait: Some(proto(Duration::from_secs(60))),
            max_expiries: 7,
            memory_window: Some(proto(Duration::from_secs(90))),
            memory_entries: 1_234,
        };
        assert_eq!(facts.limits, Some(limits));
        assert_eq!(facts.version, "0.1.0");
        let (store, survives) = match backend {
            Backend::Memory => ("memory".to_owned(), Survival::Nothing),
            Backend::Redis => {
                (format!("Redis {}", server.redis().info("redis_version").unwrap()), Survival::ServerKill)
            }
            Backend::Sqlite => ("SQLite 3.".to_owned(), Survival::PowerCut),
        };
        assert_eq!(facts.survives, survives as i32);
        assert!(facts.store.starts_with(&store), "{}", facts.store);
        assert!(!facts.survives_note.is_empty());
    }

    /// The defaults, as README and the proto tell them.
    async fn default_limits(backend) {
        let server = backend.start(&[]).await;
        let limits = info(&mut server.client().await).await.limits.unwrap();
        assert_eq!((limits.max_value_bytes, limits.max_message_bytes), (1 << 20, 4 << 20));
        assert_eq!((limits.max_expiries, limits.memory_entries), (20, 1_000_000));
        let times = [limits.default_lease, limits.memory_window].map(duration);
        assert_eq!(times, [Duration::from_secs(30), Duration::from_secs(300)]);
    }

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

    /// Row 37 for administration: a deadline that has passed, and one that cannot be read.
    async fn deadlines_of_admin_calls(backend) {
        let server = backend.start(&[]).await;
        let connection = Connection::open(server.address()).await;
        let soon = grpc_timeout(Duration::from_nanos(1));
        let queue = get_queue_request("any");
        for method in ["GetQueue", "ListQueues", "GetServerInfo"] {
            let path = format!("/{SERVICE}/{method}");
            let call = async |timeout: &str| connection.call(&path, &[("grpc-timeout", timeout)], &queue).await.status().await;
            let passed = call(&soon).await;
            assert_eq!((passed.code(), passed.reason()), (Code::DeadlineExceeded, None), "{method}: {passed:?}");
            let refusal = Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID);
            refusal.check(method, Err::<(), _>(call("abc").await));
        }
    }

    /// G16: when the server stops, calls of operators are refused as others are, and one that is under way is answered.
    async fn admin_calls_of_a_server_that_stops(backend) {
        let server = backend.start(&["--grace", "60s"]).await;
        let mut client = server.client().await;
        assert_eq!(server.health(SERVICE).await, ServingStatus::Serving);
        let queue = unique_queue("stopping");
        insert_json(&mut client, &queue, &["1"]).await;
        let connection = Connection::without_window(server.address()).await;
        let under_way = connection.call(&format!("/{SERVICE}/GetServerInfo"), &[], &GetServerInfoRequest {}).await;
        server.terminate();
        poll_until("the server to stop", PATIENCE, async || {
            (server.health(SERVICE).await == ServingStatus::NotServing).then_some(())
        })
        .await;
        let refusal = Refusal::of(Code::Unavailable, reason::SHUTTING_DOWN);
        for mut client in [client, server.client().await] {
            let admin = &mut client.admin;
            let answers = [
                ("GetQueue", admin.get_queue(get_queue_request(&queue)).await.map(drop)),
                ("ListQueues", admin.list_queues(ListQueuesRequest::default()).await.map(drop)),
                ("GetServerInfo", admin.get_server_info(GetServerInfoRequest {}).await.map(drop)),
            ];
            for (method, answer) in answers {
                let status = refusal.check(method, answer);
                assert!(status.retry_delay().is_some(), "{method}: no RetryInfo in {status:?}");
            }
        }
        under_way.cancel();
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    }
}

wire_tests! {
    /// What OK survives in a file is what was asked for.
    async fn what_survives_in_a_file() {
        for (durability, survives) in [
            ("full", Survival::PowerCut), ("normal", Survival::ServerKill), ("memory", Survival::ServerKill),
        ] {
            let server = Server::on_sqlite_with(&["--durability", durability]);
            let facts = info(&mut server.client().await).await;
            assert_eq!(facts.survives, survives as i32, "{durability}");
            assert!(facts.survives_note.contains(&format!("--durability {durability}")), "{}", facts.survives_note);
        }
    }

    /// What OK survives on Redis is what its settings say.
    async fn what_survives_on_redis() {
        for (persistence, survives, words) in [
            (Persistence::None, Survival::ServerKill, "no append-only file"),
            (Persistence::EverySecond, Survival::ServerKill, "every second"),
            (Persistence::Always, Survival::PowerCut, "always"),
        ] {
            let server = Server::on_redis_with(Options { persistence, ..Options::default() }, &[]);
            server.ready().await;
            let facts = info(&mut server.client().await).await;
            let version = server.redis().info("redis_version").unwrap();
            assert_eq!((facts.store, facts.survives), (format!("Redis {version}"), survives as i32), "{persistence:?}");
            assert!(facts.survives_note.contains(words), "{persistence:?}: {}", facts.survives_note);
        }
    }

    /// While Redis is away the server still says what it is; of Redis it claims the least as long as it has not seen it.
    async fn facts_while_redis_is_down() {
        let redis = Arc::new(Redis::with(Options { persistence: Persistence::Always, ..Options::default() }));
        redis.kill();
        let server = Server::on(Arc::clone(&redis), &["--max-expiries", "3"]);
        assert_eq!(server.health(SERVICE).await, ServingStatus::NotServing);
        let mut client = server.client().await;
        let facts = info(&mut client).await;
        assert_eq!((facts.store.as_str(), facts.survives), ("Redis", Survival::ServerKill as i32));
        assert!(facts.survives_note.contains("as far as is known"), "{}", facts.survives_note);
        assert_eq!(facts.limits.unwrap().max_expiries, 3);

        redis.restart();
        server.ready().await;
        let known = info(&mut client).await;
        assert_eq!((known.store.starts_with("Redis "), known.survives), (true, Survival::PowerCut as i32));
        redis.kill();
        let answer = client.admin.list_queues(ListQueuesRequest::default()).await;
        Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check("ListQueues", answer);
        assert_eq!(info(&mut client).await, known);
    }

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
