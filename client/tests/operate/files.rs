//! `data-queue insert --lines`: files as they come, and servers that go.

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use data_queue_client::{Client, Watch};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::server::{PATIENCE, Ran, Server};

/// A file of a test's own.
struct Lines {
    dir: TempDir,
}

impl Lines {
    fn of(content: impl AsRef<[u8]>) -> Self {
        let lines = Self { dir: tempfile::tempdir().unwrap() };
        lines.write(content);
        lines
    }

    fn write(&self, content: impl AsRef<[u8]>) {
        fs::write(self.path(), content).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("tasks.jsonl")
    }

    fn insert(&self, server: &Server, queue: &str, flags: &[&str]) -> Ran {
        let path = self.path();
        server.run(&[&["insert", queue, "--lines", path.to_str().unwrap()], flags].concat())
    }
}

fn values(server: &Server, queue: &str) -> Vec<Value> {
    server.objects(&["tasks", queue, "--all"]).iter().map(|task| task["value"].clone()).collect()
}

fn numbers(from: u64, to: u64) -> String {
    (from..to).map(|number| format!("{number}\n")).collect()
}

/// Waits until so many tasks were inserted.
async fn inserted(client: &Client, queue: &str, count: u64) {
    let watch = Watch::queues([queue]).interval(Duration::from_millis(100));
    let mut told = client.admin().watch_queues(watch).await.unwrap();
    let all = async { while told.next().await.unwrap().unwrap().first().is_none_or(|q| q.counts.inserted < count) {} };
    timeout(PATIENCE, all).await.expect("all are in");
}

#[test]
fn a_file_goes_in_in_its_order_whatever_ends_its_lines() {
    let server = Server::start(&[]);
    let lines = Lines::of("\u{feff}{\"b\": 1.0, \"a\": 12345678901234567890123}\r\n\r\n  \n\"é\"\n[]");
    assert_eq!(lines.insert(&server, "q", &[]).good(), "3\t0\t6\n");
    let first = &server.good(&["tasks", "q"]);
    assert!(first.contains("{\"b\": 1.0, \"a\": 12345678901234567890123}"), "{first}");
    assert_eq!(values(&server, "q")[1..], [json!("é"), json!([])]);
    let objects = lines.insert(&server, "q", &["-o", "json", "--priority", "3", "--header", "k=v"]).objects();
    assert_eq!(objects, [json!({"inserted": 3, "duplicates": 0, "next_line": 6})]);
    let task = &server.objects(&["tasks", "q"])[0];
    assert_eq!((&task["priority"], &task["headers"]), (&json!(3), &json!({"k": "v"})));
    let words = lines.insert(&server, "q", &["-o", "table"]).good();
    assert_eq!(words, "q: inserted: 3, duplicates: 0\n");

    // Over more batches than one.
    let stdin = server.run_with(&["insert", "many", "--lines", "-"], numbers(0, 4_500).as_bytes());
    assert_eq!(stdin.good(), "4500\t0\t4501\n");
    assert!(values(&server, "many").iter().enumerate().all(|(at, value)| *value == json!(at)));
    assert_eq!(server.run_with(&["insert", "none", "--lines", "-"], b"").good(), "0\t0\t1\n");
    let bytes = server.run_with(&["insert", "bytes", "--lines", "-", "--data"], b"\xff\n\nx");
    assert_eq!(bytes.good(), "3\t0\t4\n");
    let data: Vec<_> = server.objects(&["tasks", "bytes"]).iter().map(|task| task["data"].clone()).collect();
    assert_eq!(data, ["/w==", "", "eA=="]);
}

#[test]
fn a_line_can_be_a_task_with_all_that_it_has() {
    let server = Server::start(&[]);
    let lines = Lines::of(
        "{\"json\": {\"n\": 1.0}, \"priority\": 7, \"ttl\": \"1h\", \"headers\": {\"k\": \"v\"}, \"unique_key\": \"u\"}\n\
         {\"json\": null, \"unique_key\": \"u\"}\n{\"text\": \"a\\tb\"}\n{\"data\": \"/w==\", \"delay\": \"1h\"}\n\
         {\"json\": null, \"deliver_at\": \"2000-01-01T00:00:00Z\"}\n",
    );
    assert_eq!(lines.insert(&server, "q", &["--tasks"]).good(), "4\t1\t6\n");
    let ready = server.objects(&["tasks", "q"]);
    assert_eq!(ready.len(), 3);
    assert_eq!((&ready[0]["priority"], &ready[0]["headers"]), (&json!(7), &json!({"k": "v"})));
    assert!(ready[0]["value"] == json!({"n": 1.0}) && ready[0]["expires"].is_string(), "{ready:?}");
    assert_eq!((&ready[1]["data"], &ready[2]["value"]), (&json!("YQli"), &Value::Null));
    assert_eq!(server.objects(&["tasks", "q", "--state", "scheduled"])[0]["data"], "/w==");
    lines.insert(&server, "q", &["--tasks", "--delay", "1s"]).refused(64, &["--delay", "--tasks"]);
    lines.insert(&server, "q", &[]).good();
}

