//! The calls of the contract, short enough to write a table of them.

use std::time::Duration;

use data_queue_proto::v1::{
    AckRequest, GetQueueRequest, HeartbeatRequest, InsertRequest, ListQueuesRequest, NewTask, Outcome, PopBatchRequest,
    PopRequest, PutbackRequest, PutbackResponse, PutbackTokens, QueueCounts, Task, new_task,
    putback_request::Selection, task,
};
use prost_types::Duration as ProtoDuration;
use tonic::Status;

use super::{PATIENCE, server::Client, unique_queue};

/// One call of any method that needs the store.
#[derive(Clone, Debug)]
pub enum Call {
    Insert(InsertRequest),
    Pop(PopRequest),
    PopBatch(PopBatchRequest),
    Ack(AckRequest),
    Heartbeat(HeartbeatRequest),
    Putback(PutbackRequest),
    GetQueue(GetQueueRequest),
    ListQueues(ListQueuesRequest),
}

impl Call {
    /// Sends it and reads the answer to its end.
    pub async fn send(self, client: &mut Client) -> Result<(), Status> {
        match self {
            Self::Insert(request) => client.insert(request).await.map(drop),
            Self::Pop(request) => client.pop(request).await.map(drop),
            Self::PopBatch(request) => pop_batch(client, request).await.map(drop),
            Self::Ack(request) => client.ack(request).await.map(drop),
            Self::Heartbeat(request) => client.heartbeat(request).await.map(drop),
            Self::Putback(request) => client.putback(request).await.map(drop),
            Self::GetQueue(request) => client.admin.get_queue(request).await.map(drop),
            Self::ListQueues(request) => client.admin.list_queues(request).await.map(drop),
        }
    }

    /// A good call of every method that needs the store.
    pub fn every_at_all(queue: &str) -> Vec<Self> {
        let mut calls = Self::every(queue);
        calls.push(Self::ListQueues(ListQueuesRequest::default()));
        calls
    }

    /// A good call of every method that names a queue, on this one.
    pub fn every(queue: &str) -> Vec<Self> {
        let mut calls = Self::every_with_tokens(queue, &[unknown_token()]);
        calls.extend([
            Self::Insert(insert_request(queue, vec![json("1")])),
            Self::PopBatch(PopBatchRequest { max_tasks: 1, ..pop_batch_request(queue) }),
            Self::Putback(PutbackRequest {
                queue: queue.to_owned(),
                selection: Some(Selection::HeldFor(ProtoDuration { seconds: 3_600, nanos: 0 })),
            }),
            Self::GetQueue(get_queue_request(queue)),
        ]);
        calls
    }

    /// A call of every method that takes tokens, with these.
    pub fn every_with_tokens(queue: &str, tokens: &[String]) -> Vec<Self> {
        let mut calls = Self::every_that_needs_tokens(queue, tokens);
        calls.push(Self::Pop(PopRequest { ack_lease_tokens: tokens.to_vec(), ..pop_request(queue) }));
        calls
    }

    /// A call of every method that has nothing to do without tokens, with these.
    pub fn every_that_needs_tokens(queue: &str, tokens: &[String]) -> Vec<Self> {
        vec![
            Self::Ack(ack_request(queue, tokens)),
            Self::Heartbeat(heartbeat_request(queue, tokens)),
            Self::Putback(putback_request(queue, tokens)),
        ]
    }
}

pub fn json(text: &str) -> NewTask {
    NewTask { value: Some(new_task::Value::Json(text.to_owned())), ..NewTask::default() }
}

pub fn data(bytes: impl Into<bytes::Bytes>) -> NewTask {
    NewTask { value: Some(new_task::Value::Data(bytes.into())), ..NewTask::default() }
}

pub fn insert_request(queue: &str, tasks: Vec<NewTask>) -> InsertRequest {
    InsertRequest { queue: queue.to_owned(), tasks, ..InsertRequest::default() }
}

pub fn pop_request(queue: &str) -> PopRequest {
    PopRequest { queue: queue.to_owned(), ..PopRequest::default() }
}

