//! A worker: a handler that is called with each task of one or more queues, many at a time.
//!
//! `crew` is the handlers that run and what becomes of their tasks, `assigned` what a handler gets, `failure` what it answers when it
//! does not succeed, `event` what an observer is told.

mod assigned;
mod crew;
mod event;
mod failure;

use std::{
    fmt,
    future::{Future, pending},
    time::Duration,
};

use self::crew::Crew;
pub use self::{
    assigned::{Assigned, json},
    event::{Event, Summary},
    failure::{Failure, Reject},
};
#[cfg(doc)]
use crate::ErrorKind;
use crate::{Client, ConsumerBuilder, Error, Result};

/// How many handlers run at once, unless set.
const CONCURRENCY: u32 = 16;
/// How long running handlers may take when the worker stops, unless set.
const GRACE: Duration = Duration::from_secs(30);

/// What a worker tells of.
type OnEvent = Box<dyn FnMut(Event<'_>) + Send>;

/// Calls a handler with each task of one or more queues, and settles the task by what the handler answers.
///
/// ```no_run
/// use std::time::Duration;
///
/// use data_queue_client::{Client, Failure, Reject, Worker, json};
///
/// # async fn send(_: &str, _: &str) -> std::io::Result<()> { Ok(()) }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::connect("127.0.0.1:50051")?;
/// let worker = Worker::new(&client, "mail").queue("news", 2).concurrency(50).deadline(Duration::from_secs(60));
/// let handler = json(|(to, text): (String, String), task| async move {
///     if !to.contains('@') {
///         // It would fail for ever: a dead letter at once.
///         return Err(Reject::new("no such address").into());
///     }
///     // An error of any kind: the task failed, and comes again later.
///     send(&to, &text).await?;
///     println!("{} is done, at delivery {}", task.id(), task.deliveries());
///     Ok::<_, Failure>(())
/// });
/// let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
/// let summary = worker.run_until(stop, handler).await?;
/// println!("{summary:?}");
/// # Ok(())
/// # }
/// ```
///
/// | the handler | its task |
/// | --- | --- |
/// | answers `Ok` | is acked: done and gone |
/// | answers an error, or panics | failed, with the error's text as the reason: it comes again after the queue's backoff, and is a dead letter in the end |
/// | answers a [`Reject`] | is a dead letter at once |
/// | takes longer than [`Worker::deadline`] | failed: "deadline of 60 s passed" |
///
/// **Handlers** run as tasks of their own on the caller's tokio runtime, at most [`Worker::concurrency`] at a time. The stream from the server, its
/// pings and heartbeats are on a thread of the worker's own: a handler that blocks its thread loses no lease. It does hold up the other
/// handlers of that thread, and their deadlines; work that takes the processor for long is better done in
/// [`spawn_blocking`](tokio::task::spawn_blocking). A handler is cancelled by dropping its future, at an `await`. What it has
/// started elsewhere goes on, and sees [`Assigned::is_cancelled`]; the task is not acked.
///
/// **Nothing is acked that its handler did not finish**, and what was not acked is delivered again, here or elsewhere: so a handler may see a
/// task twice, and the same work done twice should do no harm. A task that arrives damaged is failed and never reaches the handler.
///
/// **The server may come and go.** The worker may start before it, opens another stream whenever one breaks, takes along what it holds, and
/// says again what was not answered. Only what no other try helps against ends [`Worker::run`], with an error that names the reason and the
/// field.
#[must_use]
pub struct Worker {
    consumer: ConsumerBuilder,
    concurrency: u32,
    deadline: Option<Duration>,
    grace: Duration,
    on_event: Option<OnEvent>,
}

impl Worker {
    /// A worker on this queue. It keeps a connection of its own to the client's server.
    pub fn new(client: &Client, queue: impl Into<String>) -> Self {
        let consumer = client.consumer(queue);
        Self { consumer, concurrency: CONCURRENCY, deadline: None, grace: GRACE, on_event: None }
    }

    /// Adds a queue, or says the weight of one: its share of the deliveries as long as all queues have tasks, 1 to 100. At most
    /// 64 queues; the first one has weight 1 unless it is named here again.
    pub fn queue(mut self, name: impl Into<String>, weight: u32) -> Self {
        self.consumer = self.consumer.queue(name, weight);
        self
    }

    /// How many handlers run at once, 1 to 10,000; the server sends no more tasks than that ahead of their acks. Default: 16.
    pub fn concurrency(mut self, handlers: u32) -> Self {
        self.concurrency = handlers;
        self
    }

    /// For how long a lease is given and extended, 100 ms to 12 h. The worker extends it by itself, so this is only how long a task
    /// is held for a worker that has died with its server. Default: the server's.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.consumer = self.consumer.lease(lease);
        self
    }

    /// For how long from its delivery a lease is extended, up to 12 h: a handler that takes longer loses its task. Default: 1 h.
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.consumer = self.consumer.max_hold(max_hold);
        self
    }

    /// How long a handler may take. Past it, the handler is cancelled and the task has failed; what a handler answers that could not be
    /// cancelled, because it blocked its thread, does not count. Default: as long as it likes.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// How long handlers that run may go on when the worker stops. Then they are cancelled, and their tasks are put back, which
    /// counts as no failure. Default: 30 s.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Calls this with what happens, one event after the other, from where the worker runs: so it should be quick.
    ///
    /// ```no_run
    /// # fn example(client: data_queue_client::Client) {
    /// use data_queue_client::{Event, Worker};
    ///
    /// let worker = Worker::new(&client, "mail").on_event(|event| match event {
    ///     Event::Begun(_) | Event::Done(_) => {}
    ///     // Neither values nor lease tokens are printed.
    ///     other => eprintln!("{other:?}"),
    /// });
    /// # }
    /// ```
    pub fn on_event(mut self, on_event: impl FnMut(Event<'_>) + Send + 'static) -> Self {
        self.on_event = Some(Box::new(on_event));
        self
    }

    /// Works until an error comes that no other try helps against.
    ///
    /// # Errors
    /// As [`Worker::run_until`].
    pub async fn run<F, Fut, E>(self, handler: F) -> Result<Summary>
    where
        F: Fn(Assigned) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Failure> + 'static,
    {
        self.run_until(pending(), handler).await
    }

    /// Works until `stop` is ready, and stops in good order: no more tasks come, those that were not begun go back at once, the handlers that run
    /// have [`Worker::grace`] to finish, the others are cancelled and their tasks put back; then the server's last answers are
    /// waited for, 5 s at most.
    ///
    /// Dropping the future stops too, without waiting for anybody: handlers are cancelled and their tasks put back.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] and others if the server does not take what the worker was set up with: [`Error::reason`] and
    /// [`Error::field`] say why. What handlers had under way is cancelled then, and delivered again when its leases have run out.
    /// [`ErrorKind::Internal`] if the system gives no thread or no randomness.
    pub async fn run_until<F, Fut, E>(self, stop: impl Future<Output = ()>, handler: F) -> Result<Summary>
    where
        F: Fn(Assigned) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Failure> + 'static,
    {
        if self.concurrency == 0 {
            return Err(Error::invalid_argument("it is 0; 1 to 10,000 are allowed", "concurrency"));
        }
        let consumer = self.consumer.max_outstanding(self.concurrency).start_apart()?;
        let mut crew = Crew::new(handler, self.concurrency, self.deadline, self.on_event);
        crew.work(&consumer, stop).await?;
        crew.stop(consumer, self.grace).await
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { consumer, concurrency, deadline, grace, .. } = self;
        let mut debug = f.debug_struct("Worker");
        debug.field("consumer", consumer).field("concurrency", concurrency);
        debug.field("deadline", deadline).field("grace", grace).finish_non_exhaustive()
    }
}
