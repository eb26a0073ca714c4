//! `data-queue-validate` against a queue that is right, and against queues that are each wrong in one way.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    pin::Pin,
    process::Output,
    sync::{Arc, Mutex},
    time::Duration,
};

use data_queue_proto::v1::{
    self, Outcome,
    data_queue_server::{DataQueue, DataQueueServer},
};
use tokio::{net::TcpListener, process::Command, time::Instant};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What a queue does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The first task is never delivered.
    Loses,
    /// The first task is delivered again at once, while it is leased.
    SharesLease,
    /// The first task comes again after its ack.
    Revives,
    /// The first task has a space more.
    Alters,
    /// The first task's md5 is wrong.
    Damages,
    /// A task that nobody inserted is delivered.
    Invents,
    /// Every third call fails after it took effect.
    Stumbles,
}

/// A queue in memory, as small as it can be.
struct Queue {
    fault: Fault,
    ready: VecDeque<v1::Task>,
    leased: HashMap<String, (v1::Task, Instant)>,
    acked: Vec<String>,
    requests: HashMap<String, v1::InsertResponse>,
    pops: HashMap<String, v1::Task>,
    named: u32,
    calls: u32,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Queue>>);

impl Queue {
    fn name(&mut self) -> String {
        self.named += 1;
        format!("{:032x}", self.named)
    }

    fn insert(&mut self, request: v1::InsertRequest) -> v1::InsertResponse {
        if let Some(answer) = self.requests.get(&request.request_id) {
            return answer.clone();
        }
        let mut results = Vec::new();
        for task in request.tasks {
            let id = self.name();
            results.push(v1::InsertResult { id: id.clone(), duplicate: false });
            let Some(v1::new_task::Value::Json(json)) = task.value else { panic!("validate inserts JSON") };
            self.put(v1::Task { id, value: Some(v1::task::Value::Json(json)), ..v1::Task::default() });
        }
        let answer = v1::InsertResponse { results, replayed: false, ..Default::default() };
        self.requests.insert(request.request_id, answer.clone());
        answer
    }

    fn put(&mut self, mut task: v1::Task) {
        let Some(v1::task::Value::Json(json)) = &mut task.value else { panic!("a task of another kind") };
        let first = self.named == 1;
        if first && self.fault == Fault::Alters {
            json.push(' ');
        }
        task.md5 = md5(json);
        if first && self.fault == Fault::Damages {
            task.md5 = md5("");
        }
        if first && self.fault == Fault::Invents {
            self.ready.push_back(v1::Task { id: "invented".into(), ..task.clone() });
        }
        if !(first && self.fault == Fault::Loses) {
            self.ready.push_back(task);
        }
    }

    fn pop(&mut self, lease: Duration) -> Option<v1::Task> {
        let now = Instant::now();
        let out: Vec<_> =
            self.leased.iter().filter(|(_, (_, until))| *until <= now).map(|(token, _)| token.clone()).collect();
        for token in out {
            let (task, _) = self.leased.remove(&token).unwrap();
            self.ready.push_front(task);
        }
        let mut task = self.ready.pop_front()?;
        task.lease_token = self.name();
        task.queue = "q".into();
        if self.fault == Fault::SharesLease && task.id == FIRST && task.deliveries == 0 {
            task.deliveries += 1;
            self.ready.push_front(task.clone());
        }
        self.leased.insert(task.lease_token.clone(), (task.clone(), now + lease));
        Some(task)
    }

    fn ack(&mut self, token: &String) -> Outcome {
        if self.acked.contains(token) {
            return Outcome::AlreadyAcked;
        }
        let Some((task, _)) = self.leased.remove(token) else { return Outcome::LeaseLost };
        self.acked.push(token.clone());
        if self.fault == Fault::Revives && task.id == FIRST {
            self.ready.push_back(task);
        }
        Outcome::Applied
    }

    fn heartbeat(&mut self, token: &String, lease: Duration) -> Outcome {
        let Some((_, until)) = self.leased.get_mut(token) else { return Outcome::LeaseLost };
        *until = Instant::now() + lease;
        Outcome::Applied
    }

    fn stumble(&mut self) -> Result<(), Status> {
        self.calls += 1;
        let stumbles = self.fault == Fault::Stumbles && self.calls.is_multiple_of(3);
        if stumbles { Err(Status::unavailable("stumbled")) } else { Ok(()) }
    }
}

