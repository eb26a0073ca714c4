//! Consume: messages of the stream into calls, what comes of them into messages.

use std::{error::Error as _, pin::Pin};

use data_queue_proto::v1::{self, consume_request::Request as Asked};
use futures_util::{Stream, StreamExt};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    edge::Deadline,
    handover::Handover,
    service::{duration, outcomes, span, task},
    status,
};
use crate::queue::{
    ConsumeAnswer, ConsumeCall, ConsumeMessage, ConsumeOpen, Ended, Outlet, PutBackCall, Queues, Tokens, Unread,
};

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::ConsumeResponse, Status>> + Send>>;

pub(super) fn serve(queues: &Queues, request: Request<Streaming<v1::ConsumeRequest>>) -> Response<Answers> {
    let handover = Handover::of_stream();
    // The session sends when the message before has left: this is only the place where it is handed on.
    let (sender, receiver) = mpsc::channel(1);
    let deadline = Deadline::of(&request);
    let outlet = Body { sender: sender.clone(), handover: handover.clone(), deadline };
    let calls = request.into_inner().map(|message| message.map(call).map_err(unread));
    let this = queues.clone();
    queues.spawn(async move {
        let status = match this.consume(calls, outlet).await {
            Err(Ended::Broken) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                status::deadline_exceeded()
            }
            Ok(()) | Err(Ended::Broken) => return,
            Err(Ended::Failed(error)) => error.into(),
            Err(Ended::Refused(status)) => status,
            Err(Ended::Stopping) => status::shutting_down(),
        };
        // Nobody may be there any more to hear it.
        let _ = sender.send(Err(status)).await;
    });
    let put = handover.clone();
    let messages =
        ReceiverStream::new(receiver).map(move |sent: Result<ConsumeMessage, Status>| Ok(message(sent?, &put)));
    let mut response = Response::new(messages.boxed() as Answers);
    response.extensions_mut().insert(handover);
    response
}

/// The body of the answer, as the session sees it.
struct Body {
    sender: mpsc::Sender<Result<ConsumeMessage, Status>>,
    handover: Handover,
    /// When the client stops listening.
    deadline: Option<Instant>,
}

impl Outlet for Body {
    async fn clear(&self) -> bool {
        self.sender.reserve().await.is_ok() && self.handover.clear().await.is_ok()
    }

    fn send(&mut self, message: ConsumeMessage) {
        // If the body is gone, dropping the message gives its tasks back.
        let _ = self.sender.try_send(Ok(message));
    }

    async fn gone(&self) {
        match self.deadline {
            Some(deadline) => drop(timeout_at(deadline, self.sender.closed()).await),
            None => self.sender.closed().await,
        }
    }
}

/// A message that cannot be decoded has no cause beneath; a connection that broke has. The edge says more of one that is too
/// long.
fn unread(status: Status) -> Unread<Status> {
    match status.code() {
        Code::OutOfRange | Code::ResourceExhausted | Code::Internal | Code::Unimplemented
            if status.source().is_none() =>
        {
            Unread::Refused(status)
        }
        _ => Unread::Broken,
    }
}

fn call(message: v1::ConsumeRequest) -> ConsumeCall {
    let tokens = |queue, lease_tokens| Tokens { queue, lease_tokens };
    match message.request {
        Some(Asked::Open(open)) => ConsumeCall::Open(ConsumeOpen {
            queues: open.queues.into_iter().map(|queue| (queue.name, queue.weight)).collect(),
            lease: open.lease.map(span),
            max_outstanding: open.max_outstanding,
            session: open.session.to_vec(),
            max_hold: open.max_hold.map(span),
        }),
        Some(Asked::Ack(ack)) => ConsumeCall::Ack(tokens(ack.queue, ack.lease_tokens)),
        Some(Asked::Putback(putback)) => {
            let call = PutBackCall {
                lease_tokens: Vec::new(),
                delay: putback.delay.map(span),
                failed: putback.failed,
                dead_letter: putback.dead_letter,
                reason: putback.reason,
            };
            ConsumeCall::PutBack(tokens(putback.queue, putback.lease_tokens), call)
        }
        Some(Asked::Heartbeat(beat)) => {
            ConsumeCall::Heartbeat(tokens(beat.queue, beat.lease_tokens), beat.lease.map(span))
        }
        Some(Asked::MaxOutstanding(max)) => ConsumeCall::MaxOutstanding(max),
        None => ConsumeCall::Unknown,
    }
}

fn message(sent: ConsumeMessage, handover: &Handover) -> v1::ConsumeResponse {
    let mut message = v1::ConsumeResponse { drain: sent.drain, ..v1::ConsumeResponse::default() };
    if let Some((queue, delivery)) = sent.delivery {
        handover.put(delivery.unsent);
        message.tasks = delivery.tasks.into_iter().map(|leased| task(queue.as_str().to_owned(), leased)).collect();
    }
    let answer = |answer: ConsumeAnswer| v1::ConsumeAnswer {
        outcomes: outcomes(&answer.outcomes),
        lease: answer.lease.map(duration),
    };
    message.answers = sent.answers.into_iter().map(answer).collect();
    let resumed = |(queue, tokens): (crate::store::QueueName, Vec<crate::store::Token>)| v1::ResumedQueue {
        queue: queue.as_str().to_owned(),
        lease_tokens: tokens.iter().map(crate::store::Token::text).collect(),
    };
    let cancelled = |(queue, tokens): (crate::store::QueueName, Vec<crate::store::Token>)| v1::CancelledTasks {
        queue: queue.as_str().to_owned(),
        lease_tokens: tokens.iter().map(crate::store::Token::text).collect(),
    };
    message.cancel = sent.cancelled.into_iter().map(cancelled).collect();
    message.resumed = sent.resumed.into_iter().map(resumed).collect();
    message
}
