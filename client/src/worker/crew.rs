//! The handlers that run, and what becomes of their tasks.
//!
//! Each handler is a task of the caller's runtime. Beside it, in the worker's own loop, somebody waits for its end, settles what it
//! worked on, and waits for the server's answer; so it does not matter whether a handler ends by itself, panics, or is not waited for any more.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinError, JoinHandle},
    time::{Instant, sleep, timeout},
};

use super::{Assigned, Event, Failure, OnEvent, Summary, failure::Verdict};
use crate::{
    Error, ErrorKind, Outcome, Putback, Result,
    consumer::{Consumer, Delivered},
};

/// How long the server's last answers are waited for.
const FAREWELL: Duration = Duration::from_secs(5);

type Care = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// The workers' side of it all: who runs, and what has happened.
pub(super) struct Crew<F> {
    handler: Arc<F>,
    deadline: Option<Duration>,
    /// A place for each handler that may run.
    places: Arc<Semaphore>,
    concurrency: u32,
    under_way: FuturesUnordered<Care>,
    /// Handlers are not waited for any more.
    is_over: watch::Sender<bool>,
    log: Log,
}

struct Log {
    summary: Summary,
    on_event: Option<OnEvent>,
}

impl Log {
    fn tell(&mut self, event: Event<'_>) {
        self.summary.count(&event);
        if let Some(on_event) = &mut self.on_event {
            on_event(event);
        }
    }

    fn tell_ended(&mut self, Ended { task, ending }: &Ended) {
        self.tell(match ending {
            Ending::Done => Event::Done(task),
            Ending::Failed(reason) => Event::Failed(task, reason),
            Ending::Rejected(reason) => Event::Rejected(task, reason),
            Ending::GivenBack => Event::GivenBack(task),
            Ending::Lost => Event::Lost(task),
        });
    }
}

/// A task that is no longer under way.
struct Ended {
    task: Arc<Delivered>,
    ending: Ending,
}

enum Ending {
    Done,
    Failed(String),
    Rejected(String),
    GivenBack,
    Lost,
}

impl<F, Fut, E> Crew<F>
where
    F: Fn(Assigned) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<Failure> + 'static,
{
    pub(super) fn new(handler: F, concurrency: u32, deadline: Option<Duration>, on_event: Option<OnEvent>) -> Self {
        Self {
            handler: Arc::new(handler),
            deadline,
            places: Arc::new(Semaphore::new(concurrency as usize)),
            concurrency,
            under_way: FuturesUnordered::new(),
            is_over: watch::Sender::new(false),
            log: Log { summary: Summary::default(), on_event },
        }
    }

    /// Has tasks handled until it is to stop.
    pub(super) async fn work(&mut self, consumer: &Consumer, stop: impl Future<Output = ()>) -> Result<()> {
        let mut stop = pin!(stop);
        loop {
            // No task is taken that no handler could begin with.
            let next = async {
                let place = Arc::clone(&self.places).acquire_owned().await;
                (place, poll_fn(|context| consumer.poll_task(context)).await)
            };
            tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                Some(ended) = self.under_way.next(), if !self.under_way.is_empty() => self.log.tell_ended(&ended),
                error = consumer.broken() => self.log.tell(Event::Disconnected(&error)),
                (place, received) = next => match received {
                    Some(Ok(task)) => self.begin(task, place.ok()),
                    Some(Err(error)) if error.kind() == ErrorKind::Corrupt => self.log.tell(Event::Damaged(&error)),
                    Some(Err(error)) => return Err(error),
                    None => return Err(Error::internal("the worker's stream has ended")),
                }
            }
        }
    }

    fn begin(&mut self, task: Delivered, place: Option<OwnedSemaphorePermit>) {
        self.log.tell(Event::Begun(&task));
        let task = Arc::new(task);
        let work = handle(Arc::clone(&self.handler), Assigned(Arc::clone(&task)), self.deadline, place);
        let work = Work(tokio::spawn(work));
        self.under_way.push(Box::pin(see_through(task, work, self.is_over.subscribe())));
    }

    /// Lets the handlers end, or ends them.
    pub(super) async fn stop(mut self, consumer: Consumer, grace: Duration) -> Result<Summary> {
        consumer.pause();
        while let Some(Some(received)) = poll_fn(|context| consumer.poll_task(context)).now_or_never() {
            match received {
                // Dropped, it goes back.
                Ok(task) => self.log.tell(Event::GivenBack(&task)),
                Err(error) if error.kind() == ErrorKind::Corrupt => self.log.tell(Event::Damaged(&error)),
                Err(error) => return Err(error),
            }
        }
        let places = Arc::clone(&self.places);
        let mut all_ended = pin!(places.acquire_many(self.concurrency));
        let mut closing = pin!(consumer.close().fuse());
        let mut closed = None;
        let mut grace = pin!(sleep(grace));
        loop {
            tokio::select! {
                biased;
                Some(ended) = self.under_way.next(), if !self.under_way.is_empty() => self.log.tell_ended(&ended),
                _ = all_ended.as_mut() => break,
                result = &mut closing => closed = Some(result),
                () = &mut grace => {
                    self.is_over.send_replace(true);
                    break;
                }
            }
        }
        let farewell = async {
            while closed.is_none() || !self.under_way.is_empty() {
                tokio::select! {
                    biased;
                    Some(ended) = self.under_way.next(), if !self.under_way.is_empty() => self.log.tell_ended(&ended),
                    result = &mut closing => closed = Some(result),
                }
            }
        };
        // When it takes longer, the server is away, and what it was told may not have come there.
        let _ = timeout(FAREWELL, farewell).await;
        self.log.summary.lost += self.under_way.len() as u64;
        match closed {
            Some(Err(error)) if !is_passing(&error) => Err(error),
            _ => Ok(self.log.summary),
        }
    }
}

