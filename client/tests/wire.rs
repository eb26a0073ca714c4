//! What the client sends and repeats, seen from a server that fails as it is told.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use data_queue_client::{Client, ErrorKind, NewTask, Outcome, Pop, PopBatch};
use data_queue_proto::v1::{
    self,
    data_queue_server::{DataQueue, DataQueueServer},
};
use tokio::net::TcpListener;
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const ABC_MD5: &str = "900150983cd24fb0d6963f7d28e17f72";

/// Answers calls from a script: each call takes the next failure, and is answered when none is left.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    failures: VecDeque<Status>,
    outcome: v1::Outcome,
    md5: Option<&'static str>,
    inserts: Vec<v1::InsertRequest>,
    pops: Vec<v1::PopRequest>,
    others: u32,
    timeouts: Vec<Duration>,
}

impl Fake {
    async fn serve(failures: impl IntoIterator<Item = Status>) -> (Self, Client) {
        let fake = Self::default();
        fake.0.lock().unwrap().failures.extend(failures);
        fake.0.lock().unwrap().outcome = v1::Outcome::Applied;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::connect(&listener.local_addr().unwrap().to_string()).unwrap();
        let server = Server::builder().add_service(DataQueueServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (fake, client)
    }

    fn next<M>(&self, request: Request<M>, note: impl FnOnce(&mut Script, M)) -> Result<(), Status> {
        let mut script = self.0.lock().unwrap();
        if let Some(timeout) = request.metadata().get("grpc-timeout") {
            let micros = timeout.to_str().unwrap().strip_suffix('u').unwrap().parse().unwrap();
            script.timeouts.push(Duration::from_micros(micros));
        }
        note(&mut script, request.into_inner());
        script.failures.pop_front().map_or(Ok(()), Err)
    }

    fn task(&self) -> v1::Task {
        v1::Task {
            id: "id-1".into(),
            queue: "q".into(),
            lease_token: TOKEN.into(),
            value: Some(v1::task::Value::Json("abc".into())),
            md5: self.0.lock().unwrap().md5.unwrap_or(ABC_MD5).into(),
            ..v1::Task::default()
        }
    }

    fn outcomes(&self, tokens: usize) -> Vec<i32> {
        vec![self.0.lock().unwrap().outcome.into(); tokens]
    }
}

#[tonic::async_trait]
impl DataQueue for Fake {
    async fn insert(&self, request: Request<v1::InsertRequest>) -> Result<Response<v1::InsertResponse>, Status> {
        let count = request.get_ref().tasks.len();
        self.next(request, |script, message| script.inserts.push(message))?;
        let results = (0..count).map(|n| v1::InsertResult { id: format!("id-{n}"), duplicate: false }).collect();
        Ok(Response::new(v1::InsertResponse { results, replayed: true, ..Default::default() }))
    }

    async fn pop(&self, request: Request<v1::PopRequest>) -> Result<Response<v1::PopResponse>, Status> {
        let acks = request.get_ref().ack_lease_tokens.len();
        self.next(request, |script, message| script.pops.push(message))?;
        Ok(Response::new(v1::PopResponse { task: Some(self.task()), ack_outcomes: self.outcomes(acks) }))
    }

    type PopBatchStream = Pin<Box<dyn Stream<Item = Result<v1::PopBatchResponse, Status>> + Send>>;

