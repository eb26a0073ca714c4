//! Tasks as they come: a handle over a stream of deliveries, which is opened anew whenever it breaks.
//!
//! `shared` is what the handle, its tasks and the streams know together, `driver` the task that keeps a stream open.

mod driver;
mod lane;
mod line;
mod shared;
mod state;
mod token;

use std::{
    fmt,
    future::poll_fn,
    ops::Deref,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use data_queue_proto::v1::{ConsumeOpen, ConsumeQueue, data_queue_client::DataQueueClient};
use futures_util::Stream;
use tokio::{
    runtime::{self, Handle},
    sync::oneshot,
    time::sleep,
};
use tonic::transport::{Channel, Endpoint};

use self::{
    driver::Driver,
    lane::{Answer, Wish},
    shared::Shared,
    state::{Received, keep_every},
    token::Token,
};
use crate::{
    Error, ErrorKind, Outcome, Putback, Result, Task,
    client::{applied, dial, duration},
};

/// How many tasks are held at once, unless set.
const MAX_OUTSTANDING: u32 = 100;
/// For how long from its delivery a lease is extended, unless set.
const MAX_HOLD: Duration = Duration::from_secs(60 * 60);
/// The leases that a server takes.
const LEASES: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(12 * 60 * 60);
/// A heartbeat for so long moves no deadline; it only asks.
const NO_LONGER: Duration = Duration::from_millis(100);
/// The random bytes that name a session.
const SESSION_BYTES: usize = 16;

/// How a consumer is set up.
#[derive(Clone)]
#[must_use]
pub struct ConsumerBuilder {
    grpc: DataQueueClient<Channel>,
    endpoint: Endpoint,
    patience: Duration,
    open: ConsumeOpen,
    max_hold: Duration,
}

impl ConsumerBuilder {
    pub(crate) fn new(grpc: DataQueueClient<Channel>, endpoint: Endpoint, patience: Duration, queue: String) -> Self {
        let open = ConsumeOpen { max_outstanding: MAX_OUTSTANDING, ..ConsumeOpen::default() };
        Self { grpc, endpoint, patience, open, max_hold: MAX_HOLD }.queue(queue, 1)
    }

    /// Adds a queue, or says the weight of one: its share of the deliveries as long as all queues have tasks, 1 to 100. At most
    /// 64 queues; the first one has weight 1 unless it is named here again.
    pub fn queue(mut self, name: impl Into<String>, weight: u32) -> Self {
        let name = name.into();
        match self.open.queues.iter_mut().find(|queue| queue.name == name) {
            Some(queue) => queue.weight = weight,
            None => self.open.queues.push(ConsumeQueue { name, weight }),
        }
        self
    }

    /// For how long a lease is given and extended, 100 ms to 12 h. The server extends it by itself as long as the connection
    /// lives. When it sees the connection break, what no other stream of the consumer takes over goes back after 2 s, or at the
    /// end of the lease if that is earlier; only when the server itself is away does the whole lease count. Default: the server's.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.open.lease = Some(duration(lease));
        self
    }

    /// How many tasks the consumer holds at once, those that wait for [`Consumer::next`] included: 1 to 10,000. Default: 100.
    pub fn max_outstanding(mut self, tasks: u32) -> Self {
        self.open.max_outstanding = tasks;
        self
    }

    /// For how long from its delivery the lease of a task is extended without a heartbeat, up to 12 h. Default: 1 h.
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.open.max_hold = Some(duration(max_hold));
        self.max_hold = max_hold;
        self
    }

    /// Starts the consumer, within a tokio runtime. It connects by itself, so it may start before its server.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if `max_outstanding` is 0; [`ErrorKind::Internal`] outside a tokio runtime, or if the system
    /// gives no randomness. What the server refuses is told by [`Consumer::next`].
    pub fn start(self) -> Result<Consumer> {
        let runtime =
            Handle::try_current().map_err(|cause| Error::internal("a consumer needs a tokio runtime").caused(cause))?;
        let (consumer, driver) = self.prepare()?;
        runtime.spawn(driver.run());
        Ok(consumer)
    }

    /// As [`ConsumerBuilder::start`], but on a thread with a runtime and a connection of its own: what blocks the caller's threads holds up
    /// neither the pings of the connection nor the heartbeats. The thread ends with the consumer and the last of its tasks.
    pub(crate) fn start_apart(self) -> Result<Consumer> {
        let endpoint = self.endpoint.clone();
        let (mut consumer, mut driver) = self.prepare()?;
        consumer.fails_damaged = true;
        let shared = Arc::clone(&consumer.shared);
        let drive = move || match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(async {
                // A connection lives on the runtime that it was made on.
                driver.grpc = dial(&endpoint);
                driver.run().await;
            }),
            Err(cause) => shared.end(Err(Error::internal("the worker's thread has no runtime").caused(cause))),
        };
        let thread = thread::Builder::new().name("data-queue-worker".to_owned()).spawn(drive);
        thread.map_err(|cause| Error::internal("the worker's thread cannot be started").caused(cause))?;
        Ok(consumer)
    }

    fn prepare(mut self) -> Result<(Consumer, Driver)> {
        if self.open.max_outstanding == 0 {
            return Err(Error::invalid_argument("it is 0; 1 to 10,000 are allowed", "max_outstanding"));
        }
        let mut session = [0; SESSION_BYTES];
        getrandom::fill(&mut session)
            .map_err(|cause| Error::internal("the system gives no randomness").caused(cause))?;
        self.open.session = session.to_vec().into();
        let queues = self.open.queues.iter().map(|queue| queue.name.clone());
        let max_outstanding = self.open.max_outstanding;
        let shared = Arc::new(Shared::new(queues, max_outstanding, self.max_hold));
        let driver = Driver::new(Arc::clone(&shared), self.grpc, self.endpoint, self.open, self.patience);
        Ok((Consumer { shared, max_outstanding, fails_damaged: false }, driver))
    }
}

