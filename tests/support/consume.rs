//! A stream of deliveries, as a client sees it.

use std::time::Duration;

use data_queue_proto::v1::{
    ConsumeAck, ConsumeAnswer, ConsumeHeartbeat, ConsumeOpen, ConsumePutback, ConsumeQueue, ConsumeRequest,
    ConsumeResponse, Outcome, Task, consume_request::Request,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{
    PATIENCE,
    call::{outcomes, proto},
    server::Client,
};

/// A queue with weight 1, held for an hour unless it is kept.
pub fn open(queue: &str, max_outstanding: u32) -> ConsumeOpen {
    ConsumeOpen {
        queues: vec![ConsumeQueue { name: queue.to_owned(), weight: 0 }],
        lease: Some(proto(Duration::from_secs(3_600))),
        max_outstanding,
        ..ConsumeOpen::default()
    }
}

pub fn request(request: Request) -> ConsumeRequest {
    ConsumeRequest { request: Some(request) }
}

/// An open stream. Dropping it breaks it.
pub struct Consumer {
    requests: Option<mpsc::Sender<ConsumeRequest>>,
    responses: Streaming<ConsumeResponse>,
    /// What came and was not asked for so far.
    pub tasks: Vec<Task>,
    pub answers: Vec<ConsumeAnswer>,
    /// Tokens that the stream took over, of all queues.
    pub resumed: Vec<String>,
    pub drain: bool,
}

impl Consumer {
    pub async fn open(client: &mut Client, open: ConsumeOpen) -> Self {
        Self::begin(client, request(Request::Open(open))).await
    }

    /// With whatever first message.
    pub async fn begin(client: &mut Client, first: ConsumeRequest) -> Self {
        let (requests, outbox) = mpsc::channel(1_024);
        requests.send(first).await.unwrap();
        let responses = client.consume(ReceiverStream::new(outbox)).await.expect("a stream").into_inner();
        let (tasks, answers, resumed) = (Vec::new(), Vec::new(), Vec::new());
        Self { requests: Some(requests), responses, tasks, answers, resumed, drain: false }
    }

    pub async fn say(&self, what: Request) {
        let requests = self.requests.as_ref().expect("the client has not closed its half");
        requests.send(request(what)).await.expect("the stream lives");
    }

    /// Reads one message; `None` at the end.
    pub async fn read(&mut self) -> Result<Option<()>, Status> {
        let Some(message) = timeout(PATIENCE, self.responses.message()).await.expect("a message in time")? else {
            return Ok(None);
        };
        assert_ne!(message, ConsumeResponse::default(), "an empty message");
        self.tasks.extend(message.tasks);
        self.answers.extend(message.answers);
        self.resumed.extend(message.resumed.into_iter().flat_map(|queue| queue.lease_tokens));
        self.drain |= message.drain;
        Ok(Some(()))
    }

    async fn read_on(&mut self) {
        self.read().await.expect("no error").expect("the stream goes on");
    }

    /// The next tasks, exactly so many.
    pub async fn take(&mut self, count: usize) -> Vec<Task> {
        while self.tasks.len() < count {
            self.read_on().await;
        }
        self.tasks.drain(..count).collect()
    }

    /// The next answer.
    pub async fn answer(&mut self) -> ConsumeAnswer {
        while self.answers.is_empty() {
            self.read_on().await;
        }
        self.answers.remove(0)
    }

    pub async fn ack(&mut self, queue: &str, tasks: &[Task]) -> Vec<Outcome> {
        self.say(ack(queue, tasks)).await;
        outcomes(&self.answer().await.outcomes)
    }

    pub async fn put_back(&mut self, tasks: &[Task]) -> Vec<Outcome> {
        self.say(Request::Putback(ConsumePutback { lease_tokens: tokens(tasks), ..ConsumePutback::default() })).await;
        outcomes(&self.answer().await.outcomes)
    }

    pub async fn heartbeat(&mut self, tasks: &[Task], lease: Duration) -> ConsumeAnswer {
        let (queue, lease_tokens) = (String::new(), tokens(tasks));
        self.say(Request::Heartbeat(ConsumeHeartbeat { queue, lease_tokens, lease: Some(proto(lease)) })).await;
        self.answer().await
    }

    /// The client says no more.
    pub fn close(&mut self) {
        self.requests = None;
    }

    /// Reads to the end.
    pub async fn end(&mut self) -> Result<(), Status> {
        while self.read().await?.is_some() {}
        Ok(())
    }
}

pub fn ack(queue: &str, tasks: &[Task]) -> Request {
    Request::Ack(ConsumeAck { queue: queue.to_owned(), lease_tokens: tokens(tasks) })
}

pub fn tokens(tasks: &[Task]) -> Vec<String> {
    tasks.iter().map(|task| task.lease_token.clone()).collect()
}
