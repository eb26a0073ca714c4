//! The producer against the real server, which is found beside this test's own executable: `cargo build --workspace --bins`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use data_queue_client::{Client, ErrorKind, NewTask, Pop, PopBatch, Producer, Receipt};
use futures_util::{FutureExt, future::join_all};
use tokio::{
    sync::watch,
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
        let name = format!("data-queue-producer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
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

fn text(number: usize) -> NewTask {
    NewTask::json_text(number.to_string())
}

/// The ids and values of all tasks that are there, in order.
async fn all_tasks(client: &Client, queue: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    loop {
        let mut tasks = client.pop_batch(queue, PopBatch::new(1_000)).await.unwrap();
        let before = all.len();
        while let Some(task) = tasks.next().await {
            let task = task.unwrap();
            all.push((task.id().to_owned(), task.text().unwrap_or_default().to_owned()));
        }
        if all.len() == before {
            return all;
        }
    }
}

async fn only_id(receipt: Receipt) -> String {
    let tasks = timeout(PATIENCE, receipt).await.expect("an answer in time").expect("no error");
    assert_eq!(tasks.len(), 1);
    tasks.into_iter().next().unwrap().id
}

/// G1, G3: the server is killed and started again while 10,000 tasks are sent: all are there, once and in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_and_doubles_nothing() {
    const TASKS: usize = 10_000;
    const KILLS: usize = 5;
    let mut server = Server::start(&[]);
    let client = server.client();
    let producer = client.producer("q").deadline(PATIENCE).build().unwrap();
    let (count, mut sent) = watch::channel(0);
    let sending = tokio::spawn(async move {
        let mut receipts = Vec::new();
        for number in 0..TASKS {
            receipts.push(producer.send(text(number)).await.unwrap());
            count.send_replace(number);
        }
        producer.flush().await.unwrap();
        join_all(receipts.into_iter().map(only_id)).await
    });
    for kill in 1..=KILLS {
        // When so many are under way, or done.
        sent.wait_for(|sent| *sent >= TASKS / (KILLS + 1) * kill).await.unwrap();
        server.kill();
        server.run();
    }
    let ids = timeout(PATIENCE, sending).await.expect("an end in time").unwrap();
    let tasks = all_tasks(&server.client(), "q").await;
    assert_eq!(tasks.len(), TASKS);
    for (number, (id, value)) in tasks.iter().enumerate() {
        assert_eq!((id, value), (&ids[number], &number.to_string()));
    }
}

/// A task that is refused for its content fails alone; those around it keep their order.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_fails_alone() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    let producer = client.producer("q").build().unwrap();
    let (mut receipts, mut refused) = (BTreeMap::new(), Vec::new());
    for number in 0..200 {
        receipts.insert(number, producer.send(text(number)).await.unwrap());
        if number % 50 == 7 {
            refused.push((producer.send(NewTask::json_text("{")).await.unwrap(), ErrorKind::InvalidArgument));
        }
        if number % 100 == 70 {
            let large = (0..5).map(|_| NewTask::bytes(vec![0; 1 << 20]));
            refused.push((producer.send_many(large).await.unwrap(), ErrorKind::MessageTooLarge));
            refused.push((producer.send_many([]).await.unwrap(), ErrorKind::InvalidArgument));
        }
    }
    for (receipt, kind) in refused {
        let error = timeout(PATIENCE, receipt).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    let mut ids = Vec::new();
    for (_, receipt) in receipts {
        ids.push(only_id(receipt).await);
    }
    let tasks = all_tasks(&client, "q").await;
    assert_eq!(tasks.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>(), ids);
    assert!(tasks.iter().enumerate().all(|(number, (_, value))| *value == number.to_string()));
}

/// Without a server an insert ends with its deadline, and the producer goes on when there is one.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_says_that_it_may_have_been_done() {
    let mut server = Server::reserve(&["--store", "memory"]);
    let client = server.client();
    let producer = client.producer("q").deadline(Duration::from_millis(300)).max_inserts(2).build().unwrap();
    let first = producer.send(text(0)).await.unwrap();
    drop(producer.send(text(1)).await.unwrap());
    let error = timeout(PATIENCE, first).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    assert!(error.to_string().contains("may have been done"), "{error}");
    // Whose receipt was dropped is told by the flush, once.
    let error = timeout(PATIENCE, producer.flush()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    producer.flush().await.unwrap();

    server.run();
    let deadline = Instant::now() + PATIENCE;
    loop {
        if producer.send(text(2)).await.unwrap().await.is_ok() {
            break;
        }
        assert!(Instant::now() < deadline, "it does not go on");
    }
    let last = all_tasks(&client, "q").await.pop().unwrap();
    assert_eq!(last.1, "2");
}

/// What failed while its receipt was there, unread, is told by the flush after it was dropped, and by the one that waits.
#[tokio::test]
async fn an_error_that_nobody_read_is_not_lost() {
    let server = Server::start(&["--store", "memory"]);
    let producer = server.client().producer("q").build().unwrap();
    let receipt = producer.send(NewTask::json_text("{")).await.unwrap();
    timeout(PATIENCE, producer.flush()).await.unwrap().expect("whoever has the receipt may still read it");
    drop(receipt);
    let error = timeout(PATIENCE, producer.flush()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    producer.flush().await.unwrap();

    drop(producer.send(NewTask::json_text("{")).await.unwrap());
    let mut abandoned = Box::pin(producer.flush());
    assert!(abandoned.as_mut().now_or_never().is_none(), "the worker has not run meanwhile");
    // Answered behind the flush, so the flush was answered too, and not looked at.
    only_id(producer.send(text(1)).await.unwrap()).await;
    drop(abandoned);
    let error = timeout(PATIENCE, producer.close()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

/// There is never more under way than is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_room_is_not_sent() {
    let server = Server::reserve(&["--store", "memory"]);
    let producer = |builder: data_queue_client::ProducerBuilder| builder.deadline(PATIENCE).build().unwrap();
    for (producer, fits) in [
        (producer(server.client().producer("q").max_inserts(3)), 3),
        (producer(server.client().producer("q").max_bytes(1 << 20)), 10),
    ] {
        let task = || NewTask::bytes(vec![0; 100_000]);
        for _ in 0..fits {
            drop(producer.send(task()).await.unwrap());
        }
        assert!(producer.send(task()).now_or_never().is_none(), "a further one was taken");
    }
}

/// A store without room is tried again until there is some.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_waited_for() {
    const TASKS: usize = 40;
    let server = Server::start(&["--store", "memory", "--memory-capacity", "1000000"]);
    let client = server.client();
    let producer = client.producer("q").deadline(PATIENCE).build().unwrap();
    let mut receipts = Vec::new();
    for number in 0..TASKS {
        let task = NewTask::bytes(vec![0; 64 << 10]).header("number", number.to_string());
        receipts.push(producer.send(task).await.unwrap());
    }
    let next = Pop::new().wait(PATIENCE);
    for number in 0..TASKS {
        let task = client.pop("q", next.clone()).await.unwrap().task.expect("a task");
        assert_eq!(task.headers()["number"], number.to_string());
        client.ack(&task).await.unwrap();
    }
    join_all(receipts.into_iter().map(only_id)).await;
    assert!(client.pop("q", Pop::new()).await.unwrap().task.is_none());
}

/// What is about the stream and not about an insert fails those that are under way, with its reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_none_fails_all() {
    let server = Server::start(&["--store", "memory"]);
    let producer = server.client().producer("a b").build().unwrap();
    for number in 0..3 {
        let error = timeout(PATIENCE, producer.send(text(number)).await.unwrap()).await.unwrap().unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("open.queue")));
    }
}

/// All that was sent before is in when a producer is closed, and nothing is sent after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_producer_has_sent_all_and_sends_no_more() {
    let server = Server::start(&["--store", "memory"]);
    let client = server.client();
    let producer = client.producer("q").build().unwrap();
    let clone: Producer = producer.clone();
    for number in 0..100 {
        drop(producer.send(text(number)).await.unwrap());
    }
    timeout(PATIENCE, producer.close()).await.unwrap().unwrap();
    assert_eq!(all_tasks(&client, "q").await.len(), 100);
    assert_eq!(clone.send(text(100)).await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(clone.flush().await.unwrap_err().kind(), ErrorKind::Refused);

    // One that is only dropped does what it was given.
    let producer = client.producer("dropped").build().unwrap();
    let receipt = producer.send(text(1)).await.unwrap();
    drop((producer, clone));
    only_id(receipt).await;
}
