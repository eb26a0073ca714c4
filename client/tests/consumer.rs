//! What a consumer sends, seen from a server that a test plays by hand.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::HashMap, pin::Pin, time::Duration};

use data_queue_client::{Assigned, Client, Consumer, ConsumerBuilder, Delivered, ErrorKind, Outcome, Putback, Worker};
use data_queue_proto::{
    ERROR_DOMAIN, reason,
    v1::{
        self, ConsumeAnswer, ConsumeOpen, ConsumeRequest, ConsumeResponse, ResumedQueue,
        consume_request::Request as Said,
        data_queue_server::{DataQueue, DataQueueServer},
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

const PATIENCE: Duration = Duration::from_secs(30);
const MD5_OF_1: &str = "c4ca4238a0b923820dcc509a6f75849b";

/// Hands every stream that is opened to the test.
struct Stage(mpsc::Sender<Line>);

/// The server's end of a stream.
struct Line {
    requests: Streaming<ConsumeRequest>,
    responses: mpsc::Sender<Result<ConsumeResponse, Status>>,
}

/// The streams that a consumer opens, in order.
struct Lines(mpsc::Receiver<Line>);

impl Lines {
    async fn next(&mut self) -> (Line, ConsumeOpen) {
        let mut line = timeout(PATIENCE, self.0.recv()).await.expect("a stream in time").unwrap();
        match line.hear().await {
            Said::Open(open) => (line, open),
            other => panic!("no open: {other:?}"),
        }
    }
}

impl Line {
    async fn hear(&mut self) -> Said {
        self.heard().await.expect("the client goes on")
    }

    /// `None` after the half-close.
    async fn heard(&mut self) -> Option<Said> {
        let message = timeout(PATIENCE, self.requests.message()).await.expect("a request in time").unwrap();
        message.map(|message| message.request.unwrap())
    }

    async fn say(&self, message: ConsumeResponse) {
        self.responses.send(Ok(message)).await.unwrap();
    }

    async fn send(&self, numbers: std::ops::Range<u8>) {
        self.say(ConsumeResponse { tasks: numbers.map(task).collect(), ..ConsumeResponse::default() }).await;
    }

    async fn answer(&self, outcomes: impl IntoIterator<Item = v1::Outcome>) {
        let outcomes = outcomes.into_iter().map(i32::from).collect();
        let answers = vec![ConsumeAnswer { outcomes, lease: None }];
        self.say(ConsumeResponse { answers, ..ConsumeResponse::default() }).await;
    }

    async fn fail(self, status: Status) {
        self.responses.send(Err(status)).await.unwrap();
    }
}

fn token(number: u8) -> String {
    format!("{number:032x}")
}

fn tokens(numbers: impl IntoIterator<Item = u8>) -> Vec<String> {
    numbers.into_iter().map(token).collect()
}

fn task(number: u8) -> v1::Task {
    v1::Task {
        id: format!("id-{number}"),
        queue: "q".into(),
        lease_token: token(number),
        value: Some(v1::task::Value::Json("1".into())),
        md5: MD5_OF_1.into(),
        ..v1::Task::default()
    }
}

fn resumed(numbers: impl IntoIterator<Item = u8>) -> ConsumeResponse {
    let resumed = vec![ResumedQueue { queue: "q".into(), lease_tokens: tokens(numbers) }];
    ConsumeResponse { resumed, ..ConsumeResponse::default() }
}

fn acked(said: Said) -> Vec<String> {
    match said {
        Said::Ack(ack) => ack.lease_tokens,
        other => panic!("no ack: {other:?}"),
    }
}

fn put_back(said: Said) -> Vec<String> {
    match said {
        Said::Putback(putback) => putback.lease_tokens,
        other => panic!("no putback: {other:?}"),
    }
}

fn beaten(said: Said) -> Vec<String> {
    match said {
        Said::Heartbeat(heartbeat) => heartbeat.lease_tokens,
        other => panic!("no heartbeat: {other:?}"),
    }
}

fn refusal(code: Code, reason: &str) -> Status {
    Status::with_error_details(code, "no", ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new()))
}

async fn serve() -> (Lines, ConsumerBuilder) {
    let (lines, client) = serve_client().await;
    (lines, client.consumer("q"))
}

async fn serve_client() -> (Lines, Client) {
    let (sender, lines) = mpsc::channel(16);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::connect(&listener.local_addr().unwrap().to_string()).unwrap();
    let server = Server::builder().add_service(DataQueueServer::new(Stage(sender)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (Lines(lines), client)
}

async fn take(consumer: &mut Consumer, count: usize) -> Vec<Delivered> {
    let mut tasks = Vec::new();
    while tasks.len() < count {
        tasks.push(timeout(PATIENCE, consumer.next()).await.expect("a task in time").unwrap().unwrap());
    }
    tasks
}

#[tokio::test]
async fn what_waits_goes_together() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.max_outstanding(250).start().unwrap();
    let (mut line, open) = lines.next().await;
    assert_eq!((open.queues.len(), open.max_outstanding, open.session.len()), (1, 250, 16));
    line.send(0..200).await;
    let tasks = take(&mut consumer, 200).await;
    assert!(tasks.iter().all(|task| task.bytes() == b"1"));
    for (number, task) in tasks.into_iter().enumerate() {
        if number < 190 { task.done() } else { drop(task) }
    }
    assert_eq!(acked(line.hear().await), tokens(0..190));
    assert_eq!(put_back(line.hear().await), tokens(190..200));
    line.answer([v1::Outcome::Applied; 187].into_iter().chain([
        v1::Outcome::AlreadyAcked,
        v1::Outcome::LeaseLost,
        v1::Outcome::LeaseLost,
    ]))
    .await;
    line.answer([v1::Outcome::Applied; 10]).await;
    let closing = tokio::spawn(consumer.close());
    assert_eq!(line.hear().await, Said::MaxOutstanding(0));
    // The server has not said yet that it heard it: a task may be on its way, and goes back.
    assert_eq!(beaten(line.hear().await).len(), 1);
    line.send(200..201).await;
    line.answer([v1::Outcome::LeaseLost]).await;
    assert_eq!(put_back(line.hear().await), tokens([200]));
    line.answer([v1::Outcome::Applied]).await;
    assert_eq!(line.heard().await, None);
    drop(line);
    assert_eq!(closing.await.unwrap().unwrap(), 2, "two acks came too late");
}

#[tokio::test]
async fn only_those_that_go_back_alike_go_together_and_a_cancel_is_told() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let (mut line, _) = lines.next().await;
    line.send(1..7).await;
    let mut tasks = take(&mut consumer, 6).await.into_iter();
    let second = Duration::from_secs(1);
    for options in [
        Putback::new().delay(second),
        Putback::new().delay(second),
        Putback::new().failed(true).reason("why"),
        Putback::new(),
    ] {
        // What is asked is noted when it is asked; nobody waits for the answer.
        let mut asked = Box::pin(tasks.next().unwrap().put_back_with(options));
        assert!(futures_util::FutureExt::now_or_never(asked.as_mut()).is_none());
    }
    let too_late = Putback::new().delay(Duration::from_secs(400 * 24 * 60 * 60));
    let error = tasks.next().unwrap().put_back_with(too_late).await.unwrap_err();
    assert_eq!(error.field(), Some("delay"));
    let mut said = Vec::new();
    for count in [2, 1, 2] {
        let Said::Putback(putback) = line.hear().await else { panic!("no putback") };
        assert_eq!(putback.lease_tokens.len(), count, "{putback:?}");
        line.answer(vec![v1::Outcome::Applied; count]).await;
        said.push((putback.delay.is_some(), putback.failed, putback.reason));
    }
    assert_eq!(said, [(true, false, String::new()), (false, true, "why".into()), (false, false, String::new())]);

    let held = tasks.next().unwrap();
    let cancel = |numbers: [u8; 2]| ConsumeResponse {
        cancel: vec![v1::CancelledTasks { queue: "q".into(), lease_tokens: tokens(numbers) }],
        ..ConsumeResponse::default()
    };
    assert!(!held.is_cancelled());
    // One of them is not known here any more.
    line.say(cancel([1, 6])).await;
    timeout(PATIENCE, held.cancelled()).await.expect("to be told");
    line.say(cancel([6, 6])).await;
    assert!(held.is_cancelled() && !held.is_lost());
    held.done();
    assert_eq!(acked(line.hear().await), tokens([6]));
}

#[tokio::test]
async fn after_a_break_the_session_goes_on() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let (mut line, open) = lines.next().await;
    line.send(1..7).await;
    let mut tasks = take(&mut consumer, 5).await.into_iter();
    let acking = tokio::spawn(tasks.next().unwrap().ack());
    assert_eq!(acked(line.hear().await), tokens([1]));
    let giving = tokio::spawn(tasks.next().unwrap().putback());
    assert_eq!(put_back(line.hear().await), tokens([2]));
    line.fail(Status::unavailable("gone")).await;

    // 3 to 5 are with the handler, 6 was not handed out; 9 was lost on its way.
    let (mut line, again) = lines.next().await;
    assert_eq!(again, open);
    line.say(resumed([3, 5, 9])).await;
    assert_eq!(acked(line.hear().await), tokens([1]));
    line.answer([v1::Outcome::AlreadyAcked]).await;
    acking.await.unwrap().unwrap();
    let (mut asked, mut given) = (Vec::new(), Vec::new());
    let mut answered = 0;
    while !(asked.contains(&token(4)) && given.len() == 3) {
        let said = line.hear().await;
        answered += 1;
        match said {
            Said::Heartbeat(heartbeat) => {
                line.answer(vec![v1::Outcome::LeaseLost; heartbeat.lease_tokens.len()]).await;
                asked.extend(heartbeat.lease_tokens);
            }
            said => {
                let tokens = put_back(said);
                line.answer(vec![v1::Outcome::LeaseLost; tokens.len()]).await;
                given.extend(tokens);
            }
        }
        assert!(answered < 10);
    }
    given.sort_unstable();
    assert_eq!(given, tokens([2, 6, 9]), "said again, not handed out, and not known");
    assert!(!asked.contains(&token(3)) && !asked.contains(&token(5)), "what was taken over is kept by the server");
    assert_eq!(giving.await.unwrap().unwrap_err().kind(), ErrorKind::LeaseLost);
    let tasks: Vec<_> = tasks.collect();
    timeout(PATIENCE, tasks[1].lost()).await.expect("to be told");
    assert_eq!(tasks.iter().map(Delivered::is_lost).collect::<Vec<_>>(), [false, true, false]);
    // Nothing is handed out twice.
    line.send(3..4).await;
    line.send(7..8).await;
    assert_eq!(take(&mut consumer, 1).await[0].id(), "id-7");
    let all = tokio::spawn(async move { consumer.ack_all(tasks).await });
    while !matches!(line.hear().await, Said::Ack(ack) if ack.lease_tokens == tokens([3, 4, 5])) {
        line.answer([v1::Outcome::Applied]).await;
    }
    line.answer([v1::Outcome::Applied, v1::Outcome::LeaseLost, v1::Outcome::AlreadyAcked]).await;
    assert_eq!(all.await.unwrap().unwrap(), [Outcome::Applied, Outcome::LeaseLost, Outcome::AlreadyAcked]);
}

