//! The validator on real input, while its server is killed.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use data_queue_proto::v1::QueueCounts;
use tokio::{task::spawn_blocking, time::sleep};
use tonic::Code;

use super::random::Random;
use crate::support::{
    PATIENCE,
    call::get_queue_request,
    directory::Directory,
    embedded::Embedded,
    poll_until,
    redis::{Options, Persistence},
    server::Server,
    wire_tests,
};

const BINARY: &str = "data-queue-validate";
const QUEUE: &str = "packages";
const LONG_LINE: usize = 50 << 10;
const LIMIT: Duration = Duration::from_secs(240);

/// The test runs from `target/<profile>/deps`, the binary is in `target/<profile>`.
fn binary() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(Path::parent).expect("the target directory");
    let binary = profile.join(format!("{BINARY}{}", env::consts::EXE_SUFFIX));
    assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
    binary
}

/// What cargo knows about every package that is built here, a line each. Gives the number of lines.
fn write_packages(path: &Path) -> u64 {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "cargo metadata: {}", output.status);
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = metadata["packages"].as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut sizes = lines.iter().map(String::len).collect::<Vec<_>>();
    sizes.sort_unstable();
    println!("{} packages, the lines in bytes: {sizes:?}", lines.len());
    assert!(sizes.last().is_some_and(|longest| *longest > LONG_LINE), "no line over {LONG_LINE} bytes");
    fs::write(path, lines.join("\n") + "\n").unwrap();
    u64::try_from(lines.len()).unwrap()
}

/// A process that does not outlive the test.
struct Running(Option<Child>);

impl Running {
    /// Waits for its end and reads what it said.
    async fn output(mut self) -> Output {
        let child = self.0.as_mut().unwrap();
        poll_until("the run to end", LIMIT, async || child.try_wait().unwrap()).await;
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

/// Runs it while the server is killed twice and comes back.
async fn survives(mode: &str, server: &Server) {
    let mut random = Random::new(mode);
    let directory = Directory::default();
    let (input, log) = (directory.path().join("packages.jsonl"), directory.path().join("acked.jsonl"));
    let lines = write_packages(&input);

    let child = Command::new(binary())
        .args(["--addr", &server.address().to_string(), "--queue", QUEUE, "--mode", mode])
        .args(["--input", input.to_str().unwrap(), "--log", log.to_str().unwrap()])
        .args(["--workers", "8", "--batch", "10", "--lease", "1s", "--timeout", "5m"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary");
    let mut running = Running(Some(child));
    for part in [6, 2] {
        let wanted = lines / part;
        let ask = async || {
            let ended = running.0.as_mut().unwrap().try_wait().unwrap().is_some();
            (ended || counts(server).await.acked >= wanted).then_some(())
        };
        poll_until("the run to go on", PATIENCE, ask).await;
        sleep(random.up_to(Duration::from_millis(30))).await;
        server.kill();
        sleep(random.up_to(Duration::from_millis(200))).await;
        server.restart().await;
    }
    let output = running.output().await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{text}");
    for name in ["missing", "doubled", "unexpected"] {
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(name));
        let row = row.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        assert_eq!(row.split_whitespace().last(), Some("0"), "{row}");
    }
    let mut sent = fs::read_to_string(input).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    let mut acked = fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    sent.sort();
    acked.sort();
    assert!(sent == acked, "{} values went in, other {} came out", sent.len(), acked.len());
    let expected = QueueCounts { inserted: lines, acked: lines, ..QueueCounts::default() };
    assert_eq!(counts(server).await, expected);
}

/// Of the queue that the validator uses; nothing as long as it is not there.
async fn counts(server: &Server) -> QueueCounts {
    match server.client().await.admin.get_queue(get_queue_request(QUEUE)).await {
        Ok(answer) => answer.into_inner().queue.expect("a queue").counts.expect("counts"),
        Err(status) if status.code() == Code::NotFound => QueueCounts::default(),
        Err(status) => panic!("{status:?}"),
    }
}

/// A server on a Redis that writes every change to its disk.
async fn on_redis() -> Server {
    let options = Options { persistence: Persistence::Always, ..Options::default() };
    let server = Server::on_redis_with(options, &[]);
    server.ready().await;
    server
}

wire_tests! {
    /// G1, G2, G3, G7: every package that this project is built from goes through, once and unaltered, popped one by one.
    async fn validate_single_while_the_server_is_killed() {
        survives("single", &on_redis().await).await;
    }

    /// G1, G2, G3, G7: and popped in batches.
    async fn validate_batch_while_the_server_is_killed() {
        survives("batch", &on_redis().await).await;
    }

    /// G1, G2, G3, G7: the same of a server on SQLite.
    async fn validate_single_while_the_embedded_server_is_killed() {
        let server = Embedded::start(&[]).await;
        survives("single", &server).await;
        server.kill_and_check();
    }

    /// G1, G2, G3, G7: and in batches.
    async fn validate_batch_while_the_embedded_server_is_killed() {
        let server = Embedded::start(&[]).await;
        survives("batch", &server).await;
        server.kill_and_check();
    }
}
