//! `data-queue bench` against a queue that is right, and against queues that are each wrong in one way.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use data_queue_proto::{
    ERROR_DOMAIN, reason,
    v1::{
        self, Outcome, consume_request,
        data_queue_server::{DataQueue, DataQueueServer},
        produce_request,
        queue_admin_server::{QueueAdmin, QueueAdminServer},
    },
};
use md5::Digest;
use serde_json::Value;
use tokio::{
    net::TcpListener,
    process::Command,
    sync::{Notify, mpsc},
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

/// What a queue does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The first task is never delivered.
    Loses,
    /// The first task is delivered twice.
    Doubles,
    /// The first task has another last byte, and the md5 of that.
    Alters,
    /// The first task's md5 is wrong.
    Damages,
    /// A task that nobody inserted is delivered, and stays.
    Invents,
    /// The first ack changes nothing.
    ForgetsAck,
    /// The first delivery's lease runs out before its ack, and the task comes again.
    Expires,
    /// Consume delivers nothing after the first ten acks.
    Stalls,
    /// The first PopBatch is refused since the server has too much to do, and the second one behind its first message.
    Overloads,
    /// Produce and Consume are not there.
    HasNoStreams,
}

/// A queue in memory, as small as it can be.
struct Queue {
    fault: Fault,
    ready: VecDeque<v1::Task>,
    leased: HashMap<String, v1::Task>,
    named: u64,
    batches: u64,
    counts: v1::QueueCounts,
}

impl Queue {
    fn name(&mut self) -> String {
        self.named += 1;
        format!("{:032x}", self.named)
    }

    fn insert(&mut self, tasks: Vec<v1::NewTask>) -> Vec<v1::InsertResult> {
        tasks.into_iter().map(|task| v1::InsertResult { id: self.put(task), duplicate: false }).collect()
    }

    fn put(&mut self, task: v1::NewTask) -> String {
        let Some(v1::new_task::Value::Data(data)) = task.value else { panic!("bench inserts bytes") };
        let (mut data, id) = (data.to_vec(), self.name());
        let fault = if self.counts.inserted == 0 { self.fault } else { Fault::None };
        self.counts.inserted += 1;
        if fault == Fault::Alters {
            *data.last_mut().unwrap() = b'!';
        }
        let hash = md5::Md5::digest(if fault == Fault::Damages { b"" } else { data.as_slice() });
        let md5 = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let value = Some(v1::task::Value::Data(data.into()));
        let task = v1::Task { id: id.clone(), md5, value, ..v1::Task::default() };
        match fault {
            Fault::Loses => {}
            Fault::Doubles => self.ready.extend([task.clone(), task]),
            Fault::Invents => {
                let data = u64::MAX.to_be_bytes().to_vec();
                let md5 = md5::Md5::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
                let value = Some(v1::task::Value::Data(data.into()));
                self.ready.extend([v1::Task { md5, value, ..task.clone() }, task]);
            }
            _ => self.ready.push_back(task),
        }
        id
    }

    fn pop(&mut self) -> Option<v1::Task> {
        let mut task = self.ready.pop_front()?;
        task.lease_token = self.name();
        if self.fault == Fault::Expires && self.counts.acked == 0 && task.expiries == 0 && self.leased.is_empty() {
            self.ready.push_back(v1::Task { expiries: 1, ..task.clone() });
            self.fault = Fault::None;
        } else {
            self.leased.insert(task.lease_token.clone(), task.clone());
        }
        Some(task)
    }

    fn ack(&mut self, tokens: &[String]) -> Vec<i32> {
        tokens.iter().map(|token| self.ack_one(token).into()).collect()
    }

    fn ack_one(&mut self, token: &String) -> Outcome {
        if self.fault == Fault::ForgetsAck && self.counts.acked == 0 {
            self.fault = Fault::None;
            return Outcome::Applied;
        }
        if self.leased.remove(token).is_none() {
            return Outcome::LeaseLost;
        }
        self.counts.acked += 1;
        Outcome::Applied
    }
}

fn overloaded() -> Status {
    let mut details = ErrorDetails::with_error_info(reason::OVERLOADED, ERROR_DOMAIN, HashMap::new());
    details.set_retry_info(Some(Duration::from_millis(1)));
    Status::with_error_details(Code::ResourceExhausted, "busy", details)
}

#[derive(Clone)]
struct Fake {
    queue: Arc<Mutex<Queue>>,
    /// Something was inserted.
    more: Arc<Notify>,
}

impl Fake {
    async fn serve(fault: Fault) -> String {
        Self::start(fault).await.0
    }