#[tokio::test]
async fn a_drain_opens_the_next_stream_before_the_old_one_ends() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let (mut line, open) = lines.next().await;
    line.send(1..4).await;
    let mut tasks = take(&mut consumer, 3).await;
    let first = tokio::spawn(tasks.remove(0).putback());
    assert_eq!(put_back(line.hear().await), tokens([1]));
    line.say(ConsumeResponse { drain: true, ..ConsumeResponse::default() }).await;

    let (mut next, again) = lines.next().await;
    assert_eq!(again, open);
    // What was asked on the old one is answered there.
    line.answer([v1::Outcome::Applied]).await;
    first.await.unwrap().unwrap();
    next.say(resumed([2, 3])).await;
    assert_eq!(beaten(next.hear().await), tokens([0]), "tell what was taken over");
    next.answer([v1::Outcome::LeaseLost]).await;
    let second = tokio::spawn(tasks.remove(0).ack());
    assert_eq!(acked(next.hear().await), tokens([2]));
    next.answer([v1::Outcome::Applied]).await;
    second.await.unwrap().unwrap();
    assert!(!tasks[0].is_lost());
}

#[tokio::test]
async fn a_damaged_task_is_put_back_and_the_stream_goes_on() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let (mut line, _) = lines.next().await;
    let damaged = v1::Task { md5: MD5_OF_1.replace('c', "d"), ..task(1) };
    line.say(ConsumeResponse { tasks: vec![damaged, task(2)], ..ConsumeResponse::default() }).await;
    let error = consumer.next().await.unwrap_err();
    assert_eq!((error.kind(), error.task_id()), (ErrorKind::Corrupt, Some("id-1")));
    assert_eq!(consumer.next().await.unwrap().unwrap().id(), "id-2");
    // At once it would come again at once.
    assert_eq!(put_back(line.hear().await), tokens([2]));
    drop(consumer);
    assert_eq!(line.hear().await, Said::MaxOutstanding(0));
    assert_eq!(put_back(line.hear().await), tokens([1]));
}