pub fn pop_batch_request(queue: &str) -> PopBatchRequest {
    PopBatchRequest { queue: queue.to_owned(), max_tasks: 10, ..PopBatchRequest::default() }
}

pub fn ack_request(queue: &str, tokens: &[String]) -> AckRequest {
    AckRequest { queue: queue.to_owned(), lease_tokens: tokens.to_vec() }
}

pub fn heartbeat_request(queue: &str, tokens: &[String]) -> HeartbeatRequest {
    HeartbeatRequest { queue: queue.to_owned(), lease_tokens: tokens.to_vec(), lease: None }
}

pub fn putback_request(queue: &str, tokens: &[String]) -> PutbackRequest {
    let tokens = PutbackTokens { lease_tokens: tokens.to_vec(), ..PutbackTokens::default() };
    PutbackRequest { queue: queue.to_owned(), selection: Some(Selection::Tokens(tokens)) }
}

pub fn held_for_request(queue: &str, held_for: ProtoDuration) -> PutbackRequest {
    PutbackRequest { queue: queue.to_owned(), selection: Some(Selection::HeldFor(held_for)) }
}

pub fn get_queue_request(queue: &str) -> GetQueueRequest {
    GetQueueRequest { queue: queue.to_owned() }
}

pub fn proto(duration: Duration) -> ProtoDuration {
    ProtoDuration::try_from(duration).unwrap()
}

pub fn duration(duration: Option<ProtoDuration>) -> Duration {
    duration.expect("a duration").try_into().expect("not negative")
}

/// A token of the right form that nobody holds.
pub fn unknown_token() -> String {
    "00112233445566778899aabbccddeeff".to_owned()
}

/// Inserts JSON texts and gives their ids.
pub async fn insert_json(client: &mut Client, queue: &str, texts: &[&str]) -> Vec<String> {
    let tasks = texts.iter().map(|text| json(text)).collect();
    let answer = client.insert(insert_request(queue, tasks)).await.expect("an insert").into_inner();
    assert_eq!(answer.results.len(), texts.len());
    answer.results.into_iter().map(|result| result.id).collect()
}

/// Pops without waiting.
pub async fn pop(client: &mut Client, queue: &str) -> Option<Task> {
    client.pop(pop_request(queue)).await.expect("a pop").into_inner().task
}

/// Pops a task that is there, or is about to be.
pub async fn pop_waiting(client: &mut Client, queue: &str) -> Task {
    let request = PopRequest { wait: Some(proto(PATIENCE)), ..pop_request(queue) };
    client.pop(request).await.expect("a pop").into_inner().task.expect("a task")
}

/// Pops with this lease; a task must be there.
pub async fn pop_for(client: &mut Client, queue: &str, lease: Duration) -> Task {
    let request = PopRequest { lease: Some(proto(lease)), ..pop_request(queue) };
    client.pop(request).await.expect("a pop").into_inner().task.expect("a task")
}

/// Reads a PopBatch to its end.
pub async fn pop_batch(client: &mut Client, request: PopBatchRequest) -> Result<Vec<Task>, Status> {
    let mut stream = client.pop_batch(request).await?.into_inner();
    let mut tasks = Vec::new();
    while let Some(message) = stream.message().await? {
        tasks.extend(message.tasks);
    }
    Ok(tasks)
}

pub async fn ack(client: &mut Client, queue: &str, token: &str) -> Outcome {
    let answer = client.ack(ack_request(queue, &[token.to_owned()])).await.expect("an ack").into_inner();
    only(&answer.outcomes)
}

pub async fn heartbeat(client: &mut Client, queue: &str, token: &str) -> Outcome {
    let request = heartbeat_request(queue, &[token.to_owned()]);
    only(&client.heartbeat(request).await.expect("a heartbeat").into_inner().outcomes)
}

pub async fn putback(client: &mut Client, queue: &str, token: &str) -> Outcome {
    let answer = putback_answer(client, queue, &[token.to_owned()]).await;
    let outcome = only(&answer.outcomes);
    assert_eq!(answer.put_back, u64::from(outcome == Outcome::Applied));
    outcome
}

