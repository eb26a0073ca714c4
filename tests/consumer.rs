//! The client crate's consumer, against real servers that are killed, stopped and cut off.

use std::{collections::HashSet, sync::Arc, time::Duration};

use data_queue_client::{Client, Consumer, Delivered, ErrorKind, Outcome};
use tokio::{sync::Notify, time::timeout};

use crate::support::{
    PATIENCE,
    call::{five, held_for_request, insert_request, json, pop_waiting, proto, text},
    on_every_store, poll_until,
    proxy::Proxy,
    redis::Redis,
    server::{self, Server},
    unique_queue, wire_tests,
};

/// Longer than anything here takes: what comes back does not because of it.
const HOUR: Duration = Duration::from_secs(3_600);
/// So many are worked through while things break.
const MANY: usize = 2_000;

async fn fill(client: &mut server::Client, queue: &str, tasks: std::ops::Range<usize>) {
    let tasks: Vec<_> = tasks.map(|number| json(&number.to_string())).collect();
    for tasks in tasks.chunks(1_000) {
        client.insert(insert_request(queue, tasks.to_vec())).await.unwrap();
    }
}

fn connect(server: &Server) -> Client {
    Client::connect(&server.address().to_string()).unwrap()
}

async fn next(consumer: &mut Consumer) -> Delivered {
    timeout(PATIENCE, consumer.next()).await.expect("a task in time").expect("no error").expect("a task")
}

async fn take(consumer: &mut Consumer, count: usize) -> Vec<Delivered> {
    let mut tasks = Vec::with_capacity(count);
    while tasks.len() < count {
        tasks.push(next(consumer).await);
    }
    tasks
}

fn numbers(tasks: &[Delivered]) -> Vec<usize> {
    tasks.iter().map(|task| task.json().unwrap()).collect()
}

async fn until_five(client: &mut server::Client, queue: &str, wanted: [u64; 5]) {
    let mut found = [0; 5];
    let reached = poll_until("the counts", PATIENCE, async || {
        found = five(client, queue).await;
        (found == wanted).then_some(())
    });
    timeout(PATIENCE / 2, reached).await.unwrap_or_else(|_| panic!("{wanted:?} wanted, {found:?} found"));
}

/// Works through all tasks, and some of them are held until the end. `disturb` is called before each.
async fn work_through(consumer: &mut Consumer, mut disturb: impl FnMut(usize)) -> (Vec<Delivered>, HashSet<String>) {
    let (mut ids, mut tokens, mut held) = (HashSet::new(), HashSet::new(), Vec::new());
    let mut received = 0;
    while ids.len() < MANY {
        disturb(received);
        let task = next(consumer).await;
        received += 1;
        ids.insert(task.id().to_owned());
        assert!(tokens.insert(task.lease_token().to_owned()), "a delivery was handed out twice");
        if received % 100 == 50 { held.push(task) } else { task.done() }
    }
    (held, tokens)
}

/// A server is killed and started again while a consumer works: no task is lost, and none is worked on twice.
async fn work_through_a_restart(server: Server, lease: Duration) {
    server.ready().await;
    let mut client = server.client().await;
    let queue = unique_queue("restart");
    fill(&mut client, &queue, 0..MANY).await;
    let mut consumer = connect(&server).consumer(&queue).lease(lease).start().unwrap();
    let killed = Notify::new();
    let work = work_through(&mut consumer, |received| {
        if received == 707 {
            server.kill();
            killed.notify_one();
        }
    });
    let restart = async {
        killed.notified().await;
        server.restart().await;
    };
    let ((held, tokens), ()) = tokio::join!(work, restart);
    assert_eq!(tokens.len(), MANY, "each task was delivered to the handle once");
    for task in held {
        assert!(!task.is_lost());
        task.ack().await.unwrap();
    }
    assert_eq!(consumer.close().await.unwrap(), 0, "no ack came too late");
    assert_eq!(five(&mut server.client().await, &queue).await, [0, 0, 0, MANY as u64, MANY as u64]);
}

