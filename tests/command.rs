//! The command `data-queue` against a real server.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use data_queue_proto::v1::QueueCounts;
use serde_json::Value;
use tokio::task::spawn_blocking;
use tonic::Code;

use crate::support::{
    PATIENCE, call::get_queue_request, on_every_store, poll_until, server::Backend, server::Server, unique_queue,
    wire_tests,
};

const BINARY: &str = "data-queue";

/// The test runs from `target/<profile>/deps`, the binary is in `target/<profile>`.
fn binary() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(Path::parent).expect("the target directory");
    let binary = profile.join(format!("{BINARY}{}", env::consts::EXE_SUFFIX));
    assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
    binary
}

/// A run of it, which does not outlive the test.
struct Running(Option<Child>);

impl Running {
    fn bench(server: &Server, queue: &str, flags: &[&str]) -> Self {
        let child = Command::new(binary())
            .args(["bench", "--addr", &server.address().to_string(), "--queue", queue, "-o", "json"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self(Some(child.expect("the binary")))
    }

    fn interrupt(&self) {
        let pid = self.0.as_ref().expect("it runs").id().to_string();
        let status = Command::new("kill").args(["-s", "INT", &pid]).status().expect("the kill command");
        assert!(status.success(), "kill -s INT {pid}: {status}");
    }

    /// Waits for its end and reads what it said. That is less than a pipe holds.
    async fn output(mut self) -> Output {
        let child = self.0.as_mut().unwrap();
        poll_until("the run to end", PATIENCE, async || child.try_wait().unwrap()).await;
        let child = self.0.take().unwrap();
        spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The object that a good run wrote.
#[track_caller]
fn report(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.as_ref()), (Some(0), ""), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["valid"], true, "{report}");
    report
}

/// The sum of each histogram, by the name of the call.
fn sums(phase: &Value) -> Vec<(&str, u64)> {
    let sum =
        |call: &Value| call["histogram"].as_array().unwrap().iter().map(|step| step["count"].as_u64().unwrap()).sum();
    let calls = phase["calls"].as_array().unwrap().iter();
    calls.map(|call| (call["call"].as_str().unwrap(), sum(call))).collect()
}

/// Nothing as long as the queue is not there.
async fn counts(server: &Server, queue: &str) -> QueueCounts {
    match server.client().await.admin.get_queue(get_queue_request(queue)).await {
        Ok(answer) => answer.into_inner().queue.expect("a queue").counts.expect("counts"),
        Err(status) if status.code() == Code::NotFound => QueueCounts::default(),
        Err(status) => panic!("{status:?}"),
    }
}

async fn until_inserted(server: &Server, queue: &str) {
    poll_until("an insert", PATIENCE, async || (counts(server, queue).await.inserted > 0).then_some(())).await;
}

on_every_store! {
    /// What bench counted is what the queue counts, and nothing is left.
    async fn bench_counts_what_the_queue_counts(backend) {
        let server = backend.start(&[]).await;
        for (mode, inserts, pops) in [("unary", 300, Some(300)), ("batch", 3, None), ("stream", 300, None)] {
            for what in ["each", "both"] {
                let queue = unique_queue("bench");
                let flags = ["--mode", mode, "--what", what, "--count", "300", "--callers", "8", "--connections", "2"];
                let report = report(&Running::bench(&server, &queue, &flags).output().await);
                let expected = QueueCounts { inserted: 300, acked: 300, ..QueueCounts::default() };
                assert_eq!(counts(&server, &queue).await, expected);
                for name in ["inserted", "delivered", "acked"] {
                    assert_eq!(report["verified"][name], 300, "{report}");
                }
                assert!(report["server"]["store"].is_string(), "{report}");
                let phases = report["phases"].as_array().unwrap();
                assert!(phases.iter().all(|phase| phase["tasks"] == 300), "{report}");
                assert_eq!(sums(&phases[0])[0], ("insert", inserts), "{report}");
                match (what, pops) {
                    ("both", _) => assert_eq!(sums(&phases[0])[2], ("delivery", 300), "{report}"),
                    (_, Some(pops)) => assert_eq!(sums(&phases[1]), [("pop", pops), ("ack", pops)], "{report}"),
                    _ => assert_eq!(phases[1]["name"], "drain", "{report}"),
                }
            }
        }
    }
}

wire_tests! {
    /// An open loop says which rate was asked for.
    async fn bench_reports_the_intended_rate() {
        let server = Backend::Sqlite.start(&[]).await;
        let flags = ["--what", "both", "--count", "40", "--rate", "100"];
        let report = report(&Running::bench(&server, &unique_queue("bench"), &flags).output().await);
        let phase = &report["phases"][0];
        assert_eq!(phase["open_loop"]["intended_per_second"], 100.0, "{report}");
        assert_eq!(phase["open_loop"]["calls_not_begun"], 0, "{report}");
        // 39 hundredths from the first start to the last one.
        assert!(phase["seconds"].as_f64() >= Some(0.39), "{report}");
    }

    /// Ctrl-C ends a run early, with what was measured, and with an empty queue.
    async fn bench_ends_well_when_it_is_interrupted() {
        let server = Backend::Sqlite.start(&[]).await;
        for what in ["each", "both"] {
            let queue = unique_queue("bench");
            let run = Running::bench(&server, &queue, &["--what", what, "--duration", "1h"]);
            until_inserted(&server, &queue).await;
            run.interrupt();
            let report = report(&run.output().await);
            assert_eq!(report["interrupted"], true, "{report}");
            let QueueCounts { ready, leased, inserted, acked, .. } = counts(&server, &queue).await;
            assert_eq!((ready, leased, acked), (0, 0, inserted));
            assert_eq!((&report["verified"]["inserted"], &report["verified"]["acked"]), (&inserted.into(), &acked.into()));
        }
    }

    /// A server that dies under it makes a run void, in one line.
    async fn bench_is_void_when_the_server_is_killed() {
        for mode in ["unary", "batch", "stream"] {
            let server = Backend::Memory.start(&[]).await;
            let queue = unique_queue("bench");
            let run = Running::bench(&server, &queue, &["--mode", mode, "--what", "both", "--duration", "1h"]);
            until_inserted(&server, &queue).await;
            server.kill();
            let output = run.output().await;
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("void") && said.contains("failed") && said.lines().count() == 1, "{said}");
            assert!(output.stdout.is_empty(), "{output:?}");
        }
    }

    /// It works on no queue that has tasks.
    async fn bench_leaves_the_tasks_of_others_alone() {
        let server = Backend::Memory.start(&[]).await;
        let queue = unique_queue("bench");
        let first = Running::bench(&server, &queue, &["--what", "insert", "--duration", "1h"]);
        until_inserted(&server, &queue).await;
        let output = Running::bench(&server, &queue, &["--count", "1"]).output().await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("is not empty"), "{output:?}");
        first.interrupt();
        report(&first.output().await);
    }
}
