//! A bare tonic server of the same messages, which keeps nothing: what the transport alone costs.
//!
//! It is this program once more, in a process of its own, with the runtime and the allocator that DataQueue's server has.

use std::{path::Path, pin::Pin, process::Command};

use data_queue_proto::v1::{
    self,
    data_queue_server::{DataQueue, DataQueueServer},
    produce_request,
};
use tokio::net::TcpListener;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

use crate::{dataqueue::Server, fault::Result};

type Answers<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;
type Answer<T> = std::result::Result<Response<T>, Status>;

/// Starts one. What it says goes beside this path.
pub(crate) fn start(directory: &Path) -> Result<Server> {
    Server::run(Command::new(std::env::current_exe()?).arg("--echo"), directory)
}

/// Serves until it is killed.
pub(crate) async fn serve() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = DataQueueServer::new(Echo);
    Ok(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await?)
}

struct Echo;

/// An id a task, like a real one.
fn results(tasks: &[v1::NewTask]) -> Vec<v1::InsertResult> {
    let id = || v1::InsertResult { id: "00000000-0000-4000-8000-000000000000".to_owned(), duplicate: false };
    tasks.iter().map(|_| id()).collect()
}

fn absent<T>() -> Answer<T> {
    Err(Status::unimplemented("this server only echoes Insert and Produce"))
}

#[async_trait::async_trait]
impl DataQueue for Echo {
    type PopBatchStream = Answers<v1::PopBatchResponse>;
    type ProduceStream = Answers<v1::ProduceResponse>;
    type ConsumeStream = Answers<v1::ConsumeResponse>;

    async fn insert(&self, request: Request<v1::InsertRequest>) -> Answer<v1::InsertResponse> {
        let results = results(&request.get_ref().tasks);
        Ok(Response::new(v1::InsertResponse { results, replayed: false, ..Default::default() }))
    }

    async fn produce(&self, request: Request<Streaming<v1::ProduceRequest>>) -> Answer<Self::ProduceStream> {
        let answers = request.into_inner().filter_map(|message| match message.map(|message| message.request) {
            Ok(Some(produce_request::Request::Insert(insert))) => {
                let answer = v1::ProduceAnswer {
                    number: insert.number,
                    results: results(&insert.tasks),
                    replayed: false,
                    ..Default::default()
                };
                Some(Ok(v1::ProduceResponse { answers: vec![answer] }))
            }
            Ok(_) => None,
            Err(status) => Some(Err(status)),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn pop(&self, _: Request<v1::PopRequest>) -> Answer<v1::PopResponse> {
        absent()
    }

    async fn pop_batch(&self, _: Request<v1::PopBatchRequest>) -> Answer<Self::PopBatchStream> {
        absent()
    }

    async fn ack(&self, _: Request<v1::AckRequest>) -> Answer<v1::AckResponse> {
        absent()
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatResponse> {
        absent()
    }

    async fn putback(&self, _: Request<v1::PutbackRequest>) -> Answer<v1::PutbackResponse> {
        absent()
    }

    async fn consume(&self, _: Request<Streaming<v1::ConsumeRequest>>) -> Answer<Self::ConsumeStream> {
        absent()
    }
}
