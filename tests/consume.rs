//! Streams of deliveries: what a client of `Consume` is promised.

use std::{sync::Arc, time::Duration};

use data_queue_proto::v1::{ConsumeOpen, ConsumeQueue, Outcome, PopRequest, consume_request::Request};
use tokio::{sync::Barrier, task::JoinSet, time::Instant};
use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{
        self, counts, five, insert_json, insert_request, json, outcomes, pop, pop_for, pop_request, proto, putback,
        text,
    },
    consume::{Consumer, ack, open, request, tokens},
    on_every_store, poll_until,
    proxy::Proxy,
    redis::Redis,
    server::{Backend, Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

/// What a broken stream's leases have left, at the most.
const GRACE: Duration = Duration::from_secs(2);

async fn fill(client: &mut Client, queue: &str, count: usize) {
    let tasks = (0..count).map(|number| json(&number.to_string())).collect();
    client.insert(insert_request(queue, tasks)).await.unwrap();
}

/// Waits, by the store's clock: until a lease of this length has run out elsewhere.
async fn pass(client: &mut Client, span: Duration) {
    let queue = unique_queue("clock");
    insert_json(client, &queue, &["0"]).await;
    pop_for(client, &queue, span).await;
    let request = PopRequest { wait: Some(proto(PATIENCE)), ..pop_request(&queue) };
    assert!(client.pop(request).await.unwrap().into_inner().task.is_some());
}

fn with_session(queue: &str, max_outstanding: u32, session: u8) -> ConsumeOpen {
    ConsumeOpen { session: vec![session; 16].into(), ..open(queue, max_outstanding) }
}

on_every_store! {
    /// G11, G14: tasks come in order, never more than the client may hold, and more as it acks.
    async fn no_more_than_max_outstanding(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("credit");
        fill(&mut client, &queue, 50).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 10)).await;
        let mut tasks = stream.take(10).await;
        assert_eq!(five(&mut client, &queue).await, [40, 10, 0, 50, 0]);
        assert_eq!(stream.ack("", &tasks[..4]).await, [Outcome::Applied; 4]);
        tasks.extend(stream.take(4).await);
        assert_eq!(five(&mut client, &queue).await, [36, 10, 0, 50, 4]);

        stream.say(Request::MaxOutstanding(16)).await;
        tasks.extend(stream.take(6).await);
        assert_eq!(five(&mut client, &queue).await, [30, 16, 0, 50, 4]);
        stream.say(Request::MaxOutstanding(2)).await;
        assert_eq!(stream.ack(&queue, &tasks[4..18]).await, [Outcome::Applied; 14]);
        assert_eq!(five(&mut client, &queue).await, [30, 2, 0, 50, 18], "it holds as many as it may");
        stream.say(Request::MaxOutstanding(0)).await;
        assert_eq!(stream.ack(&queue, &tasks[18..]).await, [Outcome::Applied; 2]);
        assert_eq!(five(&mut client, &queue).await, [30, 0, 0, 50, 20], "it wants no more for now");
        stream.say(Request::MaxOutstanding(10_000)).await;
        tasks.extend(stream.take(30).await);
        let order = tasks.iter().map(|task| text(task).parse::<usize>().unwrap()).collect::<Vec<_>>();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
        assert!(stream.tasks.is_empty());
    }

    /// G5, G7: acks, putbacks and heartbeats are answered in their order, truthfully, token by token.
    async fn answers(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("answers");
        fill(&mut client, &queue, 6).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 6)).await;
        let tasks = stream.take(6).await;
        for part in [&tasks[..2], &tasks[1..3], &tasks[..1]] {
            stream.say(ack(&queue, part)).await;
        }
        assert_eq!(outcomes(&stream.answer().await.outcomes), [Outcome::Applied; 2]);
        assert_eq!(outcomes(&stream.answer().await.outcomes), [Outcome::AlreadyAcked, Outcome::Applied]);
        assert_eq!(outcomes(&stream.answer().await.outcomes), [Outcome::AlreadyAcked]);
        let beaten = stream.heartbeat(&tasks[2..4], Duration::from_secs(7_200)).await;
        assert_eq!(outcomes(&beaten.outcomes), [Outcome::AlreadyAcked, Outcome::Applied]);
        assert_eq!(call::duration(beaten.lease), Duration::from_secs(7_200));
        assert_eq!(stream.put_back(&tasks[4..]).await, [Outcome::Applied; 2]);
        let again = stream.take(2).await;
        assert_eq!(again.iter().map(|task| (&task.id, task.deliveries)).collect::<Vec<_>>(), [(&tasks[4].id, 2), (&tasks[5].id, 2)]);
        assert_eq!(stream.put_back(&tasks[4..]).await, [Outcome::LeaseLost; 2], "of the delivery before");
        let held = [&tasks[3..4], &again].concat();
        assert_eq!(stream.ack("", &held).await, [Outcome::Applied; 3]);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, 6, 6]);
        // A token that was popped otherwise is as good.
        fill(&mut client, &queue, 1).await;
        let task = stream.take(1).await;
        assert_eq!(putback(&mut client, &queue, &task[0].lease_token).await, Outcome::Applied);
        stream.say(Request::MaxOutstanding(0)).await;
        assert_eq!(stream.ack("", &task).await, [Outcome::LeaseLost]);
    }

    /// G15: an idle stream gets a task with the insert that brings it, one task after the other.
    async fn idle_stream_gets_new_tasks(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("idle");
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 1)).await;
        for number in 0..100 {
            insert_json(&mut client, &queue, &[&number.to_string()]).await;
            let task = stream.take(1).await;
            assert_eq!(text(&task[0]), number.to_string());
            assert_eq!(stream.ack("", &task).await, [Outcome::Applied]);
        }
    }

    /// G6: the server extends the leases of a stream that lives, also those of a client that says nothing.
    async fn leases_are_kept(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("kept");
        fill(&mut client, &queue, 3).await;
        let lease = Some(proto(Duration::from_millis(500)));
        let mut stream = Consumer::open(&mut client.clone(), ConsumeOpen { lease, ..open(&queue, 3) }).await;
        let tasks = stream.take(3).await;
        pass(&mut client, Duration::from_secs(3)).await;
        assert_eq!(five(&mut client, &queue).await, [0, 3, 0, 3, 0]);
        assert_eq!(stream.ack("", &tasks).await, [Outcome::Applied; 3]);
    }

    /// G6, G8: no longer than `max_hold`; what ran out is delivered again, and does not count as held any more.
    async fn leases_are_kept_no_longer_than_max_hold(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("max-hold");
        fill(&mut client, &queue, 1).await;
        let (lease, max_hold) = (Some(proto(Duration::from_millis(300))), Some(proto(Duration::ZERO)));
        let mut stream = Consumer::open(&mut client.clone(), ConsumeOpen { lease, max_hold, ..open(&queue, 1) }).await;
        let first = stream.take(1).await;
        let second = stream.take(1).await;
        assert_eq!((&second[0].id, second[0].deliveries, second[0].expiries), (&first[0].id, 2, 1));
        assert_eq!(stream.ack("", &first).await, [Outcome::LeaseLost]);
        // The client's own heartbeat goes on past it.
        stream.heartbeat(&second, Duration::from_secs(3_600)).await;
        pass(&mut client, Duration::from_secs(2)).await;
        assert_eq!(stream.ack("", &second).await, [Outcome::Applied]);
    }

    /// G6: `max_hold` counts from the delivery, also over streams that take the task over from each other.
    async fn max_hold_is_not_begun_anew_by_another_stream(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("hangs");
        fill(&mut client, &queue, 1).await;
        let (lease, max_hold) = (Some(proto(Duration::from_millis(400))), Some(proto(Duration::from_secs(2))));
        let mut clock = client.clone();
        for _ in 0..50 {
            let open = ConsumeOpen { lease, max_hold, ..with_session(&queue, 1, 3) };
            let mut stream = Consumer::open(&mut client, open).await;
            let delivered_again = async {
                while !stream.tasks.iter().any(|task| task.expiries > 0) {
                    stream.read().await.unwrap().expect("what it took over, or the task again");
                }
            };
            tokio::select! {
                () = delivered_again => return,
                () = pass(&mut clock, Duration::from_millis(300)) => {}
            }
        }
        panic!("it is held for ever");
    }

    /// G8, G15: when a stream breaks, what was sent goes back within the grace, counted as an expiry.
    async fn broken_stream_gives_back_within_the_grace(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("broken");
        fill(&mut client, &queue, 5).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 3)).await;
        let held = stream.take(3).await;
        assert_eq!(stream.ack("", &held[..1]).await, [Outcome::Applied]);
        let held = [held, stream.take(1).await].concat();
        drop(stream);
        let mut again = Vec::new();
        while again.len() < 4 {
            // Far less than the lease of an hour.
            let request = PopRequest { wait: Some(proto(PATIENCE / 2)), ..pop_request(&queue) };
            again.extend(client.pop(request).await.unwrap().into_inner().task);
        }
        let mut found = again.iter().map(|task| (text(task), task.deliveries, task.expiries)).collect::<Vec<_>>();
        found.sort_unstable();
        assert_eq!(found, [("1", 2, 1), ("2", 2, 1), ("3", 2, 1), ("4", 1, 0)]);
        assert_eq!(call::ack(&mut client, &queue, &held[1].lease_token).await, Outcome::LeaseLost);
    }

    /// A stream with the session of a broken one takes over what that one's client holds, and keeps it.
    async fn session_is_taken_over(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("session");
        fill(&mut client, &queue, 6).await;
        let mut stream = Consumer::open(&mut client.clone(), with_session(&queue, 4, 7)).await;
        let tasks = stream.take(4).await;
        assert!(stream.resumed.is_empty());
        assert_eq!(stream.ack("", &tasks[1..2]).await, [Outcome::Applied]);
        let tasks = [tasks, stream.take(1).await].concat();
        drop(stream);
        let mut stream = Consumer::open(&mut client.clone(), with_session(&queue, 5, 7)).await;
        let tasks = [tasks, stream.take(1).await].concat();
        let held = [&tasks[..1], &tasks[2..5]].concat();
        assert_eq!(stream.resumed, tokens(&held), "it holds four, and may hold one more");
        pass(&mut client, GRACE * 2).await;
        assert_eq!(five(&mut client, &queue).await, [0, 5, 0, 6, 1]);
        assert_eq!(stream.ack("", &tasks).await, [vec![Outcome::Applied], vec![Outcome::AlreadyAcked], vec![Outcome::Applied; 4]].concat());
    }

    /// Of two streams with one session the later has it; the earlier is told, and takes nothing back when it ends.
    async fn earlier_stream_of_a_session_is_ended(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("twice");
        fill(&mut client, &queue, 1).await;
        let mut first = Consumer::open(&mut client.clone(), with_session(&queue, 2, 9)).await;
        let task = first.take(1).await;
        let mut second = Consumer::open(&mut client.clone(), with_session(&queue, 2, 9)).await;
        second.read().await.unwrap();
        assert_eq!(second.resumed, tokens(&task));
        fill(&mut client, &queue, 1).await;
        let other = second.take(1).await;
        fill(&mut client, &queue, 1).await;
        let status = first.end().await.unwrap_err();
        assert_eq!((status.code(), status.reason().as_deref()), (Code::Aborted, Some("SESSION_TAKEN_OVER")));
        pass(&mut client, GRACE * 2).await;
        assert_eq!(second.ack("", &[task, other].concat()).await, [Outcome::Applied; 2]);
    }

    /// What the old stream acks is done, and answered before it is told that its session has gone.
    async fn acks_on_a_stream_that_was_taken_over_are_answered(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("late-ack");
        fill(&mut client, &queue, 2).await;
        let mut first = Consumer::open(&mut client.clone(), with_session(&queue, 1, 9)).await;
        let task = first.take(1).await;
        let mut second = Consumer::open(&mut client.clone(), with_session(&queue, 1, 9)).await;
        second.read().await.unwrap();
        first.say(ack("", &task)).await;
        let status = first.end().await.unwrap_err();
        assert_eq!((status.code(), status.reason().as_deref()), (Code::Aborted, Some("SESSION_TAKEN_OVER")));
        assert_eq!(outcomes(&first.answers[0].outcomes), [Outcome::Applied]);
        assert_eq!(outcomes(&second.heartbeat(&task, GRACE).await.outcomes), [Outcome::AlreadyAcked]);
    }

    /// A client that says no more gets its answers and the end; what it still holds is its own for the grace.
    async fn half_close(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("half-close");
        fill(&mut client, &queue, 3).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 3)).await;
        let tasks = stream.take(3).await;
        stream.say(Request::MaxOutstanding(0)).await;
        stream.say(ack("", &tasks[..1])).await;
        stream.close();
        stream.end().await.unwrap();
        assert_eq!(outcomes(&stream.answers[0].outcomes), [Outcome::Applied]);
        assert_eq!(call::ack(&mut client, &queue, &tasks[1].lease_token).await, Outcome::Applied);
        let again = call::pop_waiting(&mut client, &queue).await;
        assert_eq!((&again.id, again.expiries), (&tasks[2].id, 1));
    }

    /// Several queues share a stream by their weights, and an empty one leaves its share to the others.
    async fn queues_share_a_stream_by_weight(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let names = [unique_queue("heavy"), unique_queue("light"), unique_queue("empty")];
        fill(&mut client, &names[0], 900).await;
        fill(&mut client, &names[1], 900).await;
        let queues = names.iter().zip([3, 1, 100]).map(|(name, weight)| ConsumeQueue { name: name.clone(), weight });
        let mut stream = Consumer::open(&mut client.clone(), ConsumeOpen { queues: queues.collect(), ..open("", 10) }).await;
        let mut heavy = 0;
        for _ in 0..80 {
            let tasks = stream.take(5).await;
            for name in &names[..2] {
                let (of_queue, count) = (tasks.iter().filter(|task| task.queue == *name).cloned().collect::<Vec<_>>(), heavy);
                heavy = if *name == names[0] { count + of_queue.len() } else { count };
                if !of_queue.is_empty() {
                    let applied = vec![Outcome::Applied; of_queue.len()];
                    assert_eq!(stream.ack(name, &of_queue).await, applied);
                }
            }
        }
        assert!((270..=330).contains(&heavy), "{heavy} of 400 are of the queue with three quarters of the weight");
        insert_json(&mut client, &names[2], &["\"new\""]).await;
        loop {
            let task = stream.take(1).await;
            if task[0].queue == names[2] {
                break;
            }
            stream.ack(&task[0].queue.clone(), &task).await;
        }
    }

    /// What a client may hold is shared by weight too: no queue fills all of it.
    async fn room_is_shared_by_weight(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let names = [unique_queue("heavy"), unique_queue("light")];
        fill(&mut client, &names[0], 100).await;
        fill(&mut client, &names[1], 100).await;
        let queues = names.iter().zip([3, 1]).map(|(name, weight)| ConsumeQueue { name: name.clone(), weight });
        let mut stream = Consumer::open(&mut client.clone(), ConsumeOpen { queues: queues.collect(), ..open("", 20) }).await;
        let tasks = stream.take(20).await;
        assert_eq!(tasks.iter().filter(|task| task.queue == names[0]).count(), 15);
    }

    /// G12: a token that is named with another queue of the stream is none of it: its task stays with the client, and counts.
    async fn token_of_another_queue_stays_held(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let names = [unique_queue("one"), unique_queue("other")];
        fill(&mut client, &names[0], 2).await;
        let queues = names.iter().map(|name| ConsumeQueue { name: name.clone(), weight: 1 }).collect();
        let lease = Some(proto(Duration::from_millis(500)));
        let mut stream = Consumer::open(&mut client.clone(), ConsumeOpen { queues, lease, ..open("", 1) }).await;
        let task = stream.take(1).await;
        assert_eq!(stream.ack(&names[1], &task).await, [Outcome::LeaseLost]);
        pass(&mut client, Duration::from_secs(2)).await;
        assert_eq!(five(&mut client, &names[0]).await, [1, 1, 0, 2, 0], "it is kept, and the only one");
        assert_eq!(stream.ack(&names[0], &task).await, [Outcome::Applied]);
        assert_eq!(stream.take(1).await.len(), 1);
    }

    /// G16: a server that stops tells its streams, takes the acks for what they hold, and ends in good order.
    async fn stopping_server_drains_its_streams(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("drain");
        fill(&mut client, &queue, 3).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 2)).await;
        let mut idle = Consumer::open(&mut client.clone(), open(&unique_queue("nothing"), 2)).await;
        let tasks = stream.take(2).await;
        server.terminate();
        idle.end().await.unwrap();
        assert!(idle.drain);
        while !stream.drain {
            stream.read().await.unwrap().expect("what it holds may be finished");
        }
        assert_eq!(stream.ack("", &tasks).await, [Outcome::Applied; 2]);
        stream.end().await.unwrap();
        assert!(stream.tasks.is_empty(), "no more tasks after the drain");
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    }

    /// An old stream is told to drain, and ends when all is acked.
    async fn old_stream_is_drained(backend) {
        let server = backend.start(&["--max-stream-age", "1s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("old");
        fill(&mut client, &queue, 1).await;
        let mut stream = Consumer::open(&mut client.clone(), open(&queue, 2)).await;
        let task = stream.take(1).await;
        while !stream.drain {
            stream.read().await.unwrap().expect("what it holds may be finished");
        }
        fill(&mut client, &queue, 1).await;
        assert_eq!(stream.ack("", &task).await, [Outcome::Applied]);
        stream.end().await.unwrap();
        assert_eq!(five(&mut client, &queue).await, [1, 0, 0, 2, 1]);
    }

    /// Row 40, and what else a stream can be asked wrongly; what was asked before is answered.
    async fn row_40_what_is_no_stream_of_deliveries(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("invalid");
        fill(&mut client, &queue, 2).await;
        let good = || open(&queue, 1);
        let named = |name: &str, weight| ConsumeQueue { name: name.to_owned(), weight };
        let first = [
            ("open", Request::MaxOutstanding(1)),
            ("open", ack(&queue, &[])),
            ("open.queues", Request::Open(ConsumeOpen { queues: Vec::new(), ..good() })),
            ("open.queues", Request::Open(ConsumeOpen { queues: (0..65).map(|n| named(&n.to_string(), 1)).collect(), ..good() })),
            ("open.queues[1].name", Request::Open(ConsumeOpen { queues: vec![named("a", 1), named("a", 1)], ..good() })),
            ("open.queues[0].weight", Request::Open(ConsumeOpen { queues: vec![named("a", 101)], ..good() })),
            ("open.max_outstanding", Request::Open(open(&queue, 0))),
            ("open.max_outstanding", Request::Open(open(&queue, 10_001))),
            ("open.session", Request::Open(ConsumeOpen { session: vec![1; 15].into(), ..good() })),
            ("open.max_hold", Request::Open(ConsumeOpen { max_hold: Some(proto(Duration::from_secs(43_201))), ..good() })),
        ];
        for (field, what) in first {
            let case = format!("{what:?}");
            let mut stream = Consumer::begin(&mut client.clone(), request(what)).await;
            Refusal::invalid("CONSUME_INVALID", field).check(&case, stream.end().await);
        }
        for (wanted, what) in [
            ("QUEUE_NAME_INVALID", Request::Open(ConsumeOpen { queues: vec![named("{", 1)], ..good() })),
            ("LEASE_OUT_OF_RANGE", Request::Open(ConsumeOpen { lease: Some(proto(Duration::from_millis(99))), ..good() })),
        ] {
            let mut stream = Consumer::begin(&mut client.clone(), request(what)).await;
            assert_eq!(stream.end().await.unwrap_err().reason().as_deref(), Some(wanted));
        }
        let later = [
            ("CONSUME_INVALID", Request::Open(good())),
            ("CONSUME_INVALID", Request::MaxOutstanding(10_001)),
            ("CONSUME_INVALID", ack("another", &[])),
            ("BATCH_EMPTY", ack(&queue, &[])),
        ];
        for (wanted, what) in later {
            let mut stream = Consumer::open(&mut client.clone(), open(&queue, 1)).await;
            let task = stream.take(1).await;
            stream.say(Request::MaxOutstanding(0)).await;
            stream.say(Request::Putback(data_queue_proto::v1::ConsumePutback { lease_tokens: tokens(&task), ..Default::default() })).await;
            stream.say(what).await;
            let status = stream.end().await.unwrap_err();
            assert_eq!((status.code(), status.reason().as_deref()), (Code::InvalidArgument, Some(wanted)));
            assert_eq!(outcomes(&stream.answers[0].outcomes), [Outcome::Applied], "what was asked before");
        }
        let mut stream = Consumer::begin(&mut client.clone(), data_queue_proto::v1::ConsumeRequest { request: None }).await;
        assert_eq!(stream.end().await.unwrap_err().reason().as_deref(), Some("CONSUME_INVALID"));
        let nothing = match client.consume(tokio_stream::empty()).await {
            Ok(stream) => stream.into_inner().message().await,
            Err(status) => Err(status),
        };
        Refusal::invalid("CONSUME_INVALID", "open").check("no message", nothing);
        assert_eq!(five(&mut client, &queue).await, [2, 0, 0, 2, 0]);
    }
}

wire_tests! {
    /// A session goes on with another server on the same Redis, and the insert on one server feeds the stream on another.
    async fn session_moves_to_another_server() {
        let redis = Arc::new(Redis::start());
        let servers = [Server::on(Arc::clone(&redis), &[]), Server::on(Arc::clone(&redis), &[])];
        servers[0].ready().await;
        servers[1].ready().await;
        let (mut here, mut there) = (servers[0].client().await, servers[1].client().await);
        let queue = unique_queue("moves");
        fill(&mut here, &queue, 2).await;
        let mut stream = Consumer::open(&mut here.clone(), with_session(&queue, 3, 5)).await;
        let tasks = stream.take(2).await;
        let mut moved = Consumer::open(&mut there.clone(), with_session(&queue, 3, 5)).await;
        moved.read().await.unwrap();
        assert_eq!(moved.resumed, tokens(&tasks));
        drop(stream);
        pass(&mut here, GRACE * 2).await;
        fill(&mut here, &queue, 1).await;
        let tasks = [tasks, moved.take(1).await].concat();
        assert_eq!(moved.ack("", &tasks).await, [Outcome::Applied; 3]);
        assert_eq!(pop(&mut there, &queue).await, None);
    }

    /// The server is killed: its clients' leases run to their deadlines, a new server takes the session on.
    async fn session_outlives_its_server() {
        let redis = Arc::new(Redis::start());
        let server = Server::on(Arc::clone(&redis), &[]);
        server.ready().await;
        let mut client = server.client().await;
        let queue = unique_queue("outlives");
        fill(&mut client, &queue, 2).await;
        let mut stream = Consumer::open(&mut client, with_session(&queue, 3, 6)).await;
        let tasks = stream.take(2).await;
        server.kill();
        let other = Server::on(redis, &[]);
        other.ready().await;
        let mut client = other.client().await;
        let mut stream = Consumer::open(&mut client.clone(), with_session(&queue, 3, 6)).await;
        stream.read().await.unwrap();
        assert_eq!(stream.resumed, tokens(&tasks));
        poll_until("both to be held", PATIENCE, async || (counts(&mut client, &queue).await.leased == 2).then_some(())).await;
        assert_eq!(stream.ack("", &tasks).await, [Outcome::Applied; 2]);
    }
}

/// Streams at once on one server, and what each of them holds.
const STREAMS: usize = 200;
const HELD_BY_EACH: usize = 5;

on_every_store! {
    /// G8, G15: a client that does not answer any more, though its connection stays: its tasks are ready again when the pings,
    /// their timeout and the grace are over, long before their leases end, and count as expired.
    async fn silent_client_gives_back_within_the_grace(backend) {
        let server = backend.start(&["--keepalive-interval", "1s", "--keepalive-timeout", "1s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("silent");
        fill(&mut client, &queue, 4).await;
        let proxy = Proxy::to(server.address().port()).await;
        let mut silent = Server::client_at(proxy.address()).await;
        let mut stream = Consumer::open(&mut silent, open(&queue, 3)).await;
        let held = stream.take(3).await;
        // As long as it answers, it holds them.
        pass(&mut client, GRACE * 2).await;
        assert_eq!(stream.ack("", &held[..1]).await, [Outcome::Applied]);
        let held = [&held[1..], &stream.take(1).await].concat();
        assert_eq!(five(&mut client, &queue).await, [0, 3, 0, 4, 1]);

        proxy.hold_requests();
        proxy.hold_replies();
        let silent_since = Instant::now();
        poll_until("the tasks to be ready", PATIENCE, async || {
            (counts(&mut client, &queue).await.ready == 3).then_some(())
        })
        .await;
        let back_after = silent_since.elapsed();
        println!("ready again {back_after:?} after the client fell silent");
        assert!(back_after >= GRACE, "taken back {back_after:?} after the client fell silent");
        for task in &held {
            let again = pop_for(&mut client, &queue, Duration::from_secs(60)).await;
            assert_eq!((&again.id, again.deliveries, again.expiries), (&task.id, 2, 1));
        }
    }

    /// G16, G14: a server with very many streams stops. All are told, what they ack then is acked, those that just leave keep
    /// what they hold, and nothing else becomes of any task.
    async fn stopping_server_drains_all_its_streams(backend) {
        let server = backend.start(&["--grace", "60s"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("many");
        let (all, held) = (STREAMS * HELD_BY_EACH + 100, STREAMS * HELD_BY_EACH);
        for _ in 0..all / 100 {
            fill(&mut client, &queue, 100).await;
        }
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(server.client().await);
        }
        let ready = Arc::new(Barrier::new(STREAMS + 1));
        let mut streams = JoinSet::new();
        for number in 0..STREAMS {
            let (mut client, queue, ready) = (clients[number % 4].clone(), queue.clone(), Arc::clone(&ready));
            streams.spawn(async move {
                let mut stream = Consumer::open(&mut client, open(&queue, HELD_BY_EACH as u32)).await;
                let tasks = stream.take(HELD_BY_EACH).await;
                ready.wait().await;
                while !stream.drain {
                    stream.read().await.unwrap().expect("what it holds may be finished");
                }
                let acks = number % 10 != 0;
                if acks {
                    assert_eq!(stream.ack("", &tasks).await, [Outcome::Applied; HELD_BY_EACH]);
                } else {
                    stream.close();
                }
                stream.end().await.unwrap();
                assert!(stream.tasks.is_empty(), "no more tasks after the drain");
                acks
            });
        }
        ready.wait().await;
        assert_eq!(five(&mut client, &queue).await, [all - held, held, 0, all, 0].map(|count| count as u64));
        let told_at = Instant::now();
        server.terminate();
        let acked = HELD_BY_EACH * streams.join_all().await.into_iter().filter(|acked| *acked).count();
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
        println!("{STREAMS} streams ended, and the server, {:?} after it was told", told_at.elapsed());
        assert!(!server.log().contains("panicked"), "{}", server.log());
        if backend != Backend::Memory {
            server.restart().await;
            let counted = five(&mut server.client().await, &queue).await;
            assert_eq!(counted, [all - held, held - acked, 0, all, acked].map(|count| count as u64));
        }
    }
}
