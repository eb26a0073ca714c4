//! `data-queue health` and `data-queue top`: what is so now.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use data_queue_client::{NewTask, Pop};
use serde_json::{Value, json};

use crate::server::{PATIENCE, Ran, Server, binary, columns, command, ended};

/// An address where nobody listens.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn health(address: &str, flags: &[&str]) -> Ran {
    Ran::of(command(address, &[&["health"], flags].concat()).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn health_is_good_when_the_server_serves() {
    let server = Server::start(&[]);
    let told = server.good(&["health"]);
    assert_eq!(columns(&told)[0], [server.address.as_str(), "serving", env!("CARGO_PKG_VERSION"), "memory"]);
    let object = &server.objects(&["health"])[0];
    assert_eq!((&object["status"], &object["store"]), (&json!("serving"), &json!("memory")));
    assert!(object["survives_note"].as_str().is_some_and(|note| note.contains("memory")), "{object}");
    let words = server.good(&["health", "-o", "table"]);
    assert!(words.contains("is serving: ") && words.lines().count() == 1, "{words}");
}

#[test]
fn health_says_why_it_is_not_good_in_one_line_and_in_time() {
    let away = nobody();
    health(&away, &[]).refused(1, &["cannot reach a server at", &away]);

    // Its store is away.
    let server = Server::start_on("127.0.0.1:0", &format!("redis://{}", nobody()), &[]);
    health(&server.address, &[]).refused(1, &["is not serving", &server.address, "STORE_UNAVAILABLE"]);

    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let begun = Instant::now();
    health(&address, &["--timeout", "200ms"]).refused(1, &["did not answer within 200ms", &address]);
    assert!(begun.elapsed() < PATIENCE);

    // It is something else.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let answer = |mut stream: TcpStream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        other.incoming().map_while(Result::ok).for_each(|stream| drop(answer(stream)));
    });
    health(&address, &[]).refused(1, &["the server at", &address]);

    for wrong in ["99ms", "61s", "soon"] {
        health(&address, &["--timeout", wrong]).refused(64, &["--timeout"]);
    }
}

#[tokio::test]
async fn top_writes_lines_where_nobody_looks() {
    let server = Server::start(&[]);
    let client = server.client();
    for queue in ["a", "b", "b", "b", "c", "c"] {
        client.insert(queue, NewTask::json_text("1")).await.unwrap();
    }
    client.pop("c", Pop::new()).await.unwrap();
    client.admin().pause("a").await.unwrap();
    let told = server.good(&["top", "--count", "2", "--interval", "100ms"]);
    let lines: Vec<_> = columns(&told).into_iter().map(|line| [&line[1..8], &line[9..]].concat()).collect();
    let b = ["b", "3", "0", "0", "0", "0.0", "0.0", "no"];
    let a = ["a", "1", "0", "0", "0", "0.0", "0.0", "yes"];
    let c = ["c", "1", "0", "1", "0", "0.0", "0.0", "no"];
    assert_eq!(lines, [b, a, c, b, a, c]);

    let names = |flags: &[&str]| -> Vec<Value> {
        let told = server.objects(&[&["top", "--count", "1"], flags].concat());
        told.iter().map(|queue| queue["queue"].clone()).collect()
    };
    assert_eq!(names(&["--sort", "name"]), ["a", "b", "c"]);
    assert_eq!(names(&["--sort", "leased"]), ["c", "a", "b"]);
    assert_eq!(names(&["c", "a", "none"]), ["a", "c"]);
    let table = server.good(&["top", "--count", "1", "-o", "table"]);
    assert!(table.starts_with("AT") && !table.contains('\u{1b}') && table.lines().count() == 4, "{table}");
    for (line, code, word) in [
        (&["top", "--count", "0"][..], 64, "--count"),
        (&["top", "--sort", "size"], 64, "--sort"),
        (&["top", "--interval", "1ms"], 1, "INTERVAL_OUT_OF_RANGE"),
        (&["top", "no name"], 1, "QUEUE_NAME_INVALID"),
    ] {
        server.run(line).refused(code, &[word]);
    }
}

#[test]
fn top_goes_on_when_the_server_is_back() {
    let server = Server::start(&[]);
    server.good(&["insert", "before", "1"]);
    let address = server.address.clone();
    let mut top = server.command(&["top", "--interval", "100ms"]);
    let mut child = top.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.next().is_some_and(|line| line.contains("\tbefore\t1\t")));
    drop(server);
    let away = said.next().unwrap();
    assert!(away.contains(&address) && away.contains("is away") && away.ends_with("; trying again"), "{away}");
    let server = Server::start_on(&address, "memory", &[]);
    server.good(&["insert", "after", "1"]);
    assert!(lines.any(|line| line.contains("\tafter\t1\t")));
    drop(lines);
    assert_eq!((child.wait().unwrap().code(), said.count()), (Some(0), 0), "it was said once");
}

