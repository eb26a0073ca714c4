//! `data-queue work`: real commands for real tasks.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStderr, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use data_queue_client::{Client, NewTask, Page, QueueCounts, SettingsUpdate, TaskInfo, TaskState};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::server::{PATIENCE, Ran, Server, command, ended};

/// Waits until it is so.
#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}: not in time");
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// A `work` that runs, and what it says on stderr.
struct Working {
    child: Child,
    said: Receiver<String>,
}

impl Working {
    fn start(address: &str, line: &[&str]) -> Self {
        let mut command = command(address, line);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let said = lines(child.stderr.take().unwrap());
        Self { child, said }
    }

    /// Waits for a line that has these words.
    #[track_caller]
    fn says(&self, words: &str) -> String {
        let start = Instant::now();
        loop {
            let line = self.said.recv_timeout(PATIENCE.saturating_sub(start.elapsed())).expect(words);
            if line.contains(words) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end; answers its exit code and its last line.
    fn ended(mut self) -> (Option<i32>, String) {
        let mut stdout = self.child.stdout.take().unwrap();
        let reading = thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        let code = self.child.wait().unwrap().code();
        reading.join().unwrap().unwrap();
        (code, self.said.iter().last().unwrap_or_default())
    }
}

fn lines(stderr: ChildStderr) -> Receiver<String> {
    let (sender, said) = channel();
    thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    said
}

async fn insert(client: &Client, count: usize) {
    let tasks: Vec<_> = (0..count).map(|n| NewTask::json(&n).unwrap()).collect();
    for tasks in tasks.chunks(1_000) {
        client.insert_many("q", tasks.to_vec()).await.unwrap();
    }
}

async fn counts(client: &Client) -> QueueCounts {
    client.admin().get_queue("q").await.unwrap().counts
}

async fn listed(client: &Client, state: TaskState) -> Vec<TaskInfo> {
    client.admin().list_tasks("q", state, &Page::first().size(200)).await.unwrap().items
}

/// Whether a process of this number runs.
fn is_alive(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

fn numbers(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect()
}

fn summary(ran: &Ran) -> &str {
    ran.stderr.lines().last().unwrap_or_default()
}

const SCRIPT: &str = r#"#!/bin/sh
# Every twentieth address is wrong.
read -r n
echo "took $n, delivery $DATA_QUEUE_DELIVERIES after $DATA_QUEUE_FAILURES failures"
if [ $((n % 20)) = 7 ]; then
    echo "looking up $n" >&2
    echo "no such address: $n" >&2
    exit 3
fi
echo "$n" >> "$DONE"
"#;

#[tokio::test]
async fn a_script_works_on_a_thousand_tasks_and_each_is_counted_once() {
    let server = Server::start(&[]);
    let client = server.client();
    let folder = TempDir::new().unwrap();
    let (script, done) = (folder.path().join("work.sh"), folder.path().join("done"));
    fs::write(&script, SCRIPT).unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    insert(&client, 1_000).await;
    let update = SettingsUpdate::new().max_failures(2).backoff_min(Duration::ZERO).backoff_max(Duration::ZERO);
    client.admin().update_queue("q", update).await.unwrap();

    let mut command = server.command(&["work", "q", "--until-empty", "--concurrency", "8", "--"]);
    let ran = Ran::of(command.arg(&script).env("DONE", &done).stdin(Stdio::null()).output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(summary(&ran), "data-queue: 950 done, 100 failed, 0 rejected, 0 given back, 0 lost");
    let all: BTreeSet<_> = numbers(&done).into_iter().collect();
    assert_eq!((numbers(&done).len(), all.len()), (950, 950));
    assert!(all.iter().all(|n| n % 20 != 7));
    assert_eq!(ran.stdout.lines().filter(|line| line.ends_with("delivery 1 after 0 failures")).count(), 1_000);
    assert_eq!(ran.stdout.lines().filter(|line| line.ends_with("delivery 2 after 1 failures")).count(), 50);

    let counts = counts(&client).await;
    assert_eq!((counts.acked, counts.dead, counts.ready, counts.scheduled, counts.leased), (950, 50, 0, 0, 0));
    let dead = listed(&client, TaskState::Dead).await;
    assert!(dead.iter().all(|task| (task.deliveries, task.failures, task.expiries) == (2, 2, 0)), "{dead:?}");
    let reasons: BTreeSet<_> = dead.into_iter().map(|task| task.last_error).collect();
    assert_eq!(reasons.len(), 50);
    assert!(reasons.contains("exit code 3: looking up 987\nno such address: 987"), "{reasons:?}");
}

#[tokio::test]
async fn a_code_that_was_named_rejects_and_a_signal_fails() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 3).await;
    let script = "read n; echo about $n >&2; [ $n = 0 ] && exit 65; [ $n = 1 ] && kill -9 $$; exit 66";
    let ran = server.run(&["work", "q", "--max-tasks", "3", "--reject-code", "65", "--", "sh", "-c", script]);
    assert_eq!(summary(&ran), "data-queue: 0 done, 2 failed, 1 rejected, 0 given back, 0 lost");
    let dead = listed(&client, TaskState::Dead).await;
    assert_eq!((dead.len(), dead[0].last_error.as_str()), (1, "exit code 65: about 0"));
    let failed = listed(&client, TaskState::Scheduled).await;
    let reasons: Vec<_> = failed.iter().map(|task| (task.failures, task.last_error.as_str())).collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons.contains(&(1, "killed by signal: 9 (SIGKILL): about 1")), "{reasons:?}");
    assert!(reasons.contains(&(1, "exit code 66: about 2")), "{reasons:?}");
}

#[tokio::test]
async fn a_command_knows_its_task_and_headers_of_an_outer_one_are_not_seen() {
    let server = Server::start(&[]);
    let task = NewTask::json_text("1").header("trace-id", "7; rm").header("a.b", "1").header("A_B", "2");
    let id = server.client().insert("q", task).await.unwrap();
    let mut command = server.command(&["work", "q", "--max-tasks", "1", "--", "env"]);
    // What the tests themselves are told goes to nobody.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DATA_QUEUE_TEST_") || name == "DATA_QUEUE_SERVER" {
            command.env_remove(name);
        }
    }
    command.env("DATA_QUEUE_HEADER_OUTER", "x").env("DATA_QUEUE_ID", "other").stdin(Stdio::null());
    let ran = Ran::of(command.output().unwrap());
    let mut variables: Vec<_> = ran.stdout.lines().filter(|line| line.starts_with("DATA_QUEUE_")).collect();
    variables.sort_unstable();
    let (address, id) = (format!("DATA_QUEUE_ADDR={}", server.address), format!("DATA_QUEUE_ID={id}"));
    let header = "DATA_QUEUE_HEADER_TRACE_ID=7; rm";
    let expected = [&address, "DATA_QUEUE_DELIVERIES=1", "DATA_QUEUE_FAILURES=0", header, &id, "DATA_QUEUE_QUEUE=q"];
    assert_eq!(variables, expected);
}