#[test]
fn the_first_line_that_is_wrong_ends_it_and_what_is_before_is_in() {
    let server = Server::start(&["--max-message", "2097152"]);
    let long = format!("\"{}\"", "x".repeat(1_100_000));
    let longer = format!("\"{}\"", "x".repeat(2_200_000));
    for (number, (wrong, flags, words)) in [
        (&b"{\"secret\": }"[..], &[][..], &[":1502:12: ", "not JSON"][..]),
        (b"\"secret\xff\"", &[], &[":1502:8: ", "UTF-8"]),
        (long.as_bytes(), &[], &[":1502: ", "VALUE_TOO_LARGE"]),
        (longer.as_bytes(), &[], &[":1502: ", "MESSAGE_TOO_LARGE"]),
        (b"{\"json\": 1, \"prio\": 1}", &["--tasks"], &[":1502:18: ", "prio"]),
        (b"{\"json\": 1, \"priority\": 10}", &["--tasks"], &[":1502:25: ", "priority"]),
        (b"{\"json\": 1, \"delay\": \"9999days\"}", &["--tasks"], &[":1502: ", "DELAY_OUT_OF_RANGE"]),
        (b"{\"json\": 1, \"headers\": {\"\": \"\"}}", &["--tasks"], &[":1502: ", "HEADERS_INVALID"]),
    ]
    .into_iter()
    .enumerate()
    {
        let queue = format!("q{number}");
        let good = if flags.is_empty() { "1\n" } else { "{\"json\": 1}\n" };
        let around = (good.repeat(1_500) + "\n", good.repeat(700));
        let lines = Lines::of([around.0.as_bytes(), wrong, b"\n", around.1.as_bytes()].concat());
        let ran = lines.insert(&server, &queue, flags);
        ran.refused(1, words);
        ran.refused(1, &["tasks.jsonl", "inserted: 1500, duplicates: 0; go on with --from-line 1502\n"]);
        assert!(!ran.stderr.contains("secret") && !ran.stderr.contains("xxx"), "{ran:?}");
        assert_eq!(values(&server, &queue).len(), 1_500);

        lines.write([around.0.as_bytes(), good.as_bytes(), around.1.as_bytes()].concat());
        let mended = lines.insert(&server, &queue, &[flags, &["--from-line", "1502"]].concat());
        assert_eq!(mended.good(), "701\t0\t2203\n");
        assert_eq!(values(&server, &queue).len(), 2_201);
    }
}

/// A batch that is too large a message for this server goes in in parts.
#[test]
fn a_server_that_takes_less_at_a_time_gets_less() {
    let server = Server::start(&["--max-value", "20000", "--max-message", "200000"]);
    let all: String = (0..300).map(|number| format!("\"{number:0>3000}\"\n")).collect();
    assert_eq!(Lines::of(all).insert(&server, "q", &[]).good(), "300\t0\t301\n");
    let numbers = values(&server, "q").into_iter().map(|value| value.as_str().unwrap().parse::<usize>().unwrap());
    assert!(numbers.eq(0..300));
}

#[test]
fn what_cannot_be_read_is_one_line() {
    let server = Server::start(&[]);
    let lines = Lines::of("1\n");
    for (path, words) in [
        (lines.dir.path().join("none"), "No such file"),
        (lines.dir.path().to_owned(), "it is a directory"),
        ("/proc/self/mem".into(), "from line 1 on"),
    ] {
        let name = path.to_str().unwrap();
        server.run(&["insert", "q", "--lines", name]).refused(1, &["cannot read", name, words]);
    }
    for (flags, word) in [
        (&["--from-line", "0"][..], "--from-line"),
        (&["--retry-for", "5m"], "0s to 4m"),
        (&["--unique-key", "k"], "--unique-key"),
        (&["--whole"], "--whole"),
        (&["--tasks", "--data"], "--data"),
    ] {
        lines.insert(&server, "q", flags).refused(64, &[word]);
    }
    for flags in [&["--tasks"][..], &["--from-line", "2"], &["--retry-for", "1s"]] {
        server.run(&[&["insert", "q"], flags].concat()).refused(64, &["--lines"]);
    }
    lines.insert(&server, "no queue", &[]).refused(1, &["QUEUE_NAME_INVALID"]);
    assert_eq!(server.good(&["queues"]), "");
}