#[test]
fn top_in_lines_ends_with_ctrl_c_as_it_should() {
    let server = Server::start(&[]);
    server.good(&["insert", "q", "1"]);
    let mut top = server.command(&["top", "--interval", "100ms"]);
    let mut child = top.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().is_some());
    signal(child.id(), "INT");
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
}

/// The first table has more than a pipe holds, and nobody goes on reading it.
#[tokio::test]
async fn top_in_lines_ends_with_ctrl_c_though_its_reader_hangs() {
    let server = Server::start(&[]);
    let client = server.client();
    for number in 0..1_000 {
        client.insert(&format!("{number:0>120}"), NewTask::json_text("1")).await.unwrap();
    }
    let mut top = server.command(&["top"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    top.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    signal(top.id(), "INT");
    assert_eq!(ended(&mut top), Some(0));
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap().success());
}

/// `top` on a terminal of 60 columns and 8 lines, between two tellings of how the terminal is set.
struct Terminal {
    child: Child,
    shown: String,
}

impl Terminal {
    fn start(server: &Server, flags: &str) -> Self {
        // A test that waits for what does not come ends too.
        let top = format!("timeout --foreground 60 {} top --interval 100ms {flags}", binary().display());
        // Ctrl-C is for top, and not for the shell.
        let line = format!("trap : INT; stty cols 60 rows 8; stty -g; {top}; echo \"code $?\"; stty -g");
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).env("DATA_QUEUE_ADDR", &server.address).env("SHELL", "/bin/sh");
        command.env("TERM", "xterm").env_remove("NO_COLOR");
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        Self { child: child.expect("the command script, of util-linux"), shown: String::new() }
    }

    /// Reads on until this is shown.
    #[track_caller]
    fn until(&mut self, words: &str) {
        let from = self.shown.len();
        let mut bytes = Vec::new();
        while !String::from_utf8_lossy(&bytes).contains(words) {
            let mut byte = [0];
            let read = self.child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
            assert!(
                read == 1,
                "{words:?} was not shown: {:?} {:?}",
                &self.shown[..from],
                String::from_utf8_lossy(&bytes)
            );
            bytes.push(byte[0]);
        }
        self.shown += &String::from_utf8(bytes).unwrap();
    }

    fn press(&mut self, keys: &str) {
        self.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// What was shown in all, once it has ended and the terminal is as it was.
    #[track_caller]
    fn ended(mut self, code: &str) -> String {
        let mut rest = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap();
        self.shown += &rest;
        let shown = self.shown;
        assert!(shown.contains(&format!("code {code}\r\n")), "{shown:?}");
        let settings: Vec<_> = shown.lines().map(|line| line.rsplit('\u{1b}').next().unwrap()).collect();
        let (before, after) = (settings.first().unwrap(), settings.last().unwrap());
        assert!(before.matches(':').count() > 10 && before == after, "{shown:?}");
        if shown.contains("\u{1b}[?1049h") {
            let left = shown.rsplit_once("\u{1b}[?25h\u{1b}[?1049l").expect("it is left").1;
            assert!(!left.contains("\u{1b}["), "{shown:?}");
            assert_eq!(shown.matches("\u{1b}[?1049l").count(), 1, "{shown:?}");
        }
        shown
    }
}

#[test]
fn top_fills_the_terminal_and_leaves_it_as_it_was() {
    let server = Server::start(&[]);
    for queue in 0..9 {
        server.good(&["insert", &format!("queue-{queue}"), "1"]);
    }
    let mut top = Terminal::start(&server, "");
    top.until("9 queues: 9 ready");
    top.until("queue-0");
    top.until("and 6 more");
    top.press("x");
    top.press("q");
    let shown = top.ended("0");
    assert!(!shown.contains("queue-3"), "it is full: {shown:?}");
    for line in shown.split("\u{1b}[K").filter(|line| line.contains("queue-")) {
        let text = line.replace(['\r', '\n'], "");
        assert!(text.chars().count() <= 60, "{text:?}");
    }

    // Also at once, when nothing but the empty screen is there.
    for (shown, end) in [("and 6 more", "\u{3}"), ("\u{1b}[?25l", "\u{3}"), ("and 6 more", "Q"), ("\u{1b}[?25l", "Q")] {
        let mut top = Terminal::start(&server, "");
        top.until(shown);
        top.press(end);
        top.ended("0");
    }
    Terminal::start(&server, "--count 2").ended("0");
    let shown = Terminal::start(&server, "'no name'").ended("1");
    assert!(shown.contains("QUEUE_NAME_INVALID"), "{shown:?}");
}

#[test]
fn top_on_a_terminal_says_that_the_server_is_away_and_goes_on() {
    let server = Server::start(&[]);
    server.good(&["insert", "before", "1"]);
    let address = server.address.clone();
    let mut top = Terminal::start(&server, "");
    top.until("before");
    drop(server);
    top.until(&format!("the server at {address} is away"));
    let server = Server::start_on(&address, "memory", &[]);
    server.good(&["insert", "after", "1"]);
    top.until("after");
    top.press("q");
    top.ended("0");
}