/// The server is away: there is nothing wrong with the worker.
fn is_passing(error: &Error) -> bool {
    error.is_retriable() || matches!(error.kind(), ErrorKind::DeadlineExceeded | ErrorKind::Overloaded)
}

/// A handler at work. It is cancelled by whoever drops it.
struct Work(JoinHandle<Result<(), Failure>>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs the handler. What it answers after its deadline does not count, whether or not it could be cancelled then.
async fn handle<F, Fut, E>(
    handler: Arc<F>,
    task: Assigned,
    deadline: Option<Duration>,
    _place: Option<OwnedSemaphorePermit>,
) -> Result<(), Failure>
where
    F: Fn(Assigned) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Into<Failure> + 'static,
{
    let Some(deadline) = deadline else {
        return handler(task).await.map_err(Into::into);
    };
    let begun = Instant::now();
    match timeout(deadline, async { handler(task).await.map_err(Into::into) }).await {
        Ok(result) if begun.elapsed() <= deadline => result,
        _ => Err(Failure::of_deadline(deadline)),
    }
}

/// Waits until the handler has ended, or is not waited for any more, and settles its task.
async fn see_through(task: Arc<Delivered>, mut work: Work, mut is_over: watch::Receiver<bool>) -> Ended {
    let result = tokio::select! {
        biased;
        joined = &mut work.0 => Some(joined),
        _ = is_over.wait_for(|is_over| *is_over) => None,
    };
    drop(work);
    let (putback, ending) = settlement(&task, result);
    let is_ack = putback.is_none();
    let ending = match task.settle_shared(putback).await {
        Ok(Outcome::Applied) => ending,
        Ok(Outcome::AlreadyAcked) if is_ack => ending,
        Ok(Outcome::AlreadyAcked | Outcome::LeaseLost) | Err(_) => Ending::Lost,
    };
    Ended { task, ending }
}

/// How a task is settled: acked, or put back like this.
fn settlement(task: &Delivered, ended: Option<Result<Result<(), Failure>, JoinError>>) -> (Option<Putback>, Ending) {
    let failure = match ended {
        Some(Ok(Ok(()))) => return (None, Ending::Done),
        Some(Ok(Err(failure))) => failure,
        Some(Err(error)) => match error.try_into_panic() {
            Ok(payload) => Failure::of_panic(payload.as_ref()),
            // Its runtime has ended.
            Err(_) => return (Some(Putback::new()), Ending::GivenBack),
        },
        None => return (Some(Putback::new()), Ending::GivenBack),
    };
    if task.is_cancelled() || task.is_lost() {
        return (Some(Putback::new()), Ending::GivenBack);
    }
    match failure.0 {
        Verdict::Failed(reason) => (Some(Putback::new().failed(true).reason(reason.as_str())), Ending::Failed(reason)),
        Verdict::Rejected(reason) => {
            (Some(Putback::new().dead_letter(true).reason(reason.as_str())), Ending::Rejected(reason))
        }
    }
}