#[tokio::test]
async fn past_its_deadline_all_of_a_command_ends_even_if_it_does_not_want_to() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1).await;
    let folder = TempDir::new().unwrap();
    let pids = folder.path().join("pids");
    let script = "trap '' TERM; sleep 1000 & echo $$ $! > \"$1\"; echo begun >&2; while :; do sleep 1000; done";
    let ran = server.run(&[
        "work",
        "q",
        "--max-tasks",
        "1",
        "--deadline",
        "500ms",
        "--",
        "sh",
        "-c",
        script,
        "sh",
        pids.to_str().unwrap(),
    ]);
    assert_eq!(summary(&ran), "data-queue: 0 done, 1 failed, 0 rejected, 0 given back, 0 lost", "{ran:?}");
    let pids = fs::read_to_string(pids).unwrap();
    assert!(pids.split_whitespace().count() == 2 && !pids.split_whitespace().any(is_alive), "{pids}");
    let failed = listed(&client, TaskState::Scheduled).await;
    assert_eq!(failed[0].last_error, "deadline of 500ms passed: begun");
}

#[tokio::test]
async fn what_a_command_leaves_behind_ends_with_it() {
    let server = Server::start(&[]);
    insert(&server.client(), 1).await;
    let script = "sleep 1000 > /dev/null 2>&1 & echo $!";
    let ran = server.run(&["work", "q", "--max-tasks", "1", "--", "sh", "-c", script]);
    assert_eq!(summary(&ran), "data-queue: 1 done, 0 failed, 0 rejected, 0 given back, 0 lost");
    until("the sleep ends", || !is_alive(&ran.stdout));
}