on_every_store! {
    /// G11, G14: tasks come in order, never more than may be held, and more as they are acked, however that is done.
    async fn order_and_max_outstanding(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("order");
        fill(&mut client, &queue, 0..60).await;
        let mut consumer = connect(&server).consumer(&queue).lease(HOUR).max_outstanding(10).start().unwrap();
        let mut tasks = take(&mut consumer, 10).await;
        assert_eq!(five(&mut client, &queue).await, [50, 10, 0, 60, 0]);
        let mut seen = numbers(&tasks);
        assert_eq!(consumer.ack_all(tasks.drain(..4)).await.unwrap(), [Outcome::Applied; 4]);
        tasks.remove(0).ack().await.unwrap();
        tasks.extend(take(&mut consumer, 5).await);
        assert_eq!(five(&mut client, &queue).await, [45, 10, 0, 60, 5]);
        seen.extend(numbers(&tasks[5..]));
        tasks.into_iter().for_each(Delivered::done);
        for _ in 15..60 {
            let task = next(&mut consumer).await;
            seen.extend(numbers(std::slice::from_ref(&task)));
            task.done();
        }
        assert_eq!(seen, (0..60).collect::<Vec<_>>());
        assert_eq!(consumer.close().await.unwrap(), 0);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, 60, 60]);
    }

    /// What is dropped, forgotten or panics is put back, uncounted as an expiry; so is what waits in a consumer that is dropped.
    async fn what_is_dropped_is_put_back(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("dropped");
        fill(&mut client, &queue, 0..5).await;
        let mut consumer = connect(&server).consumer(&queue).lease(HOUR).max_outstanding(1).start().unwrap();
        drop(next(&mut consumer).await);
        let task = next(&mut consumer).await;
        assert_eq!((task.text(), task.deliveries(), task.expiries()), (Some("0"), 2, 0));
        let handler = tokio::spawn(async move { panic!("a handler that panics with {}", task.id()) });
        assert!(handler.await.unwrap_err().is_panic());
        let task = next(&mut consumer).await;
        assert_eq!((task.text(), task.deliveries()), (Some("0"), 3));
        task.putback().await.unwrap();
        let task = next(&mut consumer).await;
        assert_eq!((task.text(), task.deliveries()), (Some("0"), 4));
        drop(consumer);
        assert_eq!(five(&mut client, &queue).await, [4, 1, 0, 5, 0]);
        task.ack().await.unwrap();
        let mut consumer = connect(&server).consumer(&queue).lease(HOUR).start().unwrap();
        let task = next(&mut consumer).await;
        drop(consumer);
        until_five(&mut client, &queue, [3, 1, 0, 5, 1]).await;
        assert_eq!(task.text(), Some("1"));
        drop(task);
        until_five(&mut client, &queue, [4, 0, 0, 5, 1]).await;
        assert_eq!(text(&pop_waiting(&mut client, &queue).await), "1", "at the head, in order");
    }

    /// A paused consumer is sent no more, and goes on when it is resumed.
    async fn pause_and_resume(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("pause");
        fill(&mut client, &queue, 0..20).await;
        let mut consumer = connect(&server).consumer(&queue).lease(HOUR).max_outstanding(5).start().unwrap();
        let tasks = take(&mut consumer, 5).await;
        consumer.pause();
        assert_eq!(consumer.ack_all(tasks).await.unwrap(), [Outcome::Applied; 5]);
        assert_eq!(five(&mut client, &queue).await, [15, 0, 0, 20, 5], "the pause was heard before the acks");
        consumer.resume();
        take(&mut consumer, 5).await.into_iter().for_each(Delivered::done);
        take(&mut consumer, 5).await.into_iter().for_each(Delivered::done);
        take(&mut consumer, 5).await.into_iter().for_each(Delivered::done);
        consumer.close().await.unwrap();
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, 20, 20]);
    }

    /// A close waits for what was handed out, gives back the rest, and leaves nothing to the leases.
    async fn close_waits_for_what_is_in_flight(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("close");
        fill(&mut client, &queue, 0..20).await;
        let mut consumer = connect(&server).consumer(&queue).lease(HOUR).max_outstanding(10).start().unwrap();
        let mut tasks = take(&mut consumer, 3).await;
        let closing = tokio::spawn(consumer.close());
        // The seven that nobody took.
        until_five(&mut client, &queue, [17, 3, 0, 20, 0]).await;
        assert!(!closing.is_finished());
        tasks.remove(0).ack().await.unwrap();
        tasks.remove(0).done();
        assert!(!closing.is_finished());
        drop(tasks);
        assert_eq!(timeout(PATIENCE, closing).await.expect("an end").unwrap().unwrap(), 0);
        assert_eq!(five(&mut client, &queue).await, [18, 0, 0, 20, 2]);
        assert_eq!(text(&pop_waiting(&mut client, &queue).await), "2", "what was put back is in order");
    }

    /// G6: a handler that works for longer than its lease keeps its task, without a heartbeat.
    async fn long_handler_outlives_its_leases(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let (queue, clock) = (unique_queue("long"), unique_queue("clock"));
        fill(&mut client, &queue, 0..1).await;
        fill(&mut client, &clock, 0..1).await;
        let api = connect(&server);
        let mut consumer = api.consumer(&queue).lease(Duration::from_secs(1)).start().unwrap();
        let task = next(&mut consumer).await;
        // Another queue's lease, of nobody that lives, tells how long it takes.
        crate::support::call::pop_for(&mut client, &clock, Duration::from_secs(4)).await;
        tokio::select! {
            () = task.lost() => panic!("the lease was lost"),
            _ = pop_waiting(&mut client, &clock) => {}
        }
        assert_eq!((task.is_lost(), task.deliveries()), (false, 1));
        assert!(task.heartbeat(HOUR).await.unwrap() > HOUR / 2);
        assert_eq!(task.heartbeat(HOUR * 13).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        task.ack().await.unwrap();
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, 1, 1]);
    }

    /// A handler is told that an operator took its task away; its ack is refused, and its drop harms nobody.
    async fn lost_tells_that_an_operator_took_it_back(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("lost");
        fill(&mut client, &queue, 0..2).await;
        let lease = Duration::from_secs(1);
        let mut consumer = connect(&server).consumer(&queue).lease(lease).max_outstanding(2).start().unwrap();
        let tasks = take(&mut consumer, 2).await;
        consumer.pause();
        let answer = client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap();
        assert_eq!(answer.into_inner().put_back, 2);
        for task in &tasks {
            timeout(PATIENCE, task.lost()).await.expect("to be told");
            assert!(task.is_lost());
        }
        let mut tasks = tasks.into_iter();
        let error = tasks.next().unwrap().ack().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LeaseLost);
        tasks.next().unwrap().done();
        assert_eq!(consumer.close().await.unwrap(), 1, "one ack came too late, and nobody waited for it");
        assert_eq!(five(&mut client, &queue).await, [2, 0, 0, 2, 0]);
    }

    /// The connection is cut again and again: by the books every task is acked once.
    async fn connection_is_cut_many_times(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("cut");
        fill(&mut client, &queue, 0..MANY).await;
        let proxy = Proxy::to(server.address().port()).await;
        let api = Client::connect(&proxy.address().to_string()).unwrap();
        let mut consumer = api.consumer(&queue).lease(HOUR).start().unwrap();
        let (held, _) = work_through(&mut consumer, |received| {
            if received % 90 == 77 {
                proxy.cut();
            }
        })
        .await;
        drop(held);
        // What was held may have been taken back in a cut that lasted; then it is here again.
        let mut done = tokio::spawn(async move {
            while let Ok(Some(task)) = consumer.next().await {
                task.done();
            }
        });
        until_five(&mut client, &queue, [0, 0, 0, MANY as u64, MANY as u64]).await;
        done.abort();
        assert!((&mut done).await.unwrap_err().is_cancelled());
    }
}