#[test]
fn a_file_that_is_inserted_again_under_its_name_is_in_once() {
    let server = Server::start(&[]);
    let lines = Lines::of(numbers(0, 2_500));
    for _ in 0..2 {
        assert_eq!(lines.insert(&server, "q", &["--request-id", "monday"]).good(), "2500\t0\t2501\n");
    }
    // A run that ended in a batch goes on where it began.
    assert_eq!(
        lines.insert(&server, "q", &["--request-id", "monday", "--from-line", "1001"]).good(),
        "1500\t0\t2501\n"
    );
    assert_eq!(values(&server, "q").len(), 2_500);
    // Under the same name nothing else goes in.
    lines.write(numbers(5, 2_500));
    lines.insert(&server, "q", &["--request-id", "monday"]).refused(1, &["REQUEST_ID_REUSED", "inserted: 0"]);
    assert_eq!(values(&server, "q").len(), 2_500);
}

#[test]
fn a_queue_that_is_full_is_waited_for_and_then_told_as_it_is() {
    let server = Server::start(&[]);
    server.good(&["set", "q", "max-tasks=1000"]);
    let lines = Lines::of(numbers(0, 1_500));
    let ran = lines.insert(&server, "q", &["--retry-for", "0s"]);
    ran.refused(1, &["QUEUE_FULL", "inserted: 1000, duplicates: 0; go on with --from-line 1001\n"]);
    assert!(!ran.stderr.contains("maybe"), "nothing is in doubt: {ran:?}");
}

/// Inserts what it reads from a pipe, which the test feeds.
fn fed(server: &Server, flags: &[&str]) -> Child {
    let line = [&["insert", "q", "--lines", "-"], flags].concat();
    let mut command = server.command(&line);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn feed(child: &Child, text: &str) {
    child.stdin.as_ref().unwrap().write_all(text.as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_away_is_waited_for_and_nothing_is_lost_or_doubled() {
    let dir = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", dir.path().join("q.db").display());
    let mut server = Server::start_on("127.0.0.1:0", &store, &[]);
    let address = server.address.clone();
    let mut child = fed(&server, &[]);
    feed(&child, &numbers(0, 1_000));
    inserted(&server.client(), "q", 1_000).await;
    for round in 1..8 {
        // It is killed before, while or after these go in.
        feed(&child, &numbers(round * 1_000, (round + 1) * 1_000));
        drop(server);
        server = Server::start_on(&address, &store, &[]);
    }
    drop(child.stdin.take());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.good(), "8000\t0\t8001\n");
    assert!(values(&server, "q").iter().enumerate().all(|(at, value)| *value == json!(at)));
    assert_eq!(values(&server, "q").len(), 8_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stays_away_is_one_line_that_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", dir.path().join("q.db").display());
    let server = Server::start_on("127.0.0.1:0", &store, &[]);
    let address = server.address.clone();
    let mut child = fed(&server, &["--retry-for", "100ms", "--request-id", "run"]);
    feed(&child, &numbers(0, 1_000));
    inserted(&server.client(), "q", 1_000).await;
    drop(server);
    feed(&child, &numbers(1_000, 2_500));
    drop(child.stdin.take());
    let ran = Ran::of(child.wait_with_output().unwrap());
    ran.refused(1, &["cannot reach a server at", &address, "inserted: 1000, duplicates: 0"]);
    ran.refused(1, &["maybe those up to line 2000; go on with --from-line 1001 --request-id run "]);

    let server = Server::start_on(&address, &store, &[]);
    let line = ["insert", "q", "--lines", "-", "--from-line", "1001", "--request-id", "run"];
    assert_eq!(server.run_with(&line, numbers(0, 2_500).as_bytes()).good(), "1500\t0\t2501\n");
    assert_eq!(values(&server, "q").len(), 2_500);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_tells_how_to_go_on_so_that_nothing_is_lost_or_doubled() {
    let server = Server::start(&[]);
    let child = fed(&server, &[]);
    feed(&child, &numbers(0, 1_500));
    inserted(&server.client(), "q", 1_000).await;
    let killed = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let ran = Ran::of(child.wait_with_output().unwrap());
    ran.refused(1, &["it was interrupted; inserted: ", "go on with --from-line "]);
    let rest = ran.stderr.split_once("go on with ").unwrap().1;
    // The answer may have been on its way: then the name of the run is told too.
    let flags: Vec<_> = rest.split_whitespace().take_while(|word| *word != "and").collect();
    let line = [&["insert", "q", "--lines", "-"], &flags[..]].concat();
    server.run_with(&line, numbers(0, 1_500).as_bytes()).good();
    assert!(values(&server, "q").into_iter().eq((0..1_500).map(|number| json!(number))));
}
