//! The calls of a run: callers that insert, and callers that pop and ack. What they see goes to the ledger, how long it
//! took to the meters.
//!
//! One call alone is repeated: that which an overloaded server refuses, since nothing of it was done. Its time goes on
//! meanwhile. Any other that fails ends the run, since nobody knows then what is in the queue.

use std::{
    future::Future,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_client::Error;
use data_queue_proto::{
    reason,
    v1::{self, new_task},
};
use indicatif::ProgressBar;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Code, Request, Response, Status};

use super::{
    ledger::{Counts, Delivery, Ledger, value},
    measure::{Meters, Op},
    pace::Pace,
    stream,
};
use crate::{
    Stop,
    args::Mode,
    server::{CALL_DEADLINE, Queues, explain, timed},
};

/// What all parts of a run share.
pub(crate) struct Load {
    pub(crate) connections: Vec<Queues>,
    pub(crate) queue: String,
    pub(crate) size: usize,
    pub(crate) lease: Duration,
    /// Values carry times counted from here.
    pub(crate) epoch: Instant,
    /// The tasks below this number were inserted, or are about to be.
    allotted: AtomicU64,
    ledger: Mutex<Ledger>,
    overloaded: AtomicU64,
    progress: watch::Sender<Progress>,
    pub(crate) bar: ProgressBar,
}

/// What callers wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    /// More may be inserted.
    Inserting,
    /// All inserts were answered.
    Inserted,
    /// And all was acked.
    Settled,
}

/// A part of a run: who works how, for how long.
pub(crate) struct Part {
    pub(crate) load: Arc<Load>,
    pub(crate) mode: Mode,
    pub(crate) callers: u32,
    pub(crate) batch: u32,
    pub(crate) window: u32,
    /// Producers and consumers at once: it is the delivery that is measured, not the pop.
    pub(crate) flow: bool,
    /// How long a pop waits for a task.
    pub(crate) wait: Duration,
    /// Inserts end before this number.
    pub(crate) limit: u64,
    pub(crate) inserts: Pace,
    pub(crate) takes: Pace,
    pub(crate) meters: Meters,
}

impl Load {
    pub(crate) fn new(connections: Vec<Queues>, queue: String, size: usize, lease: Duration, bar: ProgressBar) -> Self {
        Self {
            connections,
            queue,
            size,
            lease,
            epoch: Instant::now(),
            allotted: AtomicU64::new(0),
            ledger: Mutex::new(Ledger::new(size)),
            overloaded: AtomicU64::new(0),
            progress: watch::Sender::new(Progress::Inserting),
            bar,
        }
    }

    pub(crate) fn allotted(&self) -> u64 {
        self.allotted.load(Ordering::Relaxed)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.ledger().counts
    }

    /// How many calls the server refused since it was overloaded; they were made again.
    pub(crate) fn overloaded(&self) -> u64 {
        self.overloaded.load(Ordering::Relaxed)
    }

    /// Makes a call until the server takes it.
    pub(crate) async fn taken<T, F>(&self, name: &str, mut call: impl FnMut() -> F) -> Result<T, Stop>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let give_up = Instant::now() + CALL_DEADLINE;
        loop {
            let status = match call().await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            match overloaded_for(&status) {
                Some(pause) if Instant::now() + pause < give_up => {
                    self.overloaded.fetch_add(1, Ordering::Relaxed);
                    sleep(pause).await;
                }
                _ => return Err(self.failed(name, status)),
            }
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        *self.progress.borrow() == Progress::Settled
    }

    pub(crate) fn is_inserted(&self) -> bool {
        *self.progress.borrow() >= Progress::Inserted
    }

    /// Waits until all was inserted and acked.
    pub(crate) async fn settled(&self) {
        // An error would mean that the sender is gone, which is here.
        let _ = self.progress.subscribe().wait_for(|progress| *progress == Progress::Settled).await;
    }

    /// All inserts that were begun were answered.
    pub(crate) fn inserted(&self) {
        self.progress.send_replace(Progress::Inserted);
        self.settle();
    }

