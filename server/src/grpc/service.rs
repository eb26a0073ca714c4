//! The service: requests into calls, answers into messages.

use std::pin::Pin;

use data_queue_proto::v1::{self, data_queue_server::DataQueue};
use futures_util::{Stream, StreamExt, stream};
use md5::{Digest, Md5};
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

use super::{
    consume,
    edge::Deadline,
    handover::{Handover, Stalled},
    produce,
};
use crate::{
    queue::{InsertCall, NewTask, PopBatchCall, PopCall, PutBackCall, Queues, Span, Task, Timing, Value},
    store::{Durability, Fingerprint, Inserted, Millis, Outcome, Released, TaskId, Token},
};

/// The calls.
pub struct DataQueueService {
    queues: Queues,
}

impl DataQueueService {
    /// Serves these queues.
    pub fn new(queues: Queues) -> Self {
        Self { queues }
    }
}

#[tonic::async_trait]
impl DataQueue for DataQueueService {
    async fn insert(&self, request: Request<v1::InsertRequest>) -> Result<Response<v1::InsertResponse>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let durability = std::mem::take(&mut request.durability);
        let fingerprint = fingerprint_if(&request_id, &request);
        let tasks = request.tasks.into_iter().map(new_task).collect();
        let call = InsertCall { queue: request.queue, tasks, request_id, fingerprint, durability };
        let inserted = self.queues.insert(call).await?;
        let (replayed, durability) = (inserted.replayed, reached(inserted.durability).into());
        Ok(Response::new(v1::InsertResponse { results: results(&inserted), replayed, durability }))
    }

    async fn pop(&self, request: Request<v1::PopRequest>) -> Result<Response<v1::PopResponse>, Status> {
        let deadline = Deadline::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        // A retry has less time left to wait.
        let wait = request.wait.take();
        let fingerprint = fingerprint_if(&request_id, &request);
        let queue = request.queue.clone();
        let call = PopCall {
            queue: request.queue,
            lease: request.lease.map(span),
            wait: wait.map(span),
            request_id,
            fingerprint,
            acks: request.ack_lease_tokens,
            deadline,
        };
        let (delivery, acks) = self.queues.pop(call).await?;
        let mut message = v1::PopResponse { task: None, ack_outcomes: outcomes(&acks) };
        let handover = Handover::default();
        if let Some(delivery) = delivery {
            message.task = delivery.tasks.into_iter().next().map(|leased| task(queue, leased));
            handover.put(delivery.unsent);
        }
        let mut response = Response::new(message);
        response.extensions_mut().insert(handover);
        Ok(response)
    }

    type PopBatchStream = Pin<Box<dyn Stream<Item = Result<v1::PopBatchResponse, Status>> + Send>>;

    async fn pop_batch(&self, request: Request<v1::PopBatchRequest>) -> Result<Response<Self::PopBatchStream>, Status> {
        let deadline = Deadline::of(&request);
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        // As with Pop.
        let wait = request.wait.take();
        let fingerprint = fingerprint_if(&request_id, &request);
        let queue = request.queue.clone();
        let deliveries = self.queues.pop_batch(PopBatchCall {
            queue: request.queue,
            max_tasks: request.max_tasks,
            lease: request.lease.map(span),
            wait: wait.map(span),
            request_id,
            fingerprint,
            deadline,
        })?;
        let handover = Handover::of_stream();
        let state = (deliveries.boxed(), handover.clone(), queue);
        let messages = stream::try_unfold(state, |(mut deliveries, handover, queue)| async move {
            // Nothing more is leased for a client that does not read; the edge ends a stream that stalled.
            if let Err(Stalled) = handover.clear().await {
                return Ok(None);
            }
            let Some(delivery) = deliveries.next().await.transpose()? else { return Ok(None) };
            handover.put(delivery.unsent);
            let tasks = delivery.tasks.into_iter().map(|leased| task(queue.clone(), leased)).collect();
            Ok(Some((v1::PopBatchResponse { tasks }, (deliveries, handover, queue))))
        });
        let mut response = Response::new(messages.boxed() as Self::PopBatchStream);
        response.extensions_mut().insert(handover);
        Ok(response)
    }

    async fn ack(&self, request: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        let request = request.into_inner();
        let done = self.queues.ack(&request.queue, &request.lease_tokens).await?;
        Ok(Response::new(v1::AckResponse { outcomes: outcomes(&done) }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let request = request.into_inner();
        let beaten = self.queues.heartbeat(&request.queue, &request.lease_tokens, request.lease.map(span)).await?;
        Ok(Response::new(v1::HeartbeatResponse {
            outcomes: outcomes(&beaten.outcomes),
            lease: beaten.earliest.map(|(left, _)| duration(left)),
            lease_expires_at: beaten.earliest.map(|(_, deadline)| timestamp(deadline)),
            cancel_lease_tokens: beaten.cancelled.iter().map(Token::text).collect(),
        }))
    }

    async fn putback(&self, request: Request<v1::PutbackRequest>) -> Result<Response<v1::PutbackResponse>, Status> {
        use v1::putback_request::Selection;
        let request = request.into_inner();
        let response = match request.selection {
            Some(Selection::Tokens(tokens)) => {
                let call = PutBackCall {
                    lease_tokens: tokens.lease_tokens,
                    delay: tokens.delay.map(span),
                    failed: tokens.failed,
                    dead_letter: tokens.dead_letter,
                    reason: tokens.reason,
                };
                let (done, Released { put_back, dead_lettered, .. }) =
                    self.queues.put_back(&request.queue, call).await?;
                v1::PutbackResponse { outcomes: outcomes(&done), put_back, dead_lettered }
            }
            Some(Selection::HeldFor(held_for)) => {
                let Released { put_back, dead_lettered, .. } =
                    self.queues.put_back_held(&request.queue, span(held_for)).await?;
                v1::PutbackResponse { outcomes: Vec::new(), put_back, dead_lettered }
            }
            None => return Err(Queues::nothing_selected(&request.queue).into()),
        };
        Ok(Response::new(response))
    }

    type ProduceStream = produce::Answers;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        Ok(produce::serve(&self.queues, request))
    }

    type ConsumeStream = consume::Answers;

    async fn consume(
        &self,
        request: Request<Streaming<v1::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        Ok(consume::serve(&self.queues, request))
    }
}

