//! The clients of Produce and Consume.

use std::ops::Range;

use data_queue_proto::v1::{self, consume_request, produce_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    dataqueue::{self, Client, QUEUE, Server},
    fault::Result,
    ledger::Ledger,
    options::Options,
    report::Report,
    scratch::Scratch,
};

/// Tasks that the server may have with the client.
pub(crate) const OUTSTANDING: u32 = 1_000;

/// Which of the streams a server has already. One that has not answers UNIMPLEMENTED, and what needs it is left out.
#[derive(Clone, Copy)]
pub(crate) struct Served {
    pub(crate) produce: bool,
    pub(crate) consume: bool,
}

/// Asks a server; the report tells what is left out of this measurement.
pub(crate) async fn served(options: &Options, report: &mut Report, measurement: &'static str) -> Result<Served> {
    let scratch = Scratch::new(options)?;
    let server = Server::start(&scratch.path().join("data"), &[])?;
    let mut client = server.client().await?;
    let produce = client.produce(tokio_stream::iter([open_produce("probe".to_owned())])).await.map(drop);
    let consume = client.consume(tokio_stream::iter([open_consume(QUEUE.to_owned())])).await.map(drop);
    let mut has = |call: &str, answer| match answer {
        Ok(()) => Result::Ok(true),
        Err(refused) if Status::code(&refused) == Code::Unimplemented => {
            report.missing(measurement, format!("{call}: this server answers UNIMPLEMENTED; build a newer one"));
            Ok(false)
        }
        Err(refused) => Err(refused.into()),
    };
    Ok(Served { produce: has("Produce", produce)?, consume: has("Consume", consume)? })
}

fn open_produce(producer_id: String) -> v1::ProduceRequest {
    let open = v1::ProduceOpen { queue: QUEUE.to_owned(), producer_id, ..v1::ProduceOpen::default() };
    v1::ProduceRequest { request: Some(produce_request::Request::Open(open)) }
}

pub(crate) fn open_consume(queue: String) -> v1::ConsumeRequest {
    let open = v1::ConsumeOpen {
        queues: vec![v1::ConsumeQueue { name: queue, weight: 0 }],
        lease: dataqueue::lease(),
        max_outstanding: OUTSTANDING,
        ..v1::ConsumeOpen::default()
    };
    v1::ConsumeRequest { request: Some(consume_request::Request::Open(open)) }
}

/// Inserts these over one stream, so many a message, and so many messages at once without an answer.
pub(crate) async fn produce(
    client: &Client,
    numbers: Range<u64>,
    size: usize,
    part: u64,
    in_flight: usize,
) -> Result<()> {
    let (sender, receiver) = mpsc::channel(in_flight);
    sender.send(open_produce(format!("bench-{}", numbers.start))).await?;
    let mut answers = client.clone().produce(ReceiverStream::new(receiver)).await?.into_inner();
    let messages = (numbers.end - numbers.start).div_ceil(part);
    let (mut sent, mut answered, mut inserted) = (0, 0, 0);
    while answered < messages {
        while sent < messages && sent - answered < in_flight as u64 {
            let first = numbers.start + sent * part;
            let tasks =
                (first..numbers.end.min(first + part)).map(|number| dataqueue::new_task(number, size)).collect();
            sent += 1;
            let insert = v1::ProduceInsert { number: sent, tasks };
            sender.send(v1::ProduceRequest { request: Some(produce_request::Request::Insert(insert)) }).await?;
        }
        let message = answers.message().await?.ok_or("the server ended the stream")?;
        for answer in message.answers {
            answered += 1;
            inserted += answer.results.len() as u64;
            if answer.number != answered || answer.replayed {
                return Err(format!("insert {answered} was answered as {}", answer.number).into());
            }
        }
    }
    drop(sender);
    if inserted == numbers.end - numbers.start { Ok(()) } else { Err(format!("{inserted} tasks were inserted").into()) }
}

/// Takes and acks so many over one stream: an ack message for each message of tasks. When they have come it wants no more;
/// what was on its way by then is acked too, so nothing is held when it ends.
pub(crate) async fn consume(client: &Client, tasks: u64, ledger: &mut Ledger) -> Result<()> {
    if tasks == 0 {
        return Ok(());
    }
    let (sender, receiver) = mpsc::channel(OUTSTANDING as usize);
    sender.send(open_consume(QUEUE.to_owned())).await?;
    let mut stream = client.clone().consume(ReceiverStream::new(receiver)).await?.into_inner();
    let (mut delivered, mut acked, mut is_paused) = (0, 0, false);
    while acked < tasks.max(delivered) {
        let message = stream.message().await?.ok_or("the server ended the stream")?;
        for outcome in message.answers.iter().flat_map(|answer| &answer.outcomes) {
            if *outcome != v1::Outcome::Applied as i32 {
                return Err("an ack was not applied".into());
            }
            acked += 1;
        }
        let mut lease_tokens = Vec::with_capacity(message.tasks.len());
        for task in message.tasks {
            ledger.deliver(dataqueue::data(&task))?;
            lease_tokens.push(task.lease_token);
        }
        delivered += lease_tokens.len() as u64;
        // Before the ack: when that is answered, no more tasks come.
        if delivered >= tasks && !is_paused {
            is_paused = true;
            sender.send(v1::ConsumeRequest { request: Some(consume_request::Request::MaxOutstanding(0)) }).await?;
        }
        if !lease_tokens.is_empty() {
            let ack = v1::ConsumeAck { queue: String::new(), lease_tokens };
            sender.send(v1::ConsumeRequest { request: Some(consume_request::Request::Ack(ack)) }).await?;
        }
    }
    ledger.acked(acked);
    Ok(())
}