    fn settle(&self) {
        if self.is_inserted() && self.counts().acked == self.allotted() {
            self.progress.send_replace(Progress::Settled);
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lease(&self) -> Option<prost_types::Duration> {
        prost_types::Duration::try_from(self.lease).ok()
    }

    /// Why a call was the last one.
    pub(crate) fn failed(&self, call: &str, status: Status) -> Stop {
        if status.code() == Code::Unimplemented {
            return Stop::failed(format!(
                "the server does not offer {call}: it is another version, take another --mode"
            ));
        }
        let (queue, inserted, acked) = (&self.queue, self.allotted(), self.counts().acked);
        Stop::failed(format!(
            "void: {call} failed: {}; of up to {inserted} tasks inserted into {queue}, {acked} were acked",
            explain(status)
        ))
    }

    pub(crate) fn silent(&self, call: &str) -> Stop {
        let limit = humantime::format_duration(CALL_DEADLINE);
        self.failed(call, Status::deadline_exceeded(format!("no answer for {limit}")))
    }
}

impl Part {
    /// The numbers of the next insert.
    pub(crate) fn allot(&self) -> Option<Range<u64>> {
        let end = |number: u64| number.saturating_add(u64::from(self.batch)).min(self.limit);
        let more = |number| (number < self.limit).then(|| end(number));
        let allotted = self.load.allotted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        // An error: the limit is reached.
        allotted.ok().map(|number| number..end(number))
    }

    /// The tasks of an insert that started then.
    pub(crate) fn tasks(&self, numbers: Range<u64>, start: Instant) -> Vec<v1::NewTask> {
        let started = u64::try_from(start.saturating_duration_since(self.load.epoch).as_nanos()).unwrap_or(u64::MAX);
        let task = |number| v1::NewTask {
            value: Some(new_task::Value::Data(value(number, started, self.load.size))),
            ..v1::NewTask::default()
        };
        numbers.map(task).collect()
    }

    /// Notes an insert that was answered.
    pub(crate) fn inserted(&self, start: Instant, tasks: u64, results: usize) -> Result<(), Stop> {
        self.meters.record(Op::Insert, start);
        self.load.bar.inc(tasks);
        if u64::try_from(results) == Ok(tasks) {
            return Ok(());
        }
        Err(Stop::failed(format!("void: an insert of {tasks} tasks answered {results} ids")))
    }

    /// Notes a task that came; tells its number and token if it is to be acked.
    pub(crate) fn delivered(&self, task: v1::Task) -> Option<(u64, String)> {
        let Delivery { number, started } = self.load.ledger().deliver(&task, self.load.allotted())?;
        if let Some(started) = started.filter(|_| self.flow) {
            self.meters.record(Op::Delivery, self.load.epoch + Duration::from_nanos(started));
        }
        Some((number, task.lease_token))
    }

    /// Notes acks that were answered.
    pub(crate) fn acked(&self, start: Instant, numbers: &[u64], outcomes: &[i32]) -> Result<(), Stop> {
        self.meters.record(Op::Ack, start);
        if numbers.len() != outcomes.len() {
            let (asked, told) = (numbers.len(), outcomes.len());
            return Err(Stop::failed(format!("void: an ack of {asked} tasks answered {told} outcomes")));
        }
        let mut ledger = self.load.ledger();
        for (number, outcome) in numbers.iter().zip(outcomes) {
            ledger.ack(*number, v1::Outcome::try_from(*outcome).unwrap_or_default());
        }
        drop(ledger);
        if !self.flow {
            self.load.bar.inc(numbers.len() as u64);
        }
        self.load.settle();
        Ok(())
    }

    /// Inserts with every caller, to the end of the pace or to the limit.
    pub(crate) async fn insert(self: &Arc<Self>) -> Result<(), Stop> {
        self.all(|part, client| async move {
            match part.mode {
                Mode::Unary | Mode::Batch => insert(&part, client).await,
                Mode::Stream => stream::produce(&part, client).await,
            }
        })
        .await?;
        self.load.inserted();
        Ok(())
    }

    /// Pops and acks with every caller, until nothing is left or the pace is stopped.
    pub(crate) async fn take(self: &Arc<Self>) -> Result<(), Stop> {
        self.all(|part, client| async move {
            match part.mode {
                Mode::Unary => pop(&part, client).await,
                Mode::Batch => pop_batch(&part, client).await,
                Mode::Stream => stream::consume(&part, client).await,
            }
        })
        .await
    }

    async fn all<F, Fut>(self: &Arc<Self>, caller: F) -> Result<(), Stop>
    where
        F: Fn(Arc<Self>, Queues) -> Fut,
        Fut: Future<Output = Result<(), Stop>> + Send + 'static,
    {
        let mut callers = JoinSet::new();
        for client in self.load.connections.iter().cycle().take(self.callers as usize) {
            callers.spawn(caller(Arc::clone(self), client.clone()));
        }
        while let Some(ended) = callers.join_next().await {
            ended.map_err(|error| Stop::failed(format!("a caller broke: {error}")))??;
        }
        Ok(())
    }

    fn wait(&self) -> Option<prost_types::Duration> {
        prost_types::Duration::try_from(self.wait).ok()
    }
}

async fn insert(part: &Part, client: Queues) -> Result<(), Stop> {
    while let Some(start) = part.inserts.next().await {
        let Some(numbers) = part.allot() else {
            part.inserts.stop();
            break;
        };
        let count = numbers.end - numbers.start;
        let insert = || {
            let (queue, tasks) = (part.load.queue.clone(), part.tasks(numbers.clone(), start));
            let (mut client, request) =
                (client.clone(), v1::InsertRequest { queue, tasks, ..v1::InsertRequest::default() });
            async move { client.insert(timed(request)).await }
        };
        let answer = part.load.taken("Insert", insert).await?;
        part.inserted(start, count, answer.results.len())?;
    }
    Ok(())
}

async fn pop(part: &Part, client: Queues) -> Result<(), Stop> {
    let load = &part.load;
    while let Some(start) = part.takes.next().await {
        let last = load.is_inserted();
        let pop = || {
            let (mut client, queue, lease, wait) = (client.clone(), load.queue.clone(), load.lease(), part.wait());
            async move { client.pop(timed(v1::PopRequest { queue, lease, wait, ..Default::default() })).await }
        };
        let answer = tokio::select! {
            answer = load.taken("Pop", pop) => answer?,
            () = load.settled() => break,
        };
        match answer.task {
            Some(task) => {
                if !part.flow {
                    part.meters.record(Op::Pop, start);
                }
                let held = part.delivered(task).into_iter().collect();
                ack(part, &client, held).await?;
            }
            None if last => break,
            None => {}
        }
    }
    Ok(())
}

async fn pop_batch(part: &Part, client: Queues) -> Result<(), Stop> {
    let load = &part.load;
    while let Some(start) = part.takes.next().await {
        let last = load.is_inserted();
        // Without a grpc-timeout, which would hold for the whole stream.
        let pop_batch = || {
            let (mut client, queue, lease, wait) = (client.clone(), load.queue.clone(), load.lease(), part.wait());
            let request = v1::PopBatchRequest { queue, max_tasks: part.batch, lease, wait, ..Default::default() };
            async move { client.pop_batch(Request::new(request)).await }
        };
        let mut answer = load.taken("PopBatch", pop_batch).await?;
        let (mut held, mut came, mut is_refused) = (Vec::new(), false, false);
        loop {
            let message = tokio::select! {
                message = timeout(CALL_DEADLINE, answer.message()) => message,
                () = load.settled() => return Ok(()),
            };
            let message = match message.map_err(|_| load.silent("PopBatch"))? {
                Ok(message) => message,
                Err(status) => {
                    let pause = overloaded_for(&status).ok_or_else(|| load.failed("PopBatch", status))?;
                    // It leased nothing more; what came before stands.
                    load.overloaded.fetch_add(1, Ordering::Relaxed);
                    sleep(pause).await;
                    is_refused = true;
                    break;
                }
            };
            let Some(message) = message else { break };
            came |= !message.tasks.is_empty();
            held.extend(message.tasks.into_iter().filter_map(|task| part.delivered(task)));
            if part.flow {
                ack(part, &client, std::mem::take(&mut held)).await?;
            }
        }
        if came && !part.flow {
            part.meters.record(Op::Pop, start);
        }
        ack(part, &client, held).await?;
        if last && !came && !is_refused {
            break;
        }
    }
    Ok(())
}

async fn ack(part: &Part, client: &Queues, held: Vec<(u64, String)>) -> Result<(), Stop> {
    if held.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    let (numbers, lease_tokens): (Vec<_>, Vec<_>) = held.into_iter().unzip();
    let ack = || {
        let (mut client, queue, lease_tokens) = (client.clone(), part.load.queue.clone(), lease_tokens.clone());
        async move { client.ack(timed(v1::AckRequest { queue, lease_tokens })).await }
    };
    let answer = part.load.taken("Ack", ack).await?;
    part.acked(start, &numbers, &answer.outcomes)
}

/// After how long a call may be made again that was refused since the server was overloaded.
fn overloaded_for(status: &Status) -> Option<Duration> {
    let error = Error::from(status.clone());
    error.retry_after().filter(|_| error.reason() == Some(reason::OVERLOADED))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::{collections::HashMap, future::ready};

    use data_queue_proto::ERROR_DOMAIN;
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    fn load() -> Load {
        Load::new(Vec::new(), "q".to_owned(), 12, Duration::from_secs(30), ProgressBar::hidden())
    }

    fn refusal(reason: &str) -> Status {
        let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
        details.set_retry_info(Some(Duration::from_millis(100)));
        Status::with_error_details(Code::ResourceExhausted, "no", details)
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_overloaded_server_refuses_is_asked_again() {
        let (load, mut tries) = (load(), 0);
        let answer = load.taken("Insert", || {
            tries += 1;
            ready(if tries < 3 { Err(refusal(reason::OVERLOADED)) } else { Ok(Response::new(tries)) })
        });
        assert_eq!(answer.await.ok(), Some(3));
        assert_eq!(load.overloaded(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn other_refusals_are_not_repeated() {
        for status in [refusal(reason::STORE_FULL), Status::resource_exhausted("no"), Status::unavailable("gone")] {
            let (load, mut tries) = (load(), 0);
            let answer = load.taken("Insert", || {
                tries += 1;
                ready(Err::<Response<()>, _>(status.clone()))
            });
            assert!(answer.await.is_err());
            assert_eq!((tries, load.overloaded()), (1, 0));
        }
    }
}