impl fmt::Debug for ConsumerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConsumeOpen { queues, lease, max_outstanding, .. } = &self.open;
        let mut debug = f.debug_struct("ConsumerBuilder");
        debug.field("queues", queues).field("lease", lease).field("max_outstanding", max_outstanding);
        debug.finish_non_exhaustive()
    }
}

/// The tasks of one or more queues, as they come.
///
/// ```no_run
/// use data_queue_client::{Client, ErrorKind};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::connect("127.0.0.1:50051")?;
/// let mut consumer = client.consumer("mail").queue("news", 2).max_outstanding(20).start()?;
/// loop {
///     match consumer.next().await {
///         Ok(Some(task)) => {
///             // Each in a task of its own; what panics is put back.
///             tokio::spawn(async move {
///                 println!("{}: {:?}", task.queue(), task.text());
///                 task.done();
///             });
///         }
///         Ok(None) => break,
///         Err(error) if error.kind() == ErrorKind::Corrupt => eprintln!("{error}"),
///         Err(error) => return Err(error.into()),
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// The server sends tasks ahead, at most `max_outstanding` that are neither acked nor put back, and extends their leases as
/// long as the connection lives: no heartbeats are needed. When it breaks, or the server stops, the consumer opens another
/// stream by itself, on the same or on another server, takes along what it holds, and says again what was not answered.
/// Pauses between tries grow, up to 2 s, and end when a server is there. No task is handed out twice for one delivery.
///
/// An error of [`Consumer::next`] that is not [`ErrorKind::Corrupt`] is the end: trying again would not help.
///
/// A task that is dropped, or whose handler panics, comes back at once, and that counts neither as an expiry nor as a failure: a
/// handler that always drops it gets it again and again. [`Delivered::fail`] lets it wait, and gives it up in the end.
///
/// Dropping the consumer gives back what waits in it. The tasks that were handed out may be finished nevertheless;
/// [`Consumer::close`] waits for them.
pub struct Consumer {
    shared: Arc<Shared>,
    max_outstanding: u32,
    /// What arrives damaged is put back as failed, so that it is given up in the end.
    fails_damaged: bool,
}

impl Consumer {
    /// The next task. `None` after an error that was the end.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a task that arrived damaged: the next call goes on, and the task is put back after about a lease,
    /// a minute at most, as it may be damaged for good and come again. Others are the end: [`ErrorKind::InvalidArgument`] if the server does not take what the consumer was set up with, and what else it refuses.
    pub async fn next(&mut self) -> Result<Option<Delivered>> {
        poll_fn(|context| self.poll_task(context)).await.transpose()
    }

    /// Asks for no more tasks for now. Those that were sent ahead still come.
    pub fn pause(&self) {
        self.shared.set_max_outstanding(0);
    }

    /// Asks for tasks again.
    pub fn resume(&self) {
        self.shared.set_max_outstanding(self.max_outstanding);
    }

    /// Acks tasks together; answers one outcome for each, in order. A task that was acked by an earlier try is done, and answers
    /// [`Outcome::AlreadyAcked`].
    ///
    /// # Errors
    /// Those of the consumer's end. A lost lease is an outcome.
    pub async fn ack_all(&self, tasks: impl IntoIterator<Item = Delivered>) -> Result<Vec<Outcome>> {
        let answers: Vec<_> = tasks.into_iter().map(|task| task.settle(Wish::Ack)).collect();
        let mut outcomes = Vec::with_capacity(answers.len());
        for answer in answers {
            outcomes.push(self.shared.answer(answer).await?.outcome);
        }
        Ok(outcomes)
    }

