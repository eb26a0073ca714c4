//! The worker against the real server, which is found beside this test's own executable: `cargo build --workspace --bins`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    future::pending,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use data_queue_client::{
    Assigned, Client, ErrorKind, Event, Failure, NewTask, Page, Pop, Producer, QueueCounts, Receipt, Reject, Result,
    Summary, TaskInfo, TaskState, TaskValue, Worker, json,
};
use data_queue_proto::reason;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Only ever waited out by a test that fails.
const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    process: Option<Child>,
    address: SocketAddr,
    flags: Vec<String>,
    directory: PathBuf,
}

impl Server {
    /// On a file in a new directory unless the flags name another store.
    fn start(flags: &[&str]) -> Self {
        let mut server = Self::reserve(flags);
        server.run();
        server
    }

    /// An address at which a server may run later.
    fn reserve(flags: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("data-queue-worker-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = env::temp_dir().join(name);
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Self { process: None, address, flags, directory }
    }

    /// Until it listens. The system may have lent the port to somebody for a moment.
    fn run(&mut self) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.try_run() {
            assert!(std::time::Instant::now() < deadline, "the server does not start");
        }
    }

    fn try_run(&mut self) -> bool {
        let test = env::current_exe().unwrap();
        let binary = test.parent().unwrap().parent().unwrap().join("data-queue-server");
        assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
        let mut command = Command::new(binary);
        command.args(["--listen", &self.address.to_string()]).args(&self.flags);
        if !self.flags.iter().any(|flag| flag == "--store") {
            command.arg("--data-dir").arg(&self.directory);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listens = lines.by_ref().map_while(Result::ok).any(|line| line.contains("listening on "));
        thread::spawn(move || lines.for_each(drop));
        self.process = Some(child);
        if !listens {
            self.kill();
        }
        listens
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.address.to_string()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A worker that runs, and what it tells: what happened, the task's value, and why.
struct Running {
    stop: oneshot::Sender<()>,
    run: JoinHandle<Result<Summary>>,
    events: mpsc::UnboundedReceiver<(&'static str, String, String)>,
}

fn run<F, Fut>(worker: Worker, handler: F) -> Running
where
    F: Fn(Assigned) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let (sender, events) = mpsc::unbounded_channel();
    let worker = worker.on_event(move |event| {
        let (what, task, why) = match event {
            Event::Begun(task) => ("begun", Some(task), String::new()),
            Event::Done(task) => ("done", Some(task), String::new()),
            Event::Failed(task, why) => ("failed", Some(task), why.to_owned()),
            Event::Rejected(task, why) => ("rejected", Some(task), why.to_owned()),
            Event::GivenBack(task) => ("given back", Some(task), String::new()),
            Event::Lost(task) => ("lost", Some(task), String::new()),
            other => ("other", None, format!("{other:?}")),
        };
        let value = task.map(|task| String::from_utf8_lossy(task.bytes()).into_owned()).unwrap_or_default();
        let _ = sender.send((what, value, why));
    });
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async { stopped.await.unwrap_or_default() };
    Running { stop, run: tokio::spawn(worker.run_until(stopped, handler)), events }
}

impl Running {
    async fn event(&mut self) -> (&'static str, String, String) {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("it goes on")
    }

    /// The values and reasons of the next events that are this, passing over others.
    async fn next(&mut self, what: &str, count: usize) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        while found.len() < count {
            let (happened, value, why) = self.event().await;
            if happened == what {
                found.insert(value, why);
            }
        }
        found
    }

    async fn stop(self) -> Summary {
        self.stop.send(()).unwrap();
        timeout(PATIENCE, self.run).await.expect("an end in time").unwrap().unwrap()
    }
}

/// Notes that it was dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn summary(done: u64, failed: u64, rejected: u64, given_back: u64, lost: u64) -> (u64, u64, u64, u64, u64) {
    (done, failed, rejected, given_back, lost)
}

fn of(all: Summary) -> (u64, u64, u64, u64, u64) {
    (all.done, all.failed, all.rejected, all.given_back, all.lost)
}

fn text(value: &str) -> NewTask {
    NewTask::bytes(value.to_owned())
}

async fn counts(client: &Client, queue: &str) -> QueueCounts {
    client.admin().get_queue(queue).await.unwrap().counts
}

/// Why the tasks of this state failed, by their values.
async fn errors(client: &Client, queue: &str, state: TaskState) -> BTreeMap<String, String> {
    let tasks = client.admin().list_tasks(queue, state, &Page::first()).await.unwrap().items;
    let value = |task: &TaskInfo| match &task.value {
        TaskValue::Json(text) => text.clone(),
        TaskValue::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    };
    tasks.into_iter().map(|task| (value(&task), task.last_error)).collect()
}

fn map<const N: usize>(entries: [(&str, &str); N]) -> BTreeMap<String, String> {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// As a handler does that knows no better.
fn block_for(time: Duration) {
    let (_sender, nothing) = std::sync::mpsc::channel::<()>();
    nothing.recv_timeout(time).unwrap_err();
}

fn value_of(task: &Assigned) -> String {
    String::from_utf8_lossy(task.bytes()).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_answers_settles_its_task_with_its_reason() {
    let server = Server::start(&["--store", "memory", "--backoff-min", "1h", "--backoff-max", "1h"]);
    let client = server.client();
    let long = "x".to_owned() + &"é".repeat(1_000);
    client.insert_many("q", ["ok", "error", "panic", "reject", "boxed", "long"].map(text)).await.unwrap();
    let reason = long.clone();
    let mut running = run(Worker::new(&client, "q"), move |task| {
        let reason = reason.clone();
        async move {
            match value_of(&task).as_str() {
                "error" => Err("the mail server is away".into()),
                "panic" => panic!("at the disco"),
                "reject" => Err(Reject::new("no such address").into()),
                "boxed" => Err(Box::<dyn std::error::Error + Send + Sync>::from(Reject::new("boxed away")).into()),
                "long" => Err(reason.into()),
                _ => Ok(()),
            }
        }
    });
    let mut settled = BTreeMap::new();
    while settled.len() < 6 {
        let (what, value, _) = running.event().await;
        if what != "begun" {
            settled.insert(value, what);
        }
    }
    let expected = [("boxed", "rejected"), ("error", "failed"), ("long", "failed"), ("ok", "done")];
    let expected = expected.into_iter().chain([("panic", "failed"), ("reject", "rejected")]);
    assert!(settled.iter().map(|(value, what)| (value.as_str(), *what)).eq(expected), "{settled:?}");
    assert_eq!(of(running.stop().await), summary(1, 3, 2, 0, 0));

    let dead = errors(&client, "q", TaskState::Dead).await;
    assert_eq!(dead, map([("boxed", "boxed away"), ("reject", "no such address")]));
    let mut failed = errors(&client, "q", TaskState::Scheduled).await;
    let cut = failed.remove("long").unwrap();
    assert!(cut.len() == 1_023 && long.starts_with(&cut), "cut within a character: {} bytes", cut.len());
    let panicked = "the handler panicked: at the disco";
    assert_eq!(failed, map([("error", "the mail server is away"), ("panic", panicked)]));
    assert_eq!(counts(&client, "q").await.acked, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_deadline_a_handler_is_cancelled_and_its_task_has_failed_whatever_it_answers() {
    let server = Server::start(&["--store", "memory", "--backoff-min", "1h", "--backoff-max", "1h"]);
    let client = server.client();
    client.insert_many("q", ["slow", "stuck"].map(text)).await.unwrap();
    let dropped = Arc::new(AtomicBool::new(false));
    let (watch, (told, was_told)) = (Arc::clone(&dropped), mpsc::unbounded_channel());
    let mut was_told = was_told;
    let worker = Worker::new(&client, "q").deadline(Duration::from_millis(100));
    let mut running = run(worker, move |task| {
        let (dropped, told) = (Dropped(Arc::clone(&watch)), told.clone());
        async move {
            if value_of(&task) == "stuck" {
                block_for(Duration::from_millis(150));
                return Ok(());
            }
            // What it has started elsewhere sees it too.
            let part = task.clone();
            tokio::spawn(async move {
                part.cancelled().await;
                told.send(part.is_cancelled()).unwrap();
            });
            let _dropped = dropped;
            pending().await
        }
    });
    let failed = running.next("failed", 2).await;
    assert_eq!(failed, map([("slow", "deadline of 0.1 s passed"), ("stuck", "deadline of 0.1 s passed")]));
    assert!(dropped.load(Ordering::SeqCst));
    assert_eq!(timeout(PATIENCE, was_told.recv()).await.unwrap(), Some(true));
    assert_eq!(of(running.stop().await), summary(0, 2, 0, 0, 0));
    assert_eq!(errors(&client, "q", TaskState::Scheduled).await, failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_task_cancels_its_handler_which_may_finish_or_give_up() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    let inserted = client.insert_many("q", ["finish", "give up"].map(text)).await.unwrap().tasks;
    let mut running = run(Worker::new(&client, "q").lease(Duration::from_secs(3)), |task| async move {
        assert!(!task.is_cancelled());
        task.cancelled().await;
        if value_of(&task) == "finish" { Ok(()) } else { Err("in vain".into()) }
    });
    running.next("begun", 2).await;
    client.admin().delete_tasks("q", inserted.into_iter().map(|task| task.id)).await.unwrap();
    let mut ended = BTreeMap::new();
    while ended.len() < 2 {
        let (what, value, _) = running.event().await;
        ended.insert(value, what.to_owned());
    }
    assert_eq!(ended, map([("finish", "done"), ("give up", "given back")]));
    assert_eq!(of(running.stop().await), summary(1, 0, 0, 1, 0));
    let counts = counts(&client, "q").await;
    assert_eq!((counts.acked, counts.deleted, counts.ready + counts.scheduled + counts.leased), (1, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_cancels_its_handler_whose_ack_does_not_count() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    client.insert("q", text("1")).await.unwrap();
    let mut running = run(Worker::new(&client, "q").lease(Duration::from_secs(3)), |task| async move {
        task.cancelled().await;
        assert!(task.is_cancelled() && task.is_lost());
        Ok(())
    });
    running.next("begun", 1).await;
    assert_eq!(client.admin().purge("q", [TaskState::Leased]).await.unwrap(), 1);
    running.next("lost", 1).await;
    assert_eq!(of(running.stop().await), summary(0, 0, 0, 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_share_the_handlers_by_their_weights_and_no_more_run_than_may() {
    const CONCURRENCY: usize = 8;
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    for queue in ["few", "many"] {
        client.insert_many(queue, (0..100).map(|number| text(&format!("{queue} {number}")))).await.unwrap();
    }
    let (gauge, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (go, high) = (Arc::new(Notify::new()), Arc::clone(&most));
    let gate = Arc::clone(&go);
    let worker = Worker::new(&client, "few").queue("many", 3).concurrency(CONCURRENCY as u32);
    let is_open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&is_open);
    let mut running = run(worker, move |_| {
        let (gauge, high, gate) = (Arc::clone(&gauge), Arc::clone(&high), Arc::clone(&gate));
        let is_open = Arc::clone(&opened);
        async move {
            high.fetch_max(gauge.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let wait = gate.notified();
            if !is_open.load(Ordering::SeqCst) {
                wait.await;
            }
            tokio::task::yield_now().await;
            gauge.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    });
    let first = running.next("begun", CONCURRENCY).await;
    let few = first.keys().filter(|value| value.starts_with("few")).count();
    assert_eq!(few, 2, "a quarter: {first:?}");
    is_open.store(true, Ordering::SeqCst);
    go.notify_waiters();
    running.next("done", 200).await;
    assert_eq!(of(running.stop().await), summary(200, 0, 0, 0, 0));
    assert_eq!(most.load(Ordering::SeqCst), CONCURRENCY);
}

/// The server cuts off a connection that answers no pings; a handler that blocks the only thread is no reason.
#[tokio::test]
async fn a_handler_that_blocks_the_only_thread_for_three_leases_loses_none() {
    const LEASE: Duration = Duration::from_millis(1_500);
    let server = Server::start(&["--store", "memory", "--keepalive-interval", "1s", "--keepalive-timeout", "1s"]);
    let client = server.client();
    client.insert("q", text("1")).await.unwrap();
    let mut running = run(Worker::new(&client, "q").lease(LEASE), |task| async move {
        assert_eq!((task.deliveries(), task.expiries()), (1, 0));
        block_for(3 * LEASE);
        Ok(())
    });
    running.next("done", 1).await;
    assert_eq!(of(running.stop().await), summary(1, 0, 0, 0, 0));
}

/// G1, G7: the server is killed and started again while tasks come and go.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_no_task_and_nothing_is_acked_that_did_not_finish() {
    const TASKS: usize = 600;
    const KILLS: usize = 3;
    let mut server = Server::start(&[]);
    let client = server.client();
    let finished = Arc::new(Mutex::new(BTreeSet::new()));
    let notes = Arc::clone(&finished);
    let mut running = run(Worker::new(&client, "q").lease(Duration::from_secs(1)), move |task| {
        let notes = Arc::clone(&notes);
        async move {
            tokio::task::yield_now().await;
            notes.lock().unwrap().insert(value_of(&task));
            Ok(())
        }
    });
    let producer = client.producer("q").deadline(PATIENCE).build().unwrap();
    let inserting = tokio::spawn(async move {
        for number in 0..TASKS {
            drop(producer.send(text(&number.to_string())).await.unwrap());
        }
        producer.close().await.unwrap();
    });
    let mut done = BTreeSet::new();
    for kill in 0..=KILLS {
        let enough = if kill == KILLS { TASKS } else { TASKS / (KILLS + 1) * (kill + 1) };
        while done.len() < enough {
            let (what, value, _) = running.event().await;
            if what == "done" {
                assert!(finished.lock().unwrap().contains(&value), "acked and not finished");
                assert!(done.insert(value), "acked twice");
            }
        }
        if kill < KILLS {
            server.kill();
            server.run();
        }
    }
    timeout(PATIENCE, inserting).await.unwrap().unwrap();
    let all = running.stop().await;
    assert_eq!((all.failed, all.rejected), (0, 0));
    let counts = counts(&client, "q").await;
    let inserted = TASKS as u64;
    assert_eq!((counts.inserted, counts.acked, counts.leased, counts.dead), (inserted, inserted, 0, 0), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_start_before_its_server() {
    let mut server = Server::reserve(&["--store", "memory"]);
    let client = server.client();
    let mut running = run(Worker::new(&client, "q"), |_| async { Ok(()) });
    let (what, _, why) = running.event().await;
    assert!(what == "other" && why.starts_with("Disconnected"), "{what}: {why}");
    server.run();
    client.insert("q", text("1")).await.unwrap();
    running.next("done", 1).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_handlers_finish_within_the_grace_and_gives_the_others_back_as_they_were() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    client.insert_many("q", ["hang", "stuck", "finish", "later"].map(text)).await.unwrap();
    let (release, stuck) = std::sync::mpsc::channel::<()>();
    let (stuck, dropped, may_finish) =
        (Arc::new(Mutex::new(stuck)), Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let (watch, finish) = (Arc::clone(&dropped), Arc::clone(&may_finish));
    let worker = Worker::new(&client, "q").concurrency(3).grace(Duration::from_millis(500));
    let mut running = run(worker, move |task| {
        let (stuck, dropped, finish) = (Arc::clone(&stuck), Dropped(Arc::clone(&watch)), Arc::clone(&finish));
        async move {
            match value_of(&task).as_str() {
                "hang" => {
                    let _dropped = dropped;
                    pending().await
                }
                "stuck" => drop(stuck.lock().unwrap().recv()),
                _ => finish.notified().await,
            }
            Ok(())
        }
    });
    running.next("begun", 3).await;
    running.stop.send(()).unwrap();
    may_finish.notify_one();
    let all = timeout(PATIENCE, running.run).await.expect("an end in time").unwrap().unwrap();
    assert_eq!(of(all), summary(1, 0, 0, 2, 0), "what cannot be cancelled is not waited for");
    drop(release);
    let counts = counts(&client, "q").await;
    assert_eq!((counts.acked, counts.ready, counts.leased, counts.scheduled), (1, 3, 0, 0));
    let mut order = Vec::new();
    while let Some(task) = client.pop("q", Pop::new()).await.unwrap().task {
        assert_eq!((task.failures(), task.expiries()), (0, 0));
        order.push(String::from_utf8_lossy(task.bytes()).into_owned());
    }
    assert_eq!(order.last().map(String::as_str), Some("later"), "{order:?}");
    let deadline = Instant::now() + PATIENCE;
    while !dropped.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "its handler was not cancelled");
        tokio::task::yield_now().await;
    }
}

/// The ack may or may not have come there: nobody says that it did.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_the_server_is_away_ends_and_says_what_was_not_confirmed() {
    let mut server = Server::start(&[]);
    let client = server.client();
    client.insert("q", text("1")).await.unwrap();
    let may_finish = Arc::new(Notify::new());
    let finish = Arc::clone(&may_finish);
    let mut running = run(Worker::new(&client, "q").lease(Duration::from_millis(100)), move |_| {
        let finish = Arc::clone(&finish);
        async move {
            finish.notified().await;
            Ok(())
        }
    });
    running.next("begun", 1).await;
    server.kill();
    may_finish.notify_one();
    assert_eq!(of(running.stop().await), summary(0, 0, 0, 0, 1));
    // The thread behind the worker goes on trying for a while, so the ack may come there yet.
    server.run();
    let deadline = Instant::now() + PATIENCE;
    while counts(&client, "q").await.acked == 0 && client.pop("q", Pop::new()).await.unwrap().task.is_none() {
        assert!(Instant::now() < deadline, "it is lost");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_dropped_gives_its_tasks_back() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    client.insert("q", text("1")).await.unwrap();
    let mut running = run(Worker::new(&client, "q"), |_| pending());
    running.next("begun", 1).await;
    running.run.abort();
    let task = client.pop("q", Pop::new().wait(PATIENCE)).await.unwrap().task.expect("it is back");
    assert_eq!((task.deliveries(), task.failures(), task.expiries()), (2, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_other_try_helps_against_ends_the_run_with_reason_and_field() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    let handler = |_: Assigned| async { Ok::<_, Failure>(()) };
    let error = timeout(PATIENCE, Worker::new(&client, "a b").run(handler)).await.expect("an end").unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("open.queues[0].name")));
    assert!(error.to_string().contains(error.reason().unwrap()) && error.to_string().contains("open.queues[0].name"));
    let error = Worker::new(&client, "q").queue("r", 500).run(handler).await.unwrap_err();
    assert_eq!((error.reason(), error.field()), (Some(reason::CONSUME_INVALID), Some("open.queues[1].weight")));
    let error = Worker::new(&client, "q").concurrency(0).run(handler).await.unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("concurrency")));
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_json_is_a_dead_letter_whose_reason_has_nothing_of_the_value() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    let tasks = [NewTask::json_text("[1, \"a\"]"), NewTask::json_text("\"hush\""), NewTask::bytes("hush")];
    client.insert_many("q", tasks).await.unwrap();
    let handler = json(|(number, letter): (u32, String), task| async move {
        assert_eq!((number, letter.as_str(), task.text()), (1, "a", Some("[1, \"a\"]")));
        Ok::<_, String>(())
    });
    let mut running = run(Worker::new(&client, "q").concurrency(1), handler);
    let reasons: Vec<_> = running.next("rejected", 2).await.into_values().collect();
    assert!(
        reasons.iter().any(|reason| reason.ends_with("it does not fit the type at line 1 column 6")),
        "{reasons:?}"
    );
    assert!(reasons.iter().any(|reason| reason.ends_with("its value is bytes, not JSON")), "{reasons:?}");
    assert_eq!(of(running.stop().await), summary(1, 0, 2, 0, 0));
    let dead = errors(&client, "q", TaskState::Dead).await;
    assert!(dead.len() == 2 && dead.values().all(|reason| !reason.contains("hush")), "{dead:?}");
}

async fn send(producer: &Producer, key: &str) -> Receipt {
    producer.send(text(key).unique_key(key)).await.unwrap()
}

/// G3: what is sent while the server is away is there once when it is back, and each receipt tells which task that is.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_of_one_task_tells_its_id_and_whether_it_was_there_over_a_restart() {
    let mut server = Server::start(&[]);
    let client = server.client();
    let producer = client.producer("q").deadline(PATIENCE).build().unwrap();
    let first = send(&producer, "a").await.one().await.unwrap();
    assert!(!first.duplicate);
    let under_way = send(&producer, "b").await;
    server.kill();
    let (new, known) = (send(&producer, "c").await, send(&producer, "a").await);
    server.run();
    let (under_way, new) = (under_way.one().await.unwrap(), new.one().await.unwrap());
    let known = known.one().await.unwrap();
    assert!(!under_way.duplicate && !new.duplicate && known.duplicate);
    assert_eq!(known.id, first.id);
    assert_eq!(counts(&client, "q").await.inserted, 3);
    let two = producer.send_many(["d", "e"].map(text)).await.unwrap();
    assert_eq!(two.one().await.unwrap_err().kind(), ErrorKind::Internal);
}