pub async fn putback_answer(client: &mut Client, queue: &str, tokens: &[String]) -> PutbackResponse {
    client.putback(putback_request(queue, tokens)).await.expect("a putback").into_inner()
}

/// The counts of a queue that is there. They add up: guarantee 14.
pub async fn counts(client: &mut Client, queue: &str) -> QueueCounts {
    let answer = client.admin.get_queue(get_queue_request(queue)).await.expect("the queue's counts").into_inner();
    let answer = answer.queue.expect("the queue");
    assert_eq!(answer.name, queue);
    let counts = answer.counts.expect("counts");
    add_up(&counts);
    counts
}

/// What was inserted is somewhere, or is counted as gone.
#[track_caller]
pub fn add_up(counts: &QueueCounts) {
    let QueueCounts { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, .. } = *counts;
    let all = ready + scheduled + leased + dead + acked + expired + deleted + purged;
    assert_eq!(inserted, all, "what was inserted is somewhere, or is counted as gone: {counts:?}");
}

/// Ready, leased, dead, inserted, acked.
pub async fn five(client: &mut Client, queue: &str) -> [u64; 5] {
    let QueueCounts { ready, leased, dead, inserted, acked, .. } = counts(client, queue).await;
    [ready, leased, dead, inserted, acked]
}

pub fn outcomes(outcomes: &[i32]) -> Vec<Outcome> {
    outcomes.iter().map(|outcome| Outcome::try_from(*outcome).expect("an outcome of the contract")).collect()
}

/// The text of a task that was inserted as JSON.
pub fn text(task: &Task) -> &str {
    match &task.value {
        Some(task::Value::Json(text)) => text,
        other => panic!("not JSON: {other:?}"),
    }
}

fn only(all: &[i32]) -> Outcome {
    match outcomes(all)[..] {
        [outcome] => outcome,
        ref other => panic!("one token, {other:?}"),
    }
}

/// A queue in a known state, one task leased and one ready, and the proof that a refused call left it so.
pub struct Witness {
    pub queue: String,
    /// The token of the leased task.
    pub token: String,
    leased: Task,
    ready: String,
    deliveries: u32,
}

impl Witness {
    const LEASE: Duration = Duration::from_secs(3_600);

    pub async fn new(client: &mut Client) -> Self {
        Self::on(client, &unique_queue("witness")).await
    }

    pub async fn on(client: &mut Client, queue: &str) -> Self {
        let ids = insert_json(client, queue, &["\"leased\"", "\"ready\""]).await;
        let leased = pop_for(client, queue, Self::LEASE).await;
        assert_eq!(leased.id, ids[0]);
        let token = leased.lease_token.clone();
        Self { queue: queue.to_owned(), token, leased, ready: ids[1].clone(), deliveries: 0 }
    }

    /// The server answers good calls, the leased task is leased with the same deadline, and exactly one other task is
    /// ready, delivered only as often as this check did it.
    pub async fn unchanged(&mut self, client: &mut Client, case: &str) {
        let task = pop_for(client, &self.queue, Self::LEASE).await;
        self.deliveries += 1;
        assert_eq!(task.id, self.ready, "{case}: another task came");
        assert_eq!(text(&task), "\"ready\"", "{case}");
        assert_eq!((task.deliveries, task.expiries), (self.deliveries, 0), "{case}: it was delivered meanwhile");
        assert_eq!(pop(client, &self.queue).await, None, "{case}: something was inserted or put back");
        assert_eq!(putback(client, &self.queue, &task.lease_token).await, Outcome::Applied, "{case}");

        // The shortest lease moves no deadline, so the answer tells where it stands.
        let lease = Some(proto(Duration::from_millis(100)));
        let request = HeartbeatRequest { lease, ..heartbeat_request(&self.queue, std::slice::from_ref(&self.token)) };
        let answer = client.heartbeat(request).await.expect("a heartbeat").into_inner();
        assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied], "{case}: the lease was lost");
        assert_eq!(answer.lease_expires_at, self.leased.lease_expires_at, "{case}: the deadline was moved");
    }
}