    /// How many acks by [`Delivered::done`] came too late, since the lease was lost, or were not made, since the consumer had
    /// ended: these tasks are delivered again.
    #[must_use]
    pub fn late_acks(&self) -> u64 {
        self.shared.late_acks()
    }

    /// Ends the consumer: no more tasks come, those that wait in it go back, and those that were handed out are waited for
    /// until they are acked, put back or dropped. Answers [`Consumer::late_acks`].
    ///
    /// Do not wait for it while holding a task in the same place. To stop without waiting, drop the consumer. While no server is
    /// there to take the last acks, they are tried for as long as a call may take.
    ///
    /// # Errors
    /// The one that ended the consumer, or that kept it from being closed.
    pub async fn close(self) -> Result<u64> {
        self.shared.close();
        self.shared.ended().await?;
        Ok(self.shared.late_acks())
    }

    pub(crate) fn poll_task(&self, context: &mut Context<'_>) -> Poll<Option<Result<Delivered>>> {
        self.shared.poll_received(context).map(|received| {
            received.map(|received| {
                let Received { task, token, lane } = received?;
                let task = Task::receive(task).inspect_err(|damage| self.refuse(lane, token, damage))?;
                let is_settled = AtomicBool::new(false);
                Ok(Delivered { task, token, lane, shared: Arc::clone(&self.shared), is_settled })
            })
        })
    }

    fn refuse(&self, lane: usize, token: Token, damage: &Error) {
        if self.fails_damaged {
            let failed = Putback::new().failed(true).reason(damage.to_string());
            self.shared.tell(lane, token, Wish::PutBack(Some(Arc::new(failed))));
        } else {
            self.shared.rest(lane, token);
        }
    }

    /// Waits until a stream has broken, or could not be opened, since it was last asked; answers why.
    pub(crate) async fn broken(&self) -> Error {
        self.shared.broken().await
    }
}

impl Stream for Consumer {
    type Item = Result<Delivered>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_task(context)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("max_outstanding", &self.max_outstanding).finish_non_exhaustive()
    }
}

/// A task that a consumer delivered: a [`Task`], to be acked or put back. Dropped without either it is put back, so that what
/// panics or forgets holds no task for ever. It is delivered again at once then, however often: [`Task::deliveries`] counts,
/// [`Task::expiries`] does not.
pub struct Delivered {
    task: Task,
    token: Token,
    lane: usize,
    shared: Arc<Shared>,
    is_settled: AtomicBool,
}

impl Delivered {
    /// Acks the task without waiting for the answer: acks that come together go together. Those that came too late are counted
    /// by [`Consumer::late_acks`].
    pub fn done(self) {
        self.is_settled.store(true, Ordering::Release);
        self.shared.tell(self.lane, self.token, Wish::Ack);
    }

    /// Ends the task: it is done and gone for good. Said again where needed; a task that was acked by an earlier try is done.
    /// A call that is no longer waited for takes effect nevertheless.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] if the lease ran out and was taken back: the task is delivered again. And those of the
    /// consumer's end.
    pub async fn ack(self) -> Result<()> {
        let answer = self.settle(Wish::Ack);
        match self.shared.answer(answer).await?.outcome {
            Outcome::Applied | Outcome::AlreadyAcked => Ok(()),
            Outcome::LeaseLost => Err(Error::about_task(ErrorKind::LeaseLost, self.id())),
        }
    }

    /// Gives the task back to the head of its queue. Said again where needed: [`ErrorKind::LeaseLost`] may then also mean that
    /// an earlier try, whose answer was lost, gave it back. Dropping the task does the same without an answer.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`], and those of the consumer's end.
    pub async fn putback(self) -> Result<()> {
        self.give_back(None).await
    }

    /// Says that the task failed, and why: it waits as long as the queue's backoff says, or becomes a dead letter if it failed too
    /// often. Said again where needed, and counted once; [`ErrorKind::LeaseLost`] as for [`Delivered::putback`].
    ///
    /// # Errors
    /// As [`Delivered::putback`].
    pub async fn fail(self, reason: impl Into<String>) -> Result<()> {
        self.put_back_with(Putback::new().failed(true).reason(reason)).await
    }

    /// Gives the task back, as the options say. Tasks that are given back alike, one after the other, go together.
    ///
    /// # Errors
    /// As [`Delivered::putback`]; [`ErrorKind::InvalidArgument`] for a delay over 366 days: the task goes back at once then.
    pub async fn put_back_with(self, options: Putback) -> Result<()> {
        options.check()?;
        self.give_back((options != Putback::new()).then(|| Arc::new(options))).await
    }

