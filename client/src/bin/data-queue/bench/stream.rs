//! Produce and Consume: each caller has a stream open.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use data_queue_proto::v1::{self, consume_request, produce_request};
use futures_util::{Stream, stream};
use tokio::{
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tonic::{Request, Status, Streaming};

use super::load::Part;
use crate::{
    Stop,
    args::random_hex,
    server::{CALL_DEADLINE, Queues},
};

/// For how long nothing may come, when there should be more, before a consumer leaves it to the last look at the queue.
const IDLE: Duration = Duration::from_secs(5);
/// For how long nothing more may come after the consumer asked for nothing more.
const LAST: Duration = Duration::from_millis(300);

/// An insert, or acks, that were sent and not answered.
struct Sent<T> {
    start: Instant,
    what: T,
}

/// Inserts with up to `window` inserts under way.
pub(crate) async fn produce(part: &Part, mut client: Queues) -> Result<(), Stop> {
    let failed = |status| part.load.failed("Produce", status);
    let window = part.window as usize;
    // Never full: an insert is sent only when there is room for it.
    let (send, receive) = mpsc::channel(window + 1);
    let open =
        v1::ProduceOpen { queue: part.load.queue.clone(), producer_id: random_hex()?, ..v1::ProduceOpen::default() };
    let gone = |_| failed(Status::unknown("the stream ended"));
    send.send(produce_message(produce_request::Request::Open(open))).await.map_err(gone)?;
    let answer = timeout(CALL_DEADLINE, client.produce(Request::new(requests(receive)))).await;
    let mut answers = answer.map_err(|_| part.load.silent("Produce"))?.map_err(failed)?.into_inner();

    let mut send = Some(send);
    let mut under_way = VecDeque::<Sent<(u64, u64)>>::new();
    let (mut number, mut heard) = (0, Instant::now());
    loop {
        tokio::select! {
            start = part.inserts.next(), if send.is_some() && under_way.len() < window => {
                let next = start.and_then(|start| part.allot().map(|numbers| (start, numbers)));
                let (Some((start, numbers)), Some(open)) = (next, &send) else {
                    part.inserts.stop();
                    send = None;
                    continue;
                };
                if under_way.is_empty() {
                    heard = Instant::now();
                }
                number += 1;
                under_way.push_back(Sent { start, what: (number, numbers.end - numbers.start) });
                let insert = v1::ProduceInsert { number, tasks: part.tasks(numbers, start) };
                // An error: the stream ended, and `answers` says why.
                let _ = open.send(produce_message(produce_request::Request::Insert(insert))).await;
            }
            message = answers.message() => {
                heard = Instant::now();
                let Some(message) = message.map_err(failed)? else { break };
                for answer in message.answers {
                    match under_way.pop_front() {
                        Some(Sent { start, what: (number, tasks) }) if number == answer.number => {
                            part.inserted(start, tasks, answer.results.len())?;
                        }
                        _ => return Err(failed(Status::internal("an answer is not that of the oldest insert"))),
                    }
                }
            }
            () = sleep_until((heard + CALL_DEADLINE).into()), if send.is_none() || !under_way.is_empty() => {
                return Err(part.load.silent("Produce"));
            }
        }
    }
    match (send, under_way.len()) {
        (None, 0) => Ok(()),
        (_, left) => {
            Err(failed(Status::unknown(format!("the server ended the stream with {left} inserts unanswered"))))
        }
    }
}

/// Acks what comes, until all is settled, nothing comes any more, or the pace is stopped.
pub(crate) async fn consume(part: &Part, mut client: Queues) -> Result<(), Stop> {
    while let After::Another = consume_once(part, &mut client).await? {}
    Ok(())
}

/// What is to be done after a stream.
enum After {
    /// The server ended it: open another one.
    Another,
    Nothing,
}

async fn consume_once(part: &Part, client: &mut Queues) -> Result<After, Stop> {
    let failed = |status| part.load.failed("Consume", status);
    // Never full: the server sends no more tasks than this, and each message has the acks of one at least.
    let (send, receive) = mpsc::channel(part.window as usize + 2);
    let open = v1::ConsumeOpen {
        queues: vec![v1::ConsumeQueue { name: part.load.queue.clone(), weight: 0 }],
        lease: part.load.lease(),
        max_outstanding: part.window,
        ..v1::ConsumeOpen::default()
    };
    let gone = |_| failed(Status::unknown("the stream ended"));
    send.send(consume_message(consume_request::Request::Open(open))).await.map_err(gone)?;
    let answer = timeout(CALL_DEADLINE, client.consume(Request::new(requests(receive)))).await;
    let mut messages = answer.map_err(|_| part.load.silent("Consume"))?.map_err(failed)?.into_inner();

    let mut acks = VecDeque::<Sent<Vec<u64>>>::new();
    let (mut stopping, mut draining, mut heard) = (false, false, Instant::now());
    loop {
        let patience = match (acks.is_empty(), stopping) {
            (false, _) => CALL_DEADLINE,
            (true, true) => LAST,
            (true, false) => IDLE,
        };
        tokio::select! {
            message = messages.message() => {
                heard = Instant::now();
                let Some(message) = message.map_err(failed)? else { return Ok(After::Another) };
                draining |= message.drain;
                for answer in &message.answers {
                    let sent = acks.pop_front();
                    let Sent { start, what } = sent.ok_or_else(|| failed(Status::internal("an answer to no ack")))?;
                    part.acked(start, &what, &answer.outcomes)?;
                }
                let held = message.tasks.into_iter().filter_map(|task| part.delivered(task));
                let (numbers, lease_tokens): (Vec<_>, Vec<_>) = held.unzip();
                if !numbers.is_empty() {
                    acks.push_back(Sent { start: heard, what: numbers });
                    let ack = v1::ConsumeAck { queue: String::new(), lease_tokens };
                    // An error: the stream ended, and `messages` says why.
                    let _ = send.send(consume_message(consume_request::Request::Ack(ack))).await;
                }
                if draining && acks.is_empty() {
                    return end(send, messages, After::Another).await;
                }
            }
            () = part.load.settled() => return end(send, messages, After::Nothing).await,
            () = part.takes.stopped(), if !stopping => {
                stopping = true;
                heard = Instant::now();
                let _ = send.send(consume_message(consume_request::Request::MaxOutstanding(0))).await;
            }
            () = sleep_until((heard + patience).into()) => match (acks.is_empty(), stopping) {
                (false, _) => return Err(part.load.silent("Consume")),
                // Broken off, not half-closed: what is on its way comes back at once.
                (true, true) => return Ok(After::Nothing),
                (true, false) if part.load.is_inserted() => return Ok(After::Nothing),
                (true, false) => heard = Instant::now(),
            },
        }
    }
}

/// Half-closes, and reads what is left: nothing, as everything was acked.
async fn end(
    send: mpsc::Sender<v1::ConsumeRequest>,
    mut messages: Streaming<v1::ConsumeResponse>,
    after: After,
) -> Result<After, Stop> {
    drop(send);
    let rest = async { while let Ok(Some(_)) = messages.message().await {} };
    // Whatever it says or does not say: the ledger and the queue's counts are what judges.
    let _ = timeout(CALL_DEADLINE, rest).await;
    Ok(after)
}

fn requests<T>(receive: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::unfold(receive, |mut receive| async { receive.recv().await.map(|message| (message, receive)) })
}

fn produce_message(request: produce_request::Request) -> v1::ProduceRequest {
    v1::ProduceRequest { request: Some(request) }
}

fn consume_message(request: consume_request::Request) -> v1::ConsumeRequest {
    v1::ConsumeRequest { request: Some(request) }
}