    async fn start(fault: Fault) -> (String, Self) {
        let (ready, leased, counts) = Default::default();
        let queue = Queue { fault, ready, leased, named: 0, batches: 0, counts };
        let fake = Self { queue: Arc::new(Mutex::new(queue)), more: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder()
            .add_service(DataQueueServer::new(fake.clone()))
            .add_service(QueueAdminServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (address, fake)
    }

    fn has_streams(&self) -> Result<(), Status> {
        let has = self.queue.lock().unwrap().fault != Fault::HasNoStreams;
        if has { Ok(()) } else { Err(Status::unimplemented("not yet")) }
    }

    /// Whether there is a task, after up to `wait`.
    async fn wait(&self, wait: Option<prost_types::Duration>) {
        let more = self.more.notified();
        if self.queue.lock().unwrap().ready.is_empty() {
            let _ = tokio::time::timeout(wait.unwrap_or_default().try_into().unwrap(), more).await;
        }
    }

    /// Sends tasks as long as there is room, and answers what is asked.
    async fn consume(
        self,
        mut requests: Streaming<v1::ConsumeRequest>,
        send: mpsc::Sender<Result<v1::ConsumeResponse, Status>>,
    ) {
        let (mut held, mut most) = (0, 0);
        loop {
            let more = self.more.notified();
            let room = most - held;
            let tasks: Vec<_> = {
                let mut queue = self.queue.lock().unwrap();
                let stalls = queue.fault == Fault::Stalls && queue.counts.acked >= 10;
                let room = if stalls { 0 } else { room.max(0) };
                (0..room).map_while(|_| queue.pop()).collect()
            };
            held += tasks.len() as i64;
            if !tasks.is_empty() {
                let _ = send.send(Ok(v1::ConsumeResponse { tasks, ..v1::ConsumeResponse::default() })).await;
            }
            let request = tokio::select! {
                request = requests.message() => request,
                () = more => continue,
            };
            match request {
                Ok(Some(v1::ConsumeRequest { request: Some(request) })) => match request {
                    consume_request::Request::Open(open) => most = i64::from(open.max_outstanding),
                    consume_request::Request::MaxOutstanding(outstanding) => most = i64::from(outstanding),
                    consume_request::Request::Ack(ack) => {
                        let outcomes = self.queue.lock().unwrap().ack(&ack.lease_tokens);
                        held -= outcomes.len() as i64;
                        let answers = vec![v1::ConsumeAnswer { outcomes, lease: None }];
                        let _ = send.send(Ok(v1::ConsumeResponse { answers, ..v1::ConsumeResponse::default() })).await;
                    }
                    _ => panic!("bench neither puts back nor sends heartbeats"),
                },
                _ => return,
            }
        }
    }
}

#[tonic::async_trait]
impl DataQueue for Fake {
    async fn insert(&self, request: Request<v1::InsertRequest>) -> Result<Response<v1::InsertResponse>, Status> {
        let results = self.queue.lock().unwrap().insert(request.into_inner().tasks);
        self.more.notify_waiters();
        Ok(Response::new(v1::InsertResponse { results, replayed: false, ..Default::default() }))
    }

    async fn pop(&self, request: Request<v1::PopRequest>) -> Result<Response<v1::PopResponse>, Status> {
        self.wait(request.into_inner().wait).await;
        let task = self.queue.lock().unwrap().pop();
        Ok(Response::new(v1::PopResponse { task, ack_outcomes: Vec::new() }))
    }

    type PopBatchStream = Pin<Box<dyn Stream<Item = Result<v1::PopBatchResponse, Status>> + Send>>;

    async fn pop_batch(&self, request: Request<v1::PopBatchRequest>) -> Result<Response<Self::PopBatchStream>, Status> {
        let request = request.into_inner();
        self.wait(request.wait).await;
        let mut queue = self.queue.lock().unwrap();
        queue.batches += 1;
        let overload_after = if queue.fault == Fault::Overloads { queue.batches - 1 } else { u64::MAX };
        let most = match overload_after {
            0 => 0,
            1 => request.max_tasks.div_ceil(2),
            _ => request.max_tasks,
        };
        let tasks: Vec<_> = (0..most).map_while(|_| queue.pop()).collect();
        // In two messages, as a server may.
        let mut messages: Vec<_> = tasks
            .chunks((request.max_tasks as usize).div_ceil(2).max(1))
            .map(|tasks| Ok(v1::PopBatchResponse { tasks: tasks.to_vec() }))
            .collect();
        if overload_after < 2 {
            messages.push(Err(overloaded()));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn ack(&self, request: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        let outcomes = self.queue.lock().unwrap().ack(&request.get_ref().lease_tokens);
        Ok(Response::new(v1::AckResponse { outcomes }))
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        Err(Status::unimplemented("bench sends no heartbeats"))
    }

    async fn putback(&self, _: Request<v1::PutbackRequest>) -> Result<Response<v1::PutbackResponse>, Status> {
        Err(Status::unimplemented("bench puts nothing back"))
    }

    type ProduceStream = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

    async fn produce(
        &self,
        requests: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        self.has_streams()?;
        let fake = self.clone();
        let answers = requests.into_inner().filter_map(move |request| match request.unwrap().request.unwrap() {
            produce_request::Request::Open(open) => {
                assert!(!open.producer_id.is_empty());
                None
            }
            produce_request::Request::Insert(v1::ProduceInsert { number, tasks }) => {
                let results = fake.queue.lock().unwrap().insert(tasks);
                fake.more.notify_waiters();
                Some(Ok(v1::ProduceResponse {
                    answers: vec![v1::ProduceAnswer { number, results, replayed: false, ..Default::default() }],
                }))
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<v1::ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        requests: Request<Streaming<v1::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        self.has_streams()?;
        let (send, receive) = mpsc::channel(16);
        tokio::spawn(self.clone().consume(requests.into_inner(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

#[tonic::async_trait]
impl QueueAdmin for Fake {
    async fn get_queue(&self, request: Request<v1::GetQueueRequest>) -> Result<Response<v1::GetQueueResponse>, Status> {
        let queue = self.queue.lock().unwrap();
        let (ready, leased) = (queue.ready.len() as u64, queue.leased.len() as u64);
        let counts = Some(v1::QueueCounts { ready, leased, ..queue.counts });
        let queue = Some(v1::Queue { name: request.into_inner().queue, counts, settings: None });
        Ok(Response::new(v1::GetQueueResponse { queue }))
    }

    async fn list_queues(&self, _: Request<v1::ListQueuesRequest>) -> Result<Response<v1::ListQueuesResponse>, Status> {
        Err(Status::unimplemented("bench has one queue"))
    }

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        Err(Status::unimplemented("an older server"))
    }

    async fn update_queue(
        &self,
        _: Request<v1::UpdateQueueRequest>,
    ) -> Result<Response<v1::UpdateQueueResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn delete_queue(
        &self,
        _: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn purge_queue(&self, _: Request<v1::PurgeQueueRequest>) -> Result<Response<v1::PurgeQueueResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn pause_queue(&self, _: Request<v1::PauseQueueRequest>) -> Result<Response<v1::PauseQueueResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn resume_queue(
        &self,
        _: Request<v1::ResumeQueueRequest>,
    ) -> Result<Response<v1::ResumeQueueResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn list_tasks(&self, _: Request<v1::ListTasksRequest>) -> Result<Response<v1::ListTasksResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn get_task(&self, _: Request<v1::GetTaskRequest>) -> Result<Response<v1::GetTaskResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn delete_tasks(
        &self,
        _: Request<v1::DeleteTasksRequest>,
    ) -> Result<Response<v1::DeleteTasksResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn import_tasks(
        &self,
        _: Request<v1::ImportTasksRequest>,
    ) -> Result<Response<v1::ImportTasksResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    async fn redrive_tasks(
        &self,
        _: Request<v1::RedriveTasksRequest>,
    ) -> Result<Response<v1::RedriveTasksResponse>, Status> {
        Err(Status::unimplemented("not for bench"))
    }

    type WatchQueuesStream = Pin<Box<dyn Stream<Item = Result<v1::WatchQueuesResponse, Status>> + Send>>;

    async fn watch_queues(
        &self,
        _: Request<v1::WatchQueuesRequest>,
    ) -> Result<Response<Self::WatchQueuesStream>, Status> {
        Err(Status::unimplemented("not for bench"))
    }
}

fn command(address: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_data-queue"));
    command.args(["bench", "--addr", address]).args(flags).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn bench(address: &str, flags: &[&str]) -> Output {
    command(address, flags).output().await.unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The object that a good run wrote.
#[track_caller]
fn good(output: &Output) -> Value {
    assert_eq!((output.status.code(), stderr(output).as_str()), (Some(0), ""), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["valid"], &report["interrupted"]), (&Value::Bool(true), &Value::Bool(false)));
    report
}

/// How often each call was made in a phase. The histogram has each of them.
fn calls(phase: &Value) -> Vec<(String, u64)> {
    let one = |call: &Value| {
        let steps = call["histogram"].as_array().unwrap().iter().map(|step| step["count"].as_u64().unwrap());
        let count = call["count"].as_u64().unwrap();
        assert_eq!(steps.sum::<u64>(), count, "{call}");
        let latency =
            ["p50_us", "p90_us", "p99_us", "p99_9_us", "max_us"].map(|at| call["latency"][at].as_f64().unwrap());
        assert!(latency[0] > 0.0 && latency.is_sorted(), "{call}");
        (call["call"].as_str().unwrap().to_owned(), count)
    };
    phase["calls"].as_array().unwrap().iter().map(one).collect()
}

fn named(counts: &[(&str, u64)]) -> Vec<(String, u64)> {
    counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[tokio::test]
async fn every_mode_and_phase_counts_each_task_and_call_once() {
    for (mode, batch) in [("unary", None), ("batch", Some("10")), ("stream", None), ("stream", Some("10"))] {
        for what in ["each", "insert", "drain", "both"] {
            let address = Fake::serve(Fault::None).await;
            let mut flags = vec!["--mode", mode, "--what", what, "--count", "200", "--callers", "4", "-o", "json"];
            flags.extend(batch.iter().flat_map(|batch| ["--batch", batch]));
            let report = good(&bench(&address, &flags).await);
            let context = format!("{mode} {what} {batch:?}: {report}");
            for name in ["inserted", "delivered", "acked"] {
                assert_eq!(report["verified"][name], 200, "{context}");
            }
            let phases = report["phases"].as_array().unwrap();
            let names: Vec<_> = phases.iter().map(|phase| phase["name"].as_str().unwrap()).collect();
            assert_eq!(names, if what == "each" { vec!["insert", "drain"] } else { vec![what] }, "{context}");
            assert!(phases.iter().all(|phase| phase["tasks"] == 200), "{context}");
            for phase in phases {
                let calls = calls(phase);
                let inserts = if batch.is_some() { 20 } else { 200 };
                if phase["name"] != "drain" {
                    assert_eq!(calls[0], ("insert".into(), inserts), "{context}");
                }
                if phase["name"] == "both" {
                    assert_eq!(calls[2], ("delivery".into(), 200), "{context}");
                } else if phase["name"] == "drain" && mode == "unary" {
                    assert_eq!(calls, named(&[("pop", 200), ("ack", 200)]), "{context}");
                }
            }
        }
    }
}

#[tokio::test]
async fn each_fault_makes_the_run_void_in_every_mode() {
    let faults = [
        (Fault::Loses, "1 missing"),
        (Fault::Doubles, " doubled"),
        (Fault::Alters, "1 unexpected"),
        (Fault::Damages, "1 damaged"),
        (Fault::Invents, "1 unexpected"),
        (Fault::ForgetsAck, "the queue has 0 ready, 1 leased"),
    ];
    let runs = ["unary", "batch", "stream"].into_iter().flat_map(|mode| ["each", "both"].map(|what| (mode, what)));
    let runs = runs.flat_map(|(mode, what)| faults.map(|(fault, words)| (mode, what, fault, words)));
    let runs = runs.map(|(mode, what, fault, words)| async move {
        let address = Fake::serve(fault).await;
        let flags = ["--mode", mode, "--what", what, "--count", "20", "--callers", "2", "-o", "json"];
        let output = bench(&address, &flags).await;
        let (context, said) = (format!("{mode} {what} {fault:?}: {output:?}"), stderr(&output));
        assert_eq!(output.status.code(), Some(1), "{context}");
        assert!(said.contains("void") && said.contains(words) && said.lines().count() == 1, "{context}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&report["valid"], report["phases"].as_array().unwrap().len()),
            (&Value::Bool(false), 0),
            "{context}"
        );
    });
    futures_util::future::join_all(runs).await;
}

#[tokio::test]
async fn a_void_table_shows_no_figures() {
    let output = bench(&Fake::serve(Fault::Loses).await, &["--count", "20"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("a second") && !text.contains("p99") && !text.contains("ok:"), "{text}");
    let text = String::from_utf8(bench(&Fake::serve(Fault::None).await, &["--count", "20"]).await.stdout).unwrap();
    assert!(text.contains("a second") && text.contains("p99.9") && text.contains("ok:"), "{text}");
    assert!(!text.contains('\u{1b}'), "colours without a terminal: {text}");
}

#[tokio::test]
async fn a_lease_that_ran_out_is_told_apart_and_is_no_fault() {
    for mode in ["unary", "batch", "stream"] {
        let address = Fake::serve(Fault::Expires).await;
        let report = good(&bench(&address, &["--mode", mode, "--count", "20", "--callers", "2", "-o", "json"]).await);
        let verified = &report["verified"];
        assert_eq!((&verified["expired"], &verified["lease_lost"]), (&1.into(), &1.into()), "{mode}: {report}");
        assert_eq!((&verified["acked"], &verified["doubled"]), (&20.into(), &0.into()), "{mode}: {report}");
    }
}

#[tokio::test]
async fn batches_that_an_overloaded_server_refuses_are_counted_and_asked_for_again() {
    for what in ["drain", "both"] {
        let address = Fake::serve(Fault::Overloads).await;
        let flags =
            ["--mode", "batch", "--what", what, "--count", "20", "--batch", "4", "--callers", "1", "-o", "json"];
        let report = good(&bench(&address, &flags).await);
        assert_eq!((&report["overloaded"], &report["verified"]["acked"]), (&2.into(), &20.into()), "{what}: {report}");
        // A refusal is no sign that nothing is left.
        assert_eq!(report["phases"][0]["tasks"], 20, "{what}: {report}");
    }
}

#[tokio::test]
async fn a_server_without_streams_is_named_in_one_line() {
    let address = Fake::serve(Fault::HasNoStreams).await;
    let output = bench(&address, &["--mode", "stream", "--count", "20"]).await;
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("does not offer Produce") && text.lines().count() == 1, "{text}");
    // What was put in before is not left behind.
    let output = bench(&address, &["--mode", "stream", "--what", "drain", "--count", "20"]).await;
    assert!(stderr(&output).contains("does not offer Consume"), "{output:?}");
    good(&bench(&address, &["--count", "20", "-o", "json"]).await);
}

#[tokio::test]
async fn an_open_loop_tells_what_was_intended() {
    for (mode, batch, calls) in [("unary", 1, 60), ("batch", 3, 20), ("stream", 1, 60)] {
        let address = Fake::serve(Fault::None).await;
        let mut flags = vec!["--mode", mode, "--what", "both", "--count", "60", "--rate", "300", "-o", "json"];
        if batch > 1 {
            flags.extend(["--batch", "3"]);
        }
        let report = good(&bench(&address, &flags).await);
        let phase = &report["phases"][0];
        let open_loop = &phase["open_loop"];
        assert_eq!(open_loop["intended_per_second"], 300.0, "{report}");
        assert!(open_loop["calls_begun"].as_u64() >= Some(calls) && open_loop["calls_not_begun"] == 0, "{report}");
        // The last insert starts 60 tasks, less its own, after the first.
        let shortest = f64::from(60 - batch) / 300.0;
        assert!(phase["seconds"].as_f64().unwrap() >= shortest, "{report}");
    }
}

#[tokio::test]
async fn an_interrupted_stream_leaves_an_empty_queue() {
    let (address, fake) = Fake::start(Fault::Stalls).await;
    let flags =
        ["--mode", "stream", "--what", "drain", "--count", "50", "--window", "5", "--callers", "1", "-o", "json"];
    let mut run = command(&address, &flags);
    let child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while fake.queue.lock().unwrap().counts.acked < 10 {
        tokio::task::yield_now().await;
    }
    let pid = child.id().unwrap().to_string();
    let killed = Command::new("kill").args(["-s", "INT", &pid]).status().await.unwrap();
    assert!(killed.success());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["valid"], &report["verified"]["acked"]), (&true.into(), &50.into()), "{report}");
    // Those that the stream held at its end were acked, and what came after them was not measured.
    assert!(report["phases"][0]["tasks"].as_u64() < Some(50), "{report}");
}

#[tokio::test]
async fn nobody_who_reads_changes_nothing() {
    let address = Fake::serve(Fault::None).await;
    let mut child =
        command(&address, &["--count", "20"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[tokio::test]
async fn what_cannot_start_says_so_in_one_line() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    for (address, flags, code, said) in [
        (nobody.as_str(), &[][..], 1, "cannot reach a server at"),
        ("no address", &[], 64, "--addr"),
        (&nobody, &["--callers", "0"], 64, "--callers"),
        (&nobody, &["--size", "7"], 64, "--size"),
        (&nobody, &["--what", "drain"], 64, "--count"),
        (&nobody, &["--nonsense"], 64, "--nonsense"),
    ] {
        let output = bench(address, flags).await;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(said) && text.lines().count() == 1, "{flags:?}: {text}");
        assert!(output.stdout.is_empty());
    }
    let output = Command::new(env!("CARGO_BIN_EXE_data-queue")).output().await.unwrap();
    assert_eq!((output.status.code(), stderr(&output).lines().count()), (Some(64), 1), "{output:?}");
}