    async fn pop_batch(&self, request: Request<v1::PopBatchRequest>) -> Result<Response<Self::PopBatchStream>, Status> {
        self.next(request, |script, _| script.others += 1)?;
        let damaged = v1::Task { md5: String::new(), ..self.task() };
        let messages = [
            Ok(v1::PopBatchResponse { tasks: vec![self.task(), damaged, self.task()] }),
            Err(Status::unavailable("gone")),
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn ack(&self, request: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        let outcomes = self.outcomes(request.get_ref().lease_tokens.len());
        self.next(request, |script, _| script.others += 1)?;
        Ok(Response::new(v1::AckResponse { outcomes }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let outcomes = self.outcomes(request.get_ref().lease_tokens.len());
        self.next(request, |script, _| script.others += 1)?;
        let lease = Some(prost_types::Duration { seconds: 7, nanos: 0 });
        Ok(Response::new(v1::HeartbeatResponse { outcomes, lease, ..v1::HeartbeatResponse::default() }))
    }

    async fn putback(&self, request: Request<v1::PutbackRequest>) -> Result<Response<v1::PutbackResponse>, Status> {
        self.next(request, |script, _| script.others += 1)?;
        Ok(Response::new(v1::PutbackResponse { outcomes: self.outcomes(1), put_back: 1, dead_lettered: 0 }))
    }

    type ProduceStream = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

    async fn produce(
        &self,
        _: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        unreachable!("nothing here opens a stream of inserts")
    }

    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<v1::ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        _: Request<Streaming<v1::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        unreachable!("nothing here opens a stream of tasks")
    }
}

#[tokio::test]
async fn a_repeated_insert_is_the_same_request() {
    let (fake, client) = Fake::serve([Status::unavailable("starting"), Status::unknown("broken")]).await;
    let inserted = client.insert_many("q", [NewTask::json_text("1"), NewTask::bytes("2")]).await.unwrap();
    assert_eq!((inserted.tasks.len(), inserted.replayed), (2, true));
    client.insert_as("q", [NewTask::json_text("1")], "mine").await.unwrap();

    let script = fake.0.lock().unwrap();
    assert_eq!(script.inserts.len(), 4);
    assert_eq!(script.inserts[0].request_id.len(), 32);
    assert!(script.inserts[0] == script.inserts[1] && script.inserts[1] == script.inserts[2]);
    assert_eq!(script.inserts[3].request_id, "mine");
}

#[tokio::test]
async fn each_try_gets_what_is_left_of_the_deadline() {
    let (fake, client) = Fake::serve([Status::unavailable("starting"), Status::internal("proxy")]).await;
    client.pop("q", Pop::new().wait(Duration::from_secs(5))).await.unwrap();
    let timeouts = fake.0.lock().unwrap().timeouts.clone();
    assert!(timeouts.len() == 3 && timeouts.is_sorted_by(|one, next| one > next), "{timeouts:?}");
    assert!(timeouts[0] <= Duration::from_secs(35) && timeouts[2] > Duration::from_secs(30));
}

#[tokio::test]
async fn a_repeated_pop_differs_only_in_its_wait_which_shrinks() {
    let (fake, client) = Fake::serve([Status::cancelled("reset"), Status::unavailable("moved")]).await;
    let pop = Pop::new().lease(Duration::from_secs(9)).wait(Duration::from_secs(5)).ack_token(TOKEN).ack_token(TOKEN);
    let popped = client.pop("q", pop).await.unwrap();
    assert_eq!(popped.ack_outcomes, [Outcome::Applied; 2]);
    assert_eq!(popped.task.unwrap().text(), Some("abc"));

    let pops = fake.0.lock().unwrap().pops.clone();
    let waits: Vec<_> = pops.iter().map(|pop| Duration::try_from(pop.wait.unwrap()).unwrap()).collect();
    assert!(waits.len() == 3 && waits.is_sorted_by(|one, next| one > next), "{waits:?}");
    let same: Vec<_> = pops.into_iter().map(|pop| v1::PopRequest { wait: None, ..pop }).collect();
    assert!(same[0] == same[1] && same[1] == same[2]);
    assert_eq!((same[0].request_id.len(), same[0].ack_lease_tokens.len()), (32, 2));
}

#[tokio::test]
async fn ack_heartbeat_and_putback_are_repeated_and_tell_a_lost_lease() {
    let (fake, client) = Fake::serve([]).await;
    let task = client.pop("q", Pop::new()).await.unwrap().task.unwrap();
    fake.0.lock().unwrap().failures.push_back(Status::unavailable("moved"));
    client.ack(&task).await.unwrap();
    assert_eq!(client.heartbeat(&task, None).await.unwrap(), Duration::from_secs(7));
    client.putback(&task).await.unwrap();
    assert_eq!(fake.0.lock().unwrap().others, 4);

    fake.0.lock().unwrap().outcome = v1::Outcome::AlreadyAcked;
    client.ack(&task).await.unwrap();
    assert_eq!(client.heartbeat(&task, None).await.unwrap_err().kind(), ErrorKind::AlreadyAcked);
    fake.0.lock().unwrap().outcome = v1::Outcome::LeaseLost;
    for answer in [client.ack(&task).await, client.heartbeat(&task, None).await.map(drop), client.putback(&task).await]
    {
        let error = answer.unwrap_err();
        assert_eq!((error.kind(), error.task_id()), (ErrorKind::LeaseLost, Some("id-1")));
        assert!(!format!("{error:?}").contains(TOKEN));
    }
    assert_eq!(client.ack_tokens("q", [TOKEN, TOKEN]).await.unwrap(), [Outcome::LeaseLost; 2]);
}

#[tokio::test]
async fn what_may_have_happened_and_is_not_safe_is_tried_once() {
    let (fake, client) = Fake::serve([Status::unavailable("moved"), Status::unknown("broken")]).await;
    let error = client.putback_held_for("q", Duration::ZERO).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(client.pop_batch("q", PopBatch::new(1)).await.unwrap_err().is_retriable());
    assert_eq!(fake.0.lock().unwrap().others, 2);
}

#[tokio::test]
async fn a_stream_goes_on_after_a_damaged_task_and_ends_after_an_error() {
    let (fake, client) = Fake::serve([]).await;
    let mut tasks = client.pop_batch("q", PopBatch::new(3)).await.unwrap();
    let mut kinds = Vec::new();
    while let Some(next) = tasks.next().await {
        kinds.push(next.map_err(|error| error.kind()).map(|task| task.id().to_owned()));
    }
    let whole = || Ok("id-1".to_owned());
    assert_eq!(kinds, [whole(), Err(ErrorKind::Corrupt), whole(), Err(ErrorKind::Unavailable)]);
    assert!(tasks.next().await.is_none());

    fake.0.lock().unwrap().md5 = Some("00000000000000000000000000000000");
    assert_eq!(client.pop("q", Pop::new()).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn a_client_may_start_before_its_server_and_outlive_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = Client::connect(&format!("http://{address}")).unwrap();
    let insert = tokio::spawn({
        let client = client.clone();
        async move { client.insert("q", NewTask::json_text("1")).await }
    });
    tokio::task::yield_now().await;

    for _ in 0..2 {
        let listener = TcpListener::bind(address).await.unwrap();
        let server = Server::builder().add_service(DataQueueServer::new(Fake::default()));
        let server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        client.insert("q", NewTask::json_text("2")).await.unwrap();
        server.abort();
        let _ = server.await;
    }
    insert.await.unwrap().unwrap();
}

#[tokio::test]
async fn without_a_server_a_call_ends_with_its_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let client = Client::builder().deadline(Duration::from_millis(200)).connect(&address).unwrap();
    let error = client.insert("q", NewTask::json_text("1")).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded), "{error:?}");

    let client = Client::builder().retry_budget(0).connect(&address).unwrap();
    let error = client.insert("q", NewTask::json_text("1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
}