/// Of a request whose id was taken out. Maps are sorted, so the order of headers does not count.
fn fingerprint_if(request_id: &str, request: &impl Message) -> Fingerprint {
    match request_id {
        "" => Fingerprint([0; 16]),
        _ => Fingerprint(Md5::digest(request.encode_to_vec()).into()),
    }
}

pub(super) fn new_task(task: v1::NewTask) -> NewTask {
    use v1::new_task::Value as Given;
    let value = task.value.map(|value| match value {
        Given::Json(text) => Value::Json(text),
        Given::Data(data) => Value::Data(data),
    });
    let timing = Timing { delay: task.delay.map(span), deliver_at: task.deliver_at.map(time), ttl: task.ttl.map(span) };
    NewTask { value, headers: task.headers, priority: task.priority, timing, unique_key: task.unique_key }
}

pub(super) fn reached(durability: Durability) -> v1::Durability {
    match durability {
        Durability::Accepted => v1::Durability::Accepted,
        Durability::Fsynced => v1::Durability::Fsynced,
        Durability::Replicated => v1::Durability::Replicated,
    }
}

pub(super) fn results(inserted: &Inserted) -> Vec<v1::InsertResult> {
    let result = |id: &TaskId| v1::InsertResult { id: id.text(), duplicate: false };
    let mut results: Vec<_> = inserted.ids.iter().map(result).collect();
    for at in &inserted.duplicates {
        results[*at].duplicate = true;
    }
    results
}

pub(super) fn task(queue: String, task: Task) -> v1::Task {
    use v1::task::Value as Sent;
    v1::Task {
        id: task.id.text(),
        queue,
        lease_token: task.token.text(),
        value: Some(match task.value {
            Value::Json(text) => Sent::Json(text),
            Value::Data(data) => Sent::Data(data),
        }),
        md5: crate::store::hex(&task.md5),
        headers: task.headers,
        priority: task.priority.into(),
        deliveries: task.deliveries,
        failures: task.failures,
        expiries: task.expiries,
        inserted_at: Some(timestamp(task.inserted_at)),
        lease: Some(duration(task.left)),
        lease_expires_at: Some(timestamp(task.expires_at)),
    }
}

pub(super) fn outcomes(outcomes: &[Outcome]) -> Vec<i32> {
    let outcome = |outcome: &Outcome| match outcome {
        Outcome::Applied => v1::Outcome::Applied,
        Outcome::AlreadyAcked => v1::Outcome::AlreadyAcked,
        Outcome::LeaseLost => v1::Outcome::LeaseLost,
    };
    outcomes.iter().map(|one| outcome(one) as i32).collect()
}

/// Seconds and nanoseconds must have one sign, and the latter be less than a second: else there is no span.
pub(super) fn span(duration: prost_types::Duration) -> Span {
    let (seconds, nanos) = (i128::from(duration.seconds), i128::from(duration.nanos));
    let sound = nanos.abs() < 1_000_000_000 && seconds.signum() * nanos.signum() >= 0;
    Span(sound.then_some(seconds * 1_000_000_000 + nanos))
}

/// Since the Unix epoch. A time with other nanoseconds than it may have is none.
pub(super) fn time(time: prost_types::Timestamp) -> Span {
    match time.nanos {
        0..1_000_000_000 => Span(Some(i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos))),
        _ => Span(None),
    }
}

pub(super) fn duration(millis: Millis) -> prost_types::Duration {
    let (seconds, nanos) = seconds_and_nanos(millis);
    prost_types::Duration { seconds, nanos }
}

pub(super) fn timestamp(millis: Millis) -> prost_types::Timestamp {
    let (seconds, nanos) = seconds_and_nanos(millis);
    prost_types::Timestamp { seconds, nanos }
}

fn seconds_and_nanos(millis: Millis) -> (i64, i32) {
    ((millis / 1_000) as i64, (millis % 1_000 * 1_000_000) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_with_parts_that_contradict_each_other_are_no_spans() {
        let read = |seconds, nanos| span(prost_types::Duration { seconds, nanos }).0;
        assert_eq!(read(1, 500_000_000), Some(1_500_000_000));
        assert_eq!(read(-1, -1), Some(-1_000_000_001));
        assert_eq!(read(i64::MAX, 999_999_999), Some(i128::from(i64::MAX) * 1_000_000_000 + 999_999_999));
        for (seconds, nanos) in [(1, -1), (-1, 1), (0, 1_000_000_000), (0, i32::MIN)] {
            assert_eq!(read(seconds, nanos), None);
        }
    }
}