#[tokio::test]
async fn a_task_that_is_deleted_ends_its_command_and_is_gone() {
    let server = Server::start(&[]);
    let client = server.client();
    let id = client.insert("q", NewTask::json_text("1")).await.unwrap();
    let line = ["work", "q", "--max-tasks", "1", "--lease", "1s", "--", "sh", "-c", "echo begun >&2; sleep 1000"];
    let working = Working::start(&server.address, &line);
    working.says("begun");
    assert_eq!(server.good(&["delete", "q", &id, "--yes"]), format!("{id}\tcancelled\n"));
    working.says("ended, since the task was deleted");
    let (code, last) = working.ended();
    assert_eq!((code, last.as_str()), (Some(0), "data-queue: 0 done, 0 failed, 0 rejected, 1 given back, 0 lost"));
    let counts = counts(&client).await;
    assert_eq!((counts.deleted, counts.ready, counts.leased, counts.acked), (1, 0, 0, 0));
}

#[tokio::test]
async fn a_task_whose_lease_is_lost_ends_its_command_and_is_not_acked() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1).await;
    let line = ["work", "q", "--max-tasks", "1", "--lease", "1s", "--", "sh", "-c", "echo begun >&2; sleep 1000"];
    let working = Working::start(&server.address, &line);
    working.says("begun");
    assert_eq!(client.putback_held_for("q", Duration::ZERO).await.unwrap(), 1);
    let (code, last) = working.ended();
    assert_eq!((code, last.as_str()), (Some(0), "data-queue: 0 done, 0 failed, 0 rejected, 0 given back, 1 lost"));
    assert_eq!((counts(&client).await.ready, counts(&client).await.acked), (1, 0));
}

#[tokio::test]
async fn sigterm_lets_what_runs_finish_and_takes_no_more() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 2).await;
    let folder = TempDir::new().unwrap();
    let go = folder.path().join("go");
    let script = "echo begun >&2; until [ -e \"$1\" ]; do sleep 0.02; done";
    let line = ["work", "q", "--grace", "10m", "--", "sh", "-c", script, "sh", go.to_str().unwrap()];
    let working = Working::start(&server.address, &line);
    working.says("begun");
    working.signal(Signal::TERM);
    working.says("ends: ");
    fs::write(go, "").unwrap();
    let (code, last) = working.ended();
    assert_eq!((code, last.as_str()), (Some(0), "data-queue: 1 done, 0 failed, 0 rejected, 0 given back, 0 lost"));
    let left = listed(&client, TaskState::Ready).await;
    assert_eq!((left.len(), left[0].deliveries, counts(&client).await.acked), (1, 0, 1));
}

#[tokio::test]
async fn past_the_grace_or_at_a_second_signal_commands_end_and_tasks_are_given_back_uncounted() {
    for (grace, signals) in [("0s", &[Signal::TERM][..]), ("10m", &[Signal::INT, Signal::TERM])] {
        let server = Server::start(&[]);
        let client = server.client();
        insert(&client, 2).await;
        let line =
            ["work", "q", "--concurrency", "2", "--grace", grace, "--", "sh", "-c", "sleep 1000 & echo $! >&2; wait"];
        let working = Working::start(&server.address, &line);
        let sleeping = [working.says(""), working.says("")];
        working.signal(signals[0]);
        working.says("ends: ");
        signals[1..].iter().for_each(|signal| working.signal(*signal));
        let (code, last) = working.ended();
        assert_eq!((code, last.as_str()), (Some(0), "data-queue: 0 done, 0 failed, 0 rejected, 2 given back, 0 lost"));
        until("the commands end", || !sleeping.iter().any(|pid| is_alive(pid)));
        let left = listed(&client, TaskState::Ready).await;
        assert!(left.len() == 2 && left.iter().all(|task| (task.failures, task.expiries) == (0, 0)), "{left:?}");
    }
}

#[tokio::test]
async fn a_command_that_is_not_there_takes_no_task() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1).await;
    server.run(&["work", "q", "--", "no-such-command"]).refused(64, &["no-such-command", "no task was taken"]);
    server.run(&["work", "q", "--", "/etc/passwd", "x"]).refused(64, &["/etc/passwd"]);
    server.run(&["work", "q", "cat"]).refused(64, &["CMD"]);
    server.run(&["work", "q", "--deadline", "0s", "--", "cat"]).refused(64, &["longer than 0s"]);
    assert_eq!(listed(&client, TaskState::Ready).await[0].deliveries, 0);
    // What is found may be no program nevertheless: no task is counted as failed for it.
    let folder = TempDir::new().unwrap();
    let broken = folder.path().join("broken");
    fs::write(&broken, "#!/no/such/shell\n").unwrap();
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ran = server.run(&["work", "q", "--", broken.to_str().unwrap()]);
    assert!(ran.code == Some(1) && summary(&ran).contains("cannot run"), "{ran:?}");
    let left = listed(&client, TaskState::Ready).await;
    assert_eq!((left.len(), left[0].failures), (1, 0));
    server.run(&["work", "no/such queue", "--", "cat"]).code.filter(|code| *code == 1).expect("the server refuses");
}