    async fn give_back(self, options: Option<Arc<Putback>>) -> Result<()> {
        let answer = self.settle(Wish::PutBack(options));
        applied(self.shared.answer(answer).await?.outcome, &self.task)
    }

    /// Moves the deadline of the lease to now + `lease`, never to an earlier time; `None` is as long as the consumer's leases
    /// are. Answers how much time is left. Needed only to hold a task for longer than `max_hold`, or to make sure of it.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] if another may hold the task now; [`ErrorKind::InvalidArgument`] for a lease that is not between
    /// 100 ms and 12 h; and those of the consumer's end.
    pub async fn heartbeat(&self, lease: impl Into<Option<Duration>>) -> Result<Duration> {
        let lease = lease.into();
        if lease.is_some_and(|lease| !LEASES.contains(&lease)) {
            return Err(Error::invalid_argument("the lease is not between 100 ms and 12 h", "lease"));
        }
        let Answer { outcome, lease } =
            self.shared.answer(self.shared.ask(self.lane, self.token, Wish::Heartbeat(lease))).await?;
        applied(outcome, &self.task)?;
        Ok(lease.unwrap_or_default())
    }

    /// Whether the lease is known to be lost, or the consumer has ended with an error: the task may be delivered to another.
    /// The truth is known only to the server: an ack tells it.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.shared.is_lost(self.token)
    }

    /// Waits until the lease is known to be lost, or the consumer has ended with an error: for a handler that works for long and
    /// should not go on in vain.
    ///
    /// Meanwhile the server is asked three times a lease with a heartbeat, which extends nothing, but is a sign of life to
    /// whoever puts back tasks by how long they have been held.
    pub async fn lost(&self) {
        let every = keep_every(self.task.lease());
        let asked = async {
            loop {
                sleep(every).await;
                if self.heartbeat(NO_LONGER).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = self.shared.lost(self.token) => {}
            () = asked => {}
        }
    }

    /// Whether an operator is known to have deleted the task while it is held: there is no use in working on it. An ack still works;
    /// put back, or failed, it is gone. The server tells when it extends the lease, within a third of it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.shared.is_cancelled(self.token)
    }

    /// Waits until the task is known to be cancelled, as [`Delivered::is_cancelled`] says: for ever, if it is not. It asks nothing
    /// of the server.
    ///
    /// ```no_run
    /// # async fn work(task: &data_queue_client::Task) {}
    /// # async fn example(task: data_queue_client::Delivered) -> data_queue_client::Result<()> {
    /// let is_worked = tokio::select! {
    ///     () = work(&task) => true,
    ///     () = task.cancelled() => false,
    /// };
    /// if is_worked { task.ack().await } else { task.putback().await }
    /// # }
    /// ```
    pub async fn cancelled(&self) {
        self.shared.cancelled(self.token).await;
    }

    fn settle(&self, wish: Wish) -> oneshot::Receiver<Answer> {
        self.is_settled.store(true, Ordering::Release);
        self.shared.ask(self.lane, self.token, wish)
    }

    /// Acks the task, or puts it back with these options, while its handler may still have a part in it; that part is told. For
    /// who does so once.
    pub(crate) async fn settle_shared(self: &Arc<Self>, putback: Option<Putback>) -> Result<Outcome> {
        let wish = match putback {
            None => Wish::Ack,
            Some(options) => Wish::PutBack((options != Putback::new()).then(|| Arc::new(options))),
        };
        let answer = self.settle(wish);
        if Arc::strong_count(self) > 1 {
            self.shared.wake();
        }
        Ok(self.shared.answer(answer).await?.outcome)
    }

    /// Whether there is no use in working on it: it was cancelled, its lease is known to be lost, or it was settled.
    pub(crate) fn is_over(&self) -> bool {
        self.is_settled.load(Ordering::Acquire) || self.is_cancelled() || self.is_lost()
    }

    /// Waits until it is known that there is no use in working on it. It asks nothing of the server.
    pub(crate) async fn over(&self) {
        self.shared.over(self.token, &self.is_settled).await;
    }
}

impl Deref for Delivered {
    type Target = Task;

    fn deref(&self) -> &Task {
        &self.task
    }
}

impl Drop for Delivered {
    fn drop(&mut self) {
        if !*self.is_settled.get_mut() {
            self.shared.tell(self.lane, self.token, Wish::PutBack(None));
        }
    }
}

impl fmt::Debug for Delivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Delivered").field(&self.task).finish()
    }
}