wire_tests! {
    async fn sqlite_server_is_killed_and_started_again() {
        // After the start every lease runs its full length again; what was lost on its way comes back then.
        work_through_a_restart(Server::on_sqlite_with(&[]), Duration::from_secs(12)).await;
    }

    async fn server_on_redis_is_killed_and_started_again() {
        work_through_a_restart(Server::on(Arc::new(Redis::start()), &[]), HOUR).await;
    }

    /// A server stops, and another one on the same Redis has its place: the consumer takes all that it holds along at once.
    async fn another_server_takes_over_from_one_that_stops() {
        let redis = Arc::new(Redis::start());
        let servers = [Server::on(Arc::clone(&redis), &[]), Server::on(Arc::clone(&redis), &[])];
        servers[0].ready().await;
        servers[1].ready().await;
        let proxy = Proxy::to(servers[0].address().port()).await;
        let mut client = servers[1].client().await;
        let queue = unique_queue("moves");
        fill(&mut client, &queue, 0..MANY).await;
        let api = Client::connect(&proxy.address().to_string()).unwrap();
        let mut consumer = api.consumer(&queue).lease(HOUR).start().unwrap();
        let (held, tokens) = work_through(&mut consumer, |received| {
            if received == 707 {
                proxy.redirect(servers[1].address().port());
                servers[0].terminate();
            }
        })
        .await;
        assert_eq!(tokens.len(), MANY, "each task was delivered once");
        assert_eq!(servers[0].wait_exit(PATIENCE).code(), Some(0));
        for task in held {
            task.ack().await.unwrap();
        }
        assert_eq!(consumer.close().await.unwrap(), 0);
        assert_eq!(five(&mut client, &queue).await, [0, 0, 0, MANY as u64, MANY as u64]);
    }

    /// What the server refuses ends the consumer with that error, and its tasks with it.
    async fn refusal_is_the_end() {
        let server = server::Backend::Memory.start(&[]).await;
        let error = connect(&server).consumer("a").max_outstanding(0).start().unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("max_outstanding")));
        for (consumer, field) in [
            (connect(&server).consumer("{"), "open.queues[0].name"),
            (connect(&server).consumer("a").max_outstanding(10_001), "max_outstanding"),
            (connect(&server).consumer("a").queue("b", 101), "open.queues[1].weight"),
            (connect(&server).consumer("a").lease(Duration::from_millis(99)), "lease"),
        ] {
            let mut consumer = consumer.start().unwrap();
            let error = timeout(PATIENCE, consumer.next()).await.expect("an end").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert!(error.field().is_some_and(|found| found.ends_with(field)), "{error}");
            assert!(consumer.next().await.unwrap().is_none());
            assert_eq!(consumer.close().await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }
}