#[tokio::test]
async fn a_damaged_task_rests_for_a_lease() {
    const LEASE: Duration = Duration::from_millis(300);
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let (mut line, _) = lines.next().await;
    for number in 1..3 {
        let lease = prost_types::Duration::try_from(LEASE).unwrap();
        let damaged = v1::Task { md5: MD5_OF_1.replace('c', "d"), lease: Some(lease), ..task(number) };
        let before = Instant::now();
        line.say(ConsumeResponse { tasks: vec![damaged], ..ConsumeResponse::default() }).await;
        assert_eq!(consumer.next().await.unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(put_back(line.hear().await), tokens([number]));
        assert!(before.elapsed() >= LEASE);
        line.answer([v1::Outcome::Applied]).await;
    }
}

/// A worker's handler never sees it, and it is given up in the end. What is delivered twice is handled once.
#[tokio::test]
async fn a_damaged_task_has_failed_for_a_worker() {
    let (mut lines, client) = serve_client().await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let handler = move |task: Assigned| {
        let sender = sender.clone();
        async move { sender.send(task.id().to_owned()) }
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async { stopped.await.unwrap_or_default() };
    let run = tokio::spawn(Worker::new(&client, "q").concurrency(2).run_until(stopped, handler));
    let (mut line, open) = lines.next().await;
    assert_eq!(open.max_outstanding, 2);
    let damaged = v1::Task { md5: MD5_OF_1.replace('c', "d"), ..task(1) };
    line.say(ConsumeResponse { tasks: vec![damaged], ..ConsumeResponse::default() }).await;
    let Said::Putback(putback) = line.hear().await else { panic!("no putback") };
    assert!(putback.failed && putback.reason.contains("md5") && putback.lease_tokens == tokens([1]), "{putback:?}");
    line.answer([v1::Outcome::Applied]).await;
    line.send(2..3).await;
    line.send(2..3).await;
    assert_eq!(acked(line.hear().await), tokens([2]));
    line.answer([v1::Outcome::Applied]).await;
    stop.send(()).unwrap();
    assert_eq!(line.hear().await, Said::MaxOutstanding(0));
    assert_eq!(beaten(line.hear().await).len(), 1);
    line.answer([v1::Outcome::LeaseLost]).await;
    assert_eq!(line.heard().await, None);
    drop(line);
    let summary = timeout(PATIENCE, run).await.expect("an end in time").unwrap().unwrap();
    assert_eq!((summary.done, summary.failed, summary.lost), (1, 1, 0));
    assert_eq!((seen.recv().await.as_deref(), seen.recv().await), (Some("id-2"), None));
}

#[tokio::test]
async fn what_no_reconnect_helps_against_is_the_end() {
    for status in [
        Status::unimplemented("no such call"),
        Status::permission_denied("not you"),
        Status::unauthenticated("who are you"),
        refusal(Code::InvalidArgument, reason::CONSUME_INVALID),
        refusal(Code::Internal, reason::INTERNAL),
    ] {
        let (mut lines, builder) = serve().await;
        let mut consumer = builder.start().unwrap();
        let (line, _) = lines.next().await;
        line.send(1..2).await;
        let task = take(&mut consumer, 1).await.remove(0);
        let code = status.code();
        line.fail(status).await;
        let error = timeout(PATIENCE, consumer.next()).await.expect("an end").unwrap_err();
        assert!(!error.is_retriable(), "{code:?}: {error}");
        assert!(consumer.next().await.unwrap().is_none());
        timeout(PATIENCE, task.lost()).await.expect("to be told");
        assert_eq!(task.ack().await.unwrap_err().kind(), error.kind());
    }
}

#[tokio::test]
async fn what_passes_is_tried_again_and_a_stolen_session_once() {
    let (mut lines, builder) = serve().await;
    let mut consumer = builder.start().unwrap();
    let mut busy = ErrorDetails::with_error_info(reason::OVERLOADED, ERROR_DOMAIN, HashMap::new());
    busy.set_retry_info(Some(Duration::from_millis(1)));
    for status in [
        Status::with_error_details(Code::ResourceExhausted, "busy", busy),
        // How a connection ends on which the peer was told to calm down.
        Status::resource_exhausted("calm down"),
        Status::deadline_exceeded("you did not read"),
        refusal(Code::Unavailable, reason::SHUTTING_DOWN),
        refusal(Code::Aborted, reason::SESSION_TAKEN_OVER),
    ] {
        let (line, _) = lines.next().await;
        line.fail(status).await;
    }
    // One that has lived for a while was this consumer's own, though nothing was delivered on it.
    let (mut line, _) = lines.next().await;
    consumer.pause();
    assert_eq!(line.hear().await, Said::MaxOutstanding(0), "it is open on the other side too");
    let more = timeout(Duration::from_millis(1_100), line.heard()).await;
    assert!(more.is_err(), "it stays, and has nothing to say: {more:?}");
    line.fail(refusal(Code::Aborted, reason::SESSION_TAKEN_OVER)).await;
    let (line, _) = lines.next().await;
    line.fail(refusal(Code::Aborted, reason::SESSION_TAKEN_OVER)).await;
    // Where all is slow, one of these may have lived for a while too.
    let again = async {
        loop {
            let (line, _) = lines.next().await;
            line.fail(refusal(Code::Aborted, reason::SESSION_TAKEN_OVER)).await;
        }
    };
    let error = tokio::select! {
        ended = timeout(PATIENCE, consumer.next()) => ended.expect("an end").unwrap_err(),
        () = again => unreachable!(),
    };
    assert_eq!(error.reason(), Some(reason::SESSION_TAKEN_OVER));
}

#[tonic::async_trait]
impl DataQueue for Stage {
    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let (responses, outbox) = mpsc::channel(16);
        self.0.send(Line { requests: request.into_inner(), responses }).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(outbox))))
    }

    async fn insert(&self, _: Request<v1::InsertRequest>) -> Result<Response<v1::InsertResponse>, Status> {
        unreachable!("only streams of tasks are played")
    }

    async fn pop(&self, _: Request<v1::PopRequest>) -> Result<Response<v1::PopResponse>, Status> {
        unreachable!("only streams of tasks are played")
    }

    type PopBatchStream = Pin<Box<dyn Stream<Item = Result<v1::PopBatchResponse, Status>> + Send>>;

    async fn pop_batch(&self, _: Request<v1::PopBatchRequest>) -> Result<Response<Self::PopBatchStream>, Status> {
        unreachable!("only streams of tasks are played")
    }

    async fn ack(&self, _: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        unreachable!("only streams of tasks are played")
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        unreachable!("only streams of tasks are played")
    }

    async fn putback(&self, _: Request<v1::PutbackRequest>) -> Result<Response<v1::PutbackResponse>, Status> {
        unreachable!("only streams of tasks are played")
    }

    type ProduceStream = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

    async fn produce(
        &self,
        _: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        unreachable!("only streams of tasks are played")
    }
}
