//! Produce: messages of the stream into calls, what comes of them into messages.

use std::pin::Pin;

use data_queue_proto::v1::{self, produce_request::Request as Given};
use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{
    edge::Deadline,
    service::{new_task, reached, results},
    status,
};
use crate::queue::{ProduceAnswer, ProduceEnd, ProduceMessage, Queues};

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

pub(super) fn serve(queues: &Queues, request: Request<Streaming<v1::ProduceRequest>>) -> Response<Answers> {
    let deadline = Deadline::of(&request);
    let messages = request.into_inner().map(|request| Ok(message(request?)));
    let answers = queues.produce(messages, deadline).map(|step| match step {
        Ok(answers) => Ok(v1::ProduceResponse { answers: answers.into_iter().map(answer).collect() }),
        Err(end) => Err(ending(end)),
    });
    Response::new(Box::pin(answers))
}

fn message(request: v1::ProduceRequest) -> ProduceMessage {
    match request.request {
        Some(Given::Open(open)) => {
            ProduceMessage::Open { queue: open.queue, producer: open.producer_id, durability: open.durability }
        }
        Some(Given::Insert(insert)) => {
            ProduceMessage::Insert { number: insert.number, tasks: insert.tasks.into_iter().map(new_task).collect() }
        }
        None => ProduceMessage::Nothing,
    }
}

fn answer(ProduceAnswer { number, inserted }: ProduceAnswer) -> v1::ProduceAnswer {
    let (replayed, durability) = (inserted.replayed, reached(inserted.durability).into());
    v1::ProduceAnswer { number, results: results(&inserted), replayed, durability }
}

fn ending(end: ProduceEnd<Status>) -> Status {
    match end {
        ProduceEnd::Broken(status) => status,
        ProduceEnd::Refused(error) => error.into(),
        ProduceEnd::Stopping => status::shutting_down(),
        ProduceEnd::DeadlinePassed => status::deadline_exceeded(),
    }
}