#[tokio::test]
async fn a_server_that_comes_late_and_is_killed_in_the_middle_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let (store, done) = (format!("sqlite:{}", folder.path().join("store").display()), folder.path().join("done"));
    let server = Server::start(&["--store", &store]);
    let address = server.address.clone();
    insert(&server.client(), 300).await;
    drop(server);

    let script = "read n; echo $n begun; sleep 0.01; echo $n >> \"$1\"";
    let line =
        ["work", "q", "--until-empty", "--concurrency", "4", "--", "sh", "-c", script, "sh", done.to_str().unwrap()];
    let working = Working::start(&address, &line);
    working.says("waits for the server");
    let again = || Server::start(&["--store", &store, "--listen", &address]);
    let mut server = again();
    for part in 1..=3 {
        until("tasks are done", || numbers(&done).len() >= 60 * part);
        drop(server);
        server = again();
    }
    let (code, last) = working.ended();
    assert_eq!(code, Some(0), "{last}");
    // What ended while the server was away is acked when it is back, unless its lease has run out by then.
    let all: BTreeSet<_> = numbers(&done).into_iter().collect();
    assert_eq!(all.len(), 300);
    let counts = counts(&server.client()).await;
    assert_eq!((counts.acked, counts.ready, counts.scheduled, counts.leased, counts.dead), (300, 0, 0, 0, 0));
    assert!(last.contains(" 0 failed, 0 rejected, 0 given back"), "{last}");
}

#[tokio::test]
async fn a_value_need_not_be_read_and_comes_whole_if_it_is() {
    let server = Server::start(&[]);
    let client = server.client();
    for _ in 0..2 {
        client.insert("q", NewTask::bytes(vec![0xff; 1_000_000])).await.unwrap();
    }
    let ran = server.run(&["work", "q", "--max-tasks", "1", "--", "true"]);
    assert_eq!(summary(&ran), "data-queue: 1 done, 0 failed, 0 rejected, 0 given back, 0 lost");
    let ran = server.run(&["work", "q", "--max-tasks", "1", "--", "sh", "-c", "wc -c; printf 'no end'"]);
    assert_eq!(ran.stdout, "1000000\nno end\n");
    assert_eq!(counts(&client).await.acked, 2);
}

#[tokio::test]
async fn it_ends_when_nobody_reads_what_commands_say() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1_000).await;
    let mut working = Working::start(&server.address, &["work", "q", "--", "cat"]);
    let mut stdout = BufReader::new(working.child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    drop(stdout);
    assert_eq!(working.child.wait().unwrap().code(), Some(0));
    let counts = counts(&client).await;
    assert!(counts.leased == 0 && counts.ready > 0 && counts.ready + counts.acked == 1_000, "{counts:?}");
}

#[tokio::test]
async fn it_ends_at_a_disk_that_is_full_and_says_so() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1_000).await;
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = server.command(&["work", "q", "--", "cat"]);
    let ran = Ran::of(command.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).output().unwrap());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(summary(&ran).contains("cannot write to stdout: No space left on device"), "{ran:?}");
    let counts = counts(&client).await;
    assert!(counts.leased == 0 && counts.ready > 0 && counts.ready + counts.acked == 1_000, "{counts:?}");
}

/// More is said than pipes and lines that wait have room for, and whoever should read it has stopped.
#[tokio::test]
async fn a_reader_that_hangs_does_not_keep_it_from_ending() {
    let server = Server::start(&[]);
    let client = server.client();
    insert(&client, 1).await;
    let folder = TempDir::new().unwrap();
    let much = folder.path().join("much");
    let script = "line=$(head -c 4095 /dev/zero | tr '\\0' x); yes $line | head -n 285; : > \"$1\"; yes $line";
    let line = ["work", "q", "--grace", "10m", "--", "sh", "-c", script, "sh", much.to_str().unwrap()];
    let mut working = Working::start(&server.address, &line);
    until("it says much", || much.exists());
    working.signal(Signal::TERM);
    working.signal(Signal::INT);
    assert_eq!(ended(&mut working.child), Some(0));
    let counts = counts(&client).await;
    assert_eq!((counts.ready, counts.leased, counts.acked), (1, 0, 0));
}
