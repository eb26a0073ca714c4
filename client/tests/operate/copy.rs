//! `data-queue copy`: queues go between real servers, also while these and it are killed.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use data_queue_client::{Client, Consumer, NewTask, Page, Pop, Putback, SettingsUpdate, TaskInfo, TaskState};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::server::{PATIENCE, Ran, Server, binary};

const STATES: [TaskState; 3] = [TaskState::Dead, TaskState::Scheduled, TaskState::Ready];

/// A redis-server of a test's own.
struct Redis {
    process: Child,
    url: String,
    _folder: TempDir,
}

impl Redis {
    async fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let folder = TempDir::new().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        let process = command.current_dir(folder.path()).stdout(Stdio::null()).spawn().expect("redis-server");
        let (start, address) = (Instant::now(), format!("127.0.0.1:{port}"));
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(start.elapsed() < PATIENCE, "redis-server does not listen");
            sleep(Duration::from_millis(10)).await;
        }
        Self { process, url: format!("redis://{address}"), _folder: folder }
    }

    fn server(&self) -> Server {
        Server::start(&["--store", &self.url])
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn copying(from: &str, to: &str, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(["copy", "--from", from, "--to", to]).args(more).stdin(Stdio::null());
    command
}

fn copy(from: &Server, to: &Server, more: &[&str]) -> Ran {
    Ran::of(copying(&from.address, &to.address, more).output().unwrap())
}

async fn listed(client: &Client, state: TaskState) -> Vec<TaskInfo> {
    let (admin, mut tasks, mut next) = (client.admin(), Vec::new(), Some(Page::first().size(200)));
    while let Some(page) = next {
        let found = admin.list_tasks("q", state, &page).await.unwrap();
        tasks.extend(found.items);
        next = found.next;
    }
    tasks
}

/// All that goes with a task; ids are new.
async fn all(client: &Client) -> Vec<TaskInfo> {
    let mut tasks = Vec::new();
    for state in STATES {
        tasks.extend(listed(client, state).await.into_iter().map(|mut task| {
            task.id.clear();
            task
        }));
    }
    tasks
}

async fn counts(client: &Client) -> [u64; 4] {
    let counts = client.admin().get_queue("q").await.unwrap().counts;
    [counts.ready, counts.scheduled, counts.leased, counts.dead]
}

async fn insert(client: &Client, range: std::ops::Range<u32>) {
    let tasks: Vec<_> = range.map(|n| NewTask::json(&n).unwrap()).collect();
    for tasks in tasks.chunks(1_000) {
        client.insert_many("q", tasks.to_vec()).await.unwrap();
    }
}

async fn ready_numbers(client: &Client) -> Vec<u32> {
    let number = |task: TaskInfo| match task.value {
        data_queue_client::TaskValue::Json(text) => text.parse().unwrap(),
        data_queue_client::TaskValue::Bytes(_) => panic!("not JSON"),
    };
    listed(client, TaskState::Ready).await.into_iter().map(number).collect()
}

/// Tasks with all that a task can have.
async fn fill(client: &Client) {
    let update = SettingsUpdate::new().lease(Duration::from_secs(77)).max_tasks(100_000).max_failures(3);
    let update = update.backoff_min(Duration::from_secs(3_600)).dead_letter_retention(Duration::from_secs(86_400));
    client.admin().update_queue("q", update).await.unwrap();
    let put = |task| client.insert("q", task);
    put(NewTask::json_text("{\"to\": \"é\"}").header("k", "v").priority(3)).await.unwrap();
    put(NewTask::bytes(vec![0, 255, 10]).priority(9).ttl(Duration::from_secs(7_200))).await.unwrap();
    put(NewTask::json_text("2").delay(Duration::from_secs(3_600))).await.unwrap();
    put(NewTask::json_text("3").delay(Duration::from_secs(60 * 60 * 24 * 200))).await.unwrap();
    insert(client, 0..450).await;
    put(NewTask::json_text("\"once\"").unique_key("key")).await.unwrap();
    for (options, count) in [
        (Putback::new().failed(true).reason("it failed"), 1),
        (Putback::new().dead_letter(true).reason("no such é"), 2),
        (Putback::new(), 1),
    ] {
        for _ in 0..count {
            let task = client.pop("q", Pop::new()).await.unwrap().task.unwrap();
            client.putback_with(&task, options.clone()).await.unwrap();
        }
    }
    let task = client.pop("q", Pop::new()).await.unwrap().task.unwrap();
    client.putback_held_for("q", Duration::ZERO).await.unwrap();
    assert_eq!(listed(client, TaskState::Ready).await[0].id, task.id());
}

#[tokio::test]
async fn all_that_tasks_have_goes_from_a_file_to_redis_and_back_in_its_order() {
    let (folder, redis) = (TempDir::new().unwrap(), Redis::start().await);
    let one = Server::start(&["--store", &format!("sqlite:{}", folder.path().join("store").display())]);
    let (other, clients) = (redis.server(), one.client());
    fill(&clients).await;
    let before = all(&clients).await;
    let settings = clients.admin().get_queue("q").await.unwrap().settings;
    assert_eq!((before.len(), counts(&clients).await), (455, [450, 3, 0, 2]));

    for (from, to) in [(&one, &other), (&other, &one)] {
        let ran = copy(from, to, &["--all", "-o", "json"]);
        let told = &ran.objects()[0];
        let names = ["queue", "moved", "ready", "scheduled", "dead", "duplicates", "refused", "held"];
        assert_eq!(names.map(|name| told[name].to_string()), ["\"q\"", "455", "450", "3", "2", "0", "0", "0"]);
        let (source, target) = (from.client(), to.client());
        assert_eq!(all(&target).await, before);
        let again = target.insert_many("q", [NewTask::json_text("0").unique_key("key")]).await.unwrap();
        assert!(again.tasks[0].duplicate, "its key is taken there");
        assert_eq!(target.admin().get_queue("q").await.unwrap().settings, settings);
        let source = source.admin().get_queue("q").await.unwrap();
        let left = source.counts;
        assert_eq!((left.ready, left.scheduled, left.dead, left.paused), (0, 0, 0, false));
    }
    let first = clients.pop("q", Pop::new()).await.unwrap().task.unwrap();
    assert!(first.deliveries() > 1 && first.inserted_at() < Some(SystemTime::now()), "{first:?}");
}

/// Kills runs, at first before they did anything, then anywhere. Answers how the last one, which is not killed, ended.
async fn killed(from: &Server, to: &Server) -> Ran {
    let mut kills = 0;
    for wait in [5_u64, 60, 150, 40, 220, 90, 310, 75, 130, 55, 180, 260] {
        let mut child = copying(&from.address, &to.address, &["q"]);
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(wait)).await;
        child.kill().unwrap();
        kills += u32::from(child.wait().unwrap().code().is_none());
    }
    assert!(kills > 0);
    let ran = copy(from, to, &["q"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(counts(&from.client()).await, [0; 4]);
    ran
}

#[tokio::test]
async fn killed_again_and_again_and_run_again_it_loses_and_doubles_nothing() {
    let (folder, redis) = (TempDir::new().unwrap(), Redis::start().await);
    let from = Server::start(&["--store", &format!("sqlite:{}", folder.path().join("store").display())]);
    let (to, source) = (redis.server(), from.client());
    insert(&source, 0..4_000).await;
    let ran = killed(&from, &to).await;
    assert_eq!(ready_numbers(&to.client()).await, (0..4_000).collect::<Vec<_>>());
    // A run that is killed leaves it so, and the next one does not know whose doing it was.
    let is_paused = source.admin().get_queue("q").await.unwrap().counts.paused;
    assert_eq!(is_paused, ran.stderr.contains("still paused"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_it_doubles_nothing_that_a_worker_of_the_target_has_done() {
    let (from, to) = (Server::start(&[]), Redis::start().await);
    let to = (to.server(), to);
    let (source, target) = (from.client(), to.0.client());
    insert(&source, 0..4_000).await;
    let (work, stop) = worker(&target);
    killed(&from, &to.0).await;
    let done = async { while counts(&target).await != [0; 4] {} };
    timeout(PATIENCE, done).await.expect("all is done");
    drop(stop);
    let seen = work.await.unwrap();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), (0..4_000).map(|n| (n, 1)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_target_that_is_killed_and_comes_back_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let store = format!("sqlite:{}", folder.path().join("store").display());
    let (from, mut to) = (Server::start(&[]), Server::start(&["--store", &store]));
    let (source, address) = (from.client(), to.address.clone());
    insert(&source, 0..4_000).await;
    let child = copying(&from.address, &address, &["q"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    for left in [3_500, 2_500, 1_500] {
        let start = Instant::now();
        while counts(&source).await[0] > left {
            assert!(start.elapsed() < PATIENCE, "it does not go on");
        }
        drop(to);
        to = Server::start(&["--store", &store, "--listen", &address]);
    }
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ready_numbers(&to.client()).await, (0..4_000).collect::<Vec<_>>());
    assert_eq!(counts(&source).await, [0; 4]);
}

/// Works on what comes, until nothing comes for a while after it was told to stop.
fn worker(client: &Client) -> (JoinHandle<BTreeMap<u32, u32>>, tokio::sync::oneshot::Sender<()>) {
    let mut consumer: Consumer = client.consumer("q").max_outstanding(20).start().unwrap();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let work = tokio::spawn(async move {
        let mut seen = BTreeMap::new();
        loop {
            tokio::select! {
                task = consumer.next() => {
                    let task = task.unwrap().unwrap();
                    let number = task.json().unwrap();
                    if task.ack().await.is_ok() {
                        *seen.entry(number).or_default() += 1;
                    }
                }
                _ = &mut stopped => break,
            }
        }
        consumer.close().await.unwrap();
        seen
    });
    (work, stop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producers_and_workers_may_be_at_work_meanwhile_and_each_task_is_there_or_done_once() {
    let is_long = std::env::var("DATA_QUEUE_TEST_LONG").is_ok_and(|long| long == "1");
    let (before, all) = if is_long { (1_000_000, 1_020_000) } else { (2_000, 2_300) };
    let (folder, redis) = (TempDir::new().unwrap(), Redis::start().await);
    let from = Server::start(&["--store", &format!("sqlite:{}", folder.path().join("store").display())]);
    let to = redis.server();
    let (source, target) = (from.client(), to.client());
    insert(&source, 0..before).await;
    let (old, stop_old) = worker(&source);
    let (new, stop_new) = worker(&target);
    let producing = {
        let client = source.clone();
        tokio::spawn(async move {
            for n in before..all {
                client.insert("q", NewTask::json(&n).unwrap()).await.unwrap();
            }
        })
    };
    let start = Instant::now();
    let command = copying(&from.address, &to.address, &["q"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let ran = tokio::task::spawn_blocking(move || Ran::of(command.unwrap().wait_with_output().unwrap())).await.unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let took = start.elapsed();
    producing.await.unwrap();
    let left = async {
        // What was inserted after the end of the copy is the old worker's.
        while counts(&source).await != [0; 4] {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, left).await.expect("the source is empty");
    drop((stop_old, stop_new));
    let mut seen = old.await.unwrap();
    let there = new.await.unwrap();
    assert!(!there.is_empty());
    println!("{} in {took:?}: {} done at the source, {} at the target", ran.stdout.trim(), seen.len(), there.len());
    let left = ready_numbers(&target).await.into_iter().map(|number| (number, 1));
    for (number, times) in there.into_iter().chain(left) {
        *seen.entry(number).or_default() += times;
    }
    assert_eq!(seen.len(), all as usize);
    assert!(seen.values().all(|times| *times == 1), "{:?}", seen.iter().filter(|seen| *seen.1 > 1));
    assert_eq!(counts(&target).await[1..], [0; 3]);
}

#[tokio::test]
async fn what_cannot_go_stays_and_is_told() {
    let (from, to) = (Server::start(&[]), Server::start(&["--max-value", "1000"]));
    let (source, target) = (from.client(), to.client());
    target.insert("q", NewTask::json_text("0").unique_key("key")).await.unwrap();
    source.insert("q", NewTask::json_text("1").priority(9)).await.unwrap();
    source.pop("q", Pop::new()).await.unwrap().task.unwrap();
    source.insert("q", NewTask::json_text("2").unique_key("key")).await.unwrap();
    let large = source.insert("q", NewTask::bytes(vec![7; 2_000])).await.unwrap();
    insert(&source, 10..20).await;
    let ran = copy(&from, &to, &["q", "--wait", "300ms"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.starts_with("q\t10\t10\t0\t0\t1\t1\t1\t"), "{ran:?}");
    for words in ["their unique keys", "refused", "workers that hold", &large] {
        assert!(ran.stderr.contains(words), "{words}: {ran:?}");
    }
    assert_eq!(counts(&source).await, [2, 0, 1, 0]);
    assert!(!source.admin().get_queue("q").await.unwrap().counts.paused);
    assert_eq!(ready_numbers(&target).await, [0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]);
}

#[tokio::test]
async fn all_goes_whether_anybody_reads_of_it_or_not() {
    for is_full in [false, true] {
        let (from, to) = (Server::start(&[]), Server::start(&[]));
        let (source, target) = (from.client(), to.client());
        for queue in ["a", "b"] {
            source.insert(queue, NewTask::json_text("1")).await.unwrap();
        }
        let (reader, unread) = std::io::pipe().unwrap();
        drop(reader);
        let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
        let stdout = if is_full { Stdio::from(full()) } else { Stdio::from(unread) };
        let mut command = copying(&from.address, &to.address, &["--all"]);
        let ran = Ran::of(command.stdout(stdout).stderr(Stdio::piped()).output().unwrap());
        if is_full {
            ran.refused(1, &["cannot write to stdout: No space left on device"]);
        } else {
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
        }
        for queue in ["a", "b"] {
            assert_eq!(target.admin().get_queue(queue).await.map(|queue| queue.counts.ready).unwrap_or_default(), 1);
        }
    }
}

/// What stays behind is told on stderr, and by the exit code.
#[tokio::test]
async fn what_cannot_go_is_told_though_nobody_reads_of_the_rest() {
    let (from, to) = (Server::start(&[]), Server::start(&["--max-value", "1000"]));
    from.client().insert("q", NewTask::bytes(vec![7; 2_000])).await.unwrap();
    let (reader, stdout) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = copying(&from.address, &to.address, &["q"]);
    let ran = Ran::of(command.stdout(stdout).stderr(Stdio::piped()).output().unwrap());
    assert!(ran.code == Some(1) && ran.stderr.contains("1 task stays"), "{ran:?}");
}

#[tokio::test]
async fn held_tasks_are_waited_for_and_go_when_they_come_back() {
    let (from, to) = (Server::start(&[]), Server::start(&[]));
    let (source, target) = (from.client(), to.client());
    insert(&source, 0..3).await;
    let acked = source.pop("q", Pop::new()).await.unwrap().task.unwrap();
    let failed = source.pop("q", Pop::new()).await.unwrap().task.unwrap();
    source.admin().pause("q").await.unwrap();
    let command = copying(&from.address, &to.address, &["q", "--wait", "10m"]).stdout(Stdio::piped()).spawn().unwrap();
    let there = async { while target.admin().get_queue("q").await.is_err() || counts(&target).await[0] < 1 {} };
    timeout(PATIENCE, there).await.expect("what is not held goes at once");
    source.ack(&acked).await.unwrap();
    source.fail(&failed, "not now").await.unwrap();
    assert_eq!(command.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!((counts(&source).await, counts(&target).await), ([0; 4], [1, 1, 0, 0]));
    let scheduled = &listed(&target, TaskState::Scheduled).await[0];
    assert_eq!((scheduled.failures, scheduled.last_error.as_str()), (1, "not now"));
    // It was paused before, so it stays so.
    assert!(source.admin().get_queue("q").await.unwrap().counts.paused);
}

#[tokio::test]
async fn a_signal_ends_it_after_the_tasks_under_way_and_the_source_delivers_again() {
    let (from, to) = (Server::start(&[]), Server::start(&[]));
    let (source, target) = (from.client(), to.client());
    insert(&source, 0..20_000).await;
    let mut command = copying(&from.address, &to.address, &["q"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let began = async { while target.admin().get_queue("q").await.is_err() || counts(&target).await[0] < 1 {} };
    timeout(PATIENCE, began).await.expect("it begins");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert!(ran.code == Some(1) && ran.stderr.contains("run it again"), "{ran:?}");
    let (left, gone) = (counts(&source).await, counts(&target).await);
    assert!(left[0] > 0 && left[0] + gone[0] == 20_000, "{left:?} {gone:?}");
    assert!(!source.admin().get_queue("q").await.unwrap().counts.paused);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_before_anything_goes() {
    let redis = Redis::start().await;
    let (from, to) = (redis.server(), Server::start(&[]));
    let source = from.client();
    insert(&source, 0..3).await;
    copy(&from, &from, &["q"]).refused(64, &["same server"]);
    copy(&from, &to, &[]).refused(64, &["QUEUE"]);
    copy(&from, &to, &["other"]).refused(1, &["no queue other"]);
    // Two servers of one store.
    let twin = redis.server();
    let ran = copy(&from, &twin, &["q"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("same store"), "{ran:?}");
    assert_eq!((counts(&source).await, ready_numbers(&source).await), ([3, 0, 0, 0], vec![0, 1, 2]));

    let target = to.client();
    insert(&target, 7..8).await;
    target.admin().update_queue("q", SettingsUpdate::new().max_failures(7)).await.unwrap();
    let ran = copy(&from, &to, &["q"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("--force"), "{ran:?}");
    assert_eq!(counts(&source).await, [3, 0, 0, 0]);
    assert!(!source.admin().get_queue("q").await.unwrap().counts.paused);
    let ran = copy(&from, &to, &["q", "--force"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ready_numbers(&target).await, [7, 0, 1, 2]);
    assert_eq!(target.admin().get_queue("q").await.unwrap().settings.unwrap().max_failures, None);
}
