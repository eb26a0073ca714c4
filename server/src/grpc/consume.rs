//! Consume: messages of the stream into calls, what comes of them into messages.

use std::pin::Pin;

use data_queue_proto::v1;
use futures_util::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::queue::Queues;

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::ConsumeResponse, Status>> + Send>>;

pub(super) fn serve(_: &Queues, _: Request<Streaming<v1::ConsumeRequest>>) -> Result<Response<Answers>, Status> {
    Err(Status::unimplemented("Consume is not there yet"))
}
