//! The handles of our own client, as most will use the streams: a producer and a consumer.

use std::{ops::Range, time::Duration};

use data_queue_client::{Client, NewTask};

use crate::{
    dataqueue::{LEASE_SECONDS, QUEUE, Server},
    fault::Result,
    flow::OUTSTANDING,
    ledger::{Ledger, payload},
};

/// Inserts these, so many at a time, and so many inserts at once without an answer.
pub(crate) async fn produce(
    server: &Server,
    numbers: Range<u64>,
    size: usize,
    part: u64,
    in_flight: u32,
) -> Result<()> {
    let producer = Client::connect(&server.address().to_string())?.producer(QUEUE).max_inserts(in_flight).build()?;
    let mut next = numbers.start;
    while next < numbers.end {
        let end = numbers.end.min(next + part);
        // What becomes of it is told at the end.
        drop(producer.send_many((next..end).map(|number| NewTask::bytes(payload(number, size)))).await?);
        next = end;
    }
    Ok(producer.close().await?)
}

/// Takes and acks so many, which are there. The acks are confirmed when the consumer is closed.
pub(crate) async fn consume(server: &Server, tasks: u64, ledger: &mut Ledger) -> Result<()> {
    let client = Client::connect(&server.address().to_string())?;
    let lease = Duration::from_secs(LEASE_SECONDS);
    let mut consumer = client.consumer(QUEUE).lease(lease).max_outstanding(OUTSTANDING).start()?;
    for _ in 0..tasks {
        let task = consumer.next().await?.ok_or("the consumer ended")?;
        ledger.deliver(task.bytes())?;
        task.done();
    }
    match consumer.close().await? {
        0 => ledger.acked(tasks),
        late => return Err(format!("{late} acks were not applied").into()),
    }
    Ok(())
}