const FIRST: &str = "00000000000000000000000000000001";

fn md5(text: &str) -> String {
    use md5::Digest;
    md5::Md5::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn std(duration: Option<prost_types::Duration>) -> Duration {
    duration.unwrap().try_into().unwrap()
}

impl Fake {
    async fn serve(fault: Fault) -> String {
        let (ready, leased, acked, requests, pops) = Default::default();
        let queue = Queue { fault, ready, leased, acked, requests, pops, named: 0, calls: 0 };
        let fake = Self(Arc::new(Mutex::new(queue)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(DataQueueServer::new(fake));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    async fn pop_within(&self, wait: Duration, lease: Duration) -> Option<v1::Task> {
        let end = Instant::now() + wait;
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        loop {
            tick.tick().await;
            let task = self.0.lock().unwrap().pop(lease);
            if task.is_some() || Instant::now() >= end {
                return task;
            }
        }
    }
}

#[tonic::async_trait]
impl DataQueue for Fake {
    async fn insert(&self, request: Request<v1::InsertRequest>) -> Result<Response<v1::InsertResponse>, Status> {
        let mut queue = self.0.lock().unwrap();
        let answer = queue.insert(request.into_inner());
        queue.stumble()?;
        Ok(Response::new(answer))
    }

    async fn pop(&self, request: Request<v1::PopRequest>) -> Result<Response<v1::PopResponse>, Status> {
        let request = request.into_inner();
        let before = self.0.lock().unwrap().pops.get(&request.request_id).cloned();
        let task = match before {
            Some(task) => Some(task),
            None => self.pop_within(std(request.wait), std(request.lease)).await,
        };
        let mut queue = self.0.lock().unwrap();
        if let Some(task) = &task {
            queue.pops.insert(request.request_id, task.clone());
        }
        queue.stumble()?;
        Ok(Response::new(v1::PopResponse { task, ack_outcomes: Vec::new() }))
    }

    type PopBatchStream = Pin<Box<dyn Stream<Item = Result<v1::PopBatchResponse, Status>> + Send>>;

    async fn pop_batch(&self, request: Request<v1::PopBatchRequest>) -> Result<Response<Self::PopBatchStream>, Status> {
        let request = request.into_inner();
        let mut messages = Vec::new();
        if let Some(task) = self.pop_within(std(request.wait), std(request.lease)).await {
            let mut tasks = vec![task];
            let mut queue = self.0.lock().unwrap();
            tasks.extend((1..request.max_tasks).map_while(|_| queue.pop(std(request.lease))));
            messages.push(Ok(v1::PopBatchResponse { tasks }));
        }
        if let Err(stumbled) = self.0.lock().unwrap().stumble() {
            messages.push(Err(stumbled));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn ack(&self, request: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        let mut queue = self.0.lock().unwrap();
        let outcomes = request.get_ref().lease_tokens.iter().map(|token| queue.ack(token).into()).collect();
        queue.stumble()?;
        Ok(Response::new(v1::AckResponse { outcomes }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let mut queue = self.0.lock().unwrap();
        let lease = std(request.get_ref().lease);
        let outcomes =
            request.get_ref().lease_tokens.iter().map(|token| queue.heartbeat(token, lease).into()).collect();
        queue.stumble()?;
        Ok(Response::new(v1::HeartbeatResponse { outcomes, ..v1::HeartbeatResponse::default() }))
    }

    async fn putback(&self, _: Request<v1::PutbackRequest>) -> Result<Response<v1::PutbackResponse>, Status> {
        Err(Status::unimplemented("validate puts nothing back"))
    }

    type ProduceStream = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

    async fn produce(
        &self,
        _: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        Err(Status::unimplemented("validate opens no streams of inserts"))
    }

    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<v1::ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        _: Request<Streaming<v1::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        Err(Status::unimplemented("validate opens no streams of tasks"))
    }
}

async fn validate(address: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_data-queue-validate"));
    command.args(["--addr", address, "--lease", "300ms"]).args(flags).kill_on_drop(true).output().await.unwrap()
}

/// The count of this name in the table.
fn count(output: &Output, name: &str) -> u64 {
    let table = String::from_utf8(output.stdout.clone()).unwrap();
    let line = table.lines().find(|line| line.starts_with(name));
    line.unwrap_or_else(|| panic!("no {name} in {output:?}")).rsplit(' ').next().unwrap().parse().unwrap()
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("data-queue-validate-test-{}-{name}", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test]
async fn a_right_queue_passes_in_both_modes_and_the_log_has_every_number() {
    for mode in ["single", "batch"] {
        let log = Scratch::new(mode);
        let address = Fake::serve(Fault::None).await;
        let output = validate(&address, &["--count", "200", "--mode", mode, "--log", log.path()]).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!((count(&output, "inserted"), count(&output, "acked")), (200, 200));
        assert!(count(&output, "redeliveries") >= 199);
        assert!(output.stderr.is_empty(), "{output:?}");
        let text = std::fs::read_to_string(&log.0).unwrap();
        let mut numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..200));
    }
}

#[tokio::test]
async fn lines_come_back_as_they_stand_and_equal_ones_each() {
    let (input, log) = (Scratch::new("input"), Scratch::new("output"));
    let large = format!("\"{}\"", "x".repeat(200_000));
    let mut lines = vec![r#"{"a":1,"a":2}"#, " 1e400 ", r#""\ud800""#, "7", "7", large.as_str()];
    std::fs::write(&input.0, lines.join("\n")).unwrap();
    let address = Fake::serve(Fault::None).await;
    let output = validate(&format!("http://{address}"), &["--input", input.path(), "--log", log.path()]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = std::fs::read_to_string(&log.0).unwrap();
    let mut logged: Vec<_> = text.lines().collect();
    logged.sort_unstable();
    lines.sort_unstable();
    assert!(logged == lines);
}

#[tokio::test]
async fn calls_that_fail_after_they_took_effect_are_no_fault_of_the_queue() {
    for mode in ["single", "batch"] {
        let address = Fake::serve(Fault::Stumbles).await;
        let output = validate(&address, &["--count", "30", "--mode", mode]).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}

#[tokio::test]
async fn each_fault_is_caught_in_both_modes() {
    let faults = [
        (Fault::Loses, "missing"),
        (Fault::SharesLease, "doubled"),
        (Fault::Revives, "doubled"),
        (Fault::Alters, "unexpected"),
        (Fault::Damages, "unexpected"),
        (Fault::Invents, "unexpected"),
    ];
    let runs = ["single", "batch"].into_iter().flat_map(|mode| {
        faults.map(|(fault, name)| async move {
            let address = Fake::serve(fault).await;
            let output = validate(&address, &["--count", "8", "--mode", mode, "--timeout", "4s"]).await;
            assert_eq!(output.status.code(), Some(1), "{fault:?}, {mode}: {output:?}");
            assert_eq!(count(&output, name), 1, "{fault:?}, {mode}: {output:?}");
        })
    });
    futures_util::future::join_all(runs).await;
}

#[tokio::test]
async fn what_cannot_start_says_so_in_one_line() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let input = Scratch::new("words");
    std::fs::write(&input.0, "1\nword\n").unwrap();
    for (address, flags, code, said) in [
        (nobody.as_str(), &["--timeout", "500ms"][..], 1, "cannot reach a server at"),
        ("no address", &[], 64, "--addr"),
        (&nobody, &["--workers", "0"], 64, "--workers"),
        (&nobody, &["--input", input.path()], 1, "line 2 of"),
        (&nobody, &["--input", "/nowhere"], 1, "cannot read /nowhere"),
        (&nobody, &["--log", "/nowhere/log"], 1, "cannot write /nowhere/log"),
    ] {
        let output = validate(address, flags).await;
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(said) && text.lines().count() == 1, "{flags:?}: {text}");
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn a_program_that_does_not_work_ends_the_run_with_one_line() {
    let queue = Fake::serve(Fault::None).await;
    for (program, said) in [
        ("gone=/nowhere/worker", "--worker gone: cannot start: "),
        ("short=false", "--worker short: it ended by itself, with code 1"),
        ("loud=echo hello", "--worker loud: it said what is not understood: \"hello work --addr"),
    ] {
        let output = validate(&queue, &["--count", "3", "--worker", program]).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{program}: {text}");
        assert!(text.lines().last().unwrap().starts_with(&format!("failed: {said}")), "{program}: {text}");
    }
}
