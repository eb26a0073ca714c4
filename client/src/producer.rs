//! A producer: inserts over one stream, many under way at a time, each done once.
//!
//! A task in the background owns the stream. It numbers the inserts and keeps those that were not answered; when the stream
//! breaks, it opens another one and sends them again with the same numbers, which the server knows. All inserts are
//! settled in the order of their numbers, whatever becomes of them.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use data_queue_proto::v1::{self, data_queue_client::DataQueueClient, produce_request::Request as Sent};
use futures_util::{FutureExt, Stream, StreamExt, TryFutureExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::{Backoff, Error, ErrorKind, InsertedTask, NewTask, Result};

/// How many inserts may be under way: as many as the server remembers the answers of.
const MAX_INSERTS: u32 = 1_024;
/// The longest that an insert may take: for so long the server remembers at least what it has done.
const LONGEST: Duration = Duration::from_secs(300);
/// How many bytes may be under way, unless set.
const BYTES: u32 = 16 << 20;
/// How many bytes count as one, so that they can be counted with a semaphore.
const BYTES_PER_PERMIT: usize = 64;

/// How a producer is set up.
#[derive(Debug)]
#[must_use]
pub struct ProducerBuilder {
    grpc: DataQueueClient<Channel>,
    queue: String,
    id: Result<String>,
    deadline: Duration,
    inserts: u32,
    bytes: u32,
}

impl ProducerBuilder {
    pub(crate) fn new(grpc: DataQueueClient<Channel>, queue: &str, id: Result<String>, deadline: Duration) -> Self {
        Self { grpc, queue: queue.to_owned(), id, deadline, inserts: MAX_INSERTS, bytes: BYTES }
    }

    /// How long an insert may take from [`Producer::send`] on, with all repeats, at most 5 minutes. Default: that of the
    /// client's calls.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How many inserts may be under way, 1 to 1,024, before [`Producer::send`] waits. Default: 1,024.
    pub fn max_inserts(mut self, inserts: u32) -> Self {
        self.inserts = inserts.clamp(1, MAX_INSERTS);
        self
    }

    /// How many bytes of tasks may be under way before [`Producer::send`] waits; a single insert may have more. Default:
    /// 16 MiB.
    pub fn max_bytes(mut self, bytes: u32) -> Self {
        self.bytes = bytes.max(1);
        self
    }

    /// Makes the producer, within a tokio runtime. It connects with the first insert.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] outside a tokio runtime, or if the system gives no randomness for the producer's name.
    pub fn build(self) -> Result<Producer> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|cause| Error::internal("a producer needs a tokio runtime").caused(cause))?;
        // Bounded by the permits.
        let (commands, inbox) = mpsc::channel(MAX_INSERTS as usize);
        let bytes = (self.bytes as usize).div_ceil(BYTES_PER_PERMIT) as u32;
        let unclaimed = Arc::default();
        let open = v1::ProduceOpen { queue: self.queue, producer_id: self.id? };
        runtime.spawn(Worker::new(self.grpc, open, inbox, Arc::clone(&unclaimed)).run());
        let room = Arc::new(Semaphore::new(self.inserts as usize));
        let byte_room = Arc::new(Semaphore::new(bytes as usize));
        Ok(Producer { commands, room, byte_room, bytes, deadline: self.deadline.min(LONGEST), unclaimed })
    }
}

/// Inserts into one queue over a stream: many at a time under way, in order, each done once however often the connection
/// breaks or the server is restarted. Made by [`Client::producer`](crate::Client::producer); clones share the stream.
///
/// An insert that was sent is worked on until it is answered or its deadline has passed, even when all clones are dropped;
/// [`Producer::close`] waits for that.
///
/// ```no_run
/// use data_queue_client::{Client, NewTask};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::connect("127.0.0.1:50051")?;
/// let producer = client.producer("mail").build()?;
/// for user in 0..100_000 {
///     // Waits only when there is too much under way. What comes of it is told by the receipt, or by the flush.
///     let _receipt = producer.send(NewTask::json(&user)?).await?;
/// }
/// producer.flush().await?;
///
/// for task in producer.send_many([NewTask::json_text("1"), NewTask::json_text("2")]).await?.await? {
///     println!("inserted {}", task.id);
/// }
/// producer.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    commands: mpsc::Sender<Command>,
    room: Arc<Semaphore>,
    byte_room: Arc<Semaphore>,
    /// All of `byte_room`.
    bytes: u32,
    deadline: Duration,
    unclaimed: Arc<Unclaimed>,
}

/// The first error that nobody was told.
#[derive(Debug, Default)]
struct Unclaimed(Mutex<Option<Error>>);

impl Unclaimed {
    fn note(&self, error: Error) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn claim(&self) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

impl Producer {
    /// Inserts one task, behind all that was sent before. Waits until there is room for one more under way; then the receipt
    /// tells what becomes of it.
    ///
    /// # Errors
    /// [`ErrorKind::DeadlineExceeded`] if there was no room in time: the task was not sent. [`ErrorKind::Refused`] if the
    /// producer was closed.
    pub async fn send(&self, task: NewTask) -> Result<Receipt> {
        self.send_many([task]).await
    }

    /// Inserts tasks in this order, all or none; at most 1,000. Otherwise as [`Producer::send`].
    ///
    /// # Errors
    /// As [`Producer::send`].
    pub async fn send_many(&self, tasks: impl IntoIterator<Item = NewTask>) -> Result<Receipt> {
        let deadline = Instant::now() + self.deadline;
        let tasks: Vec<v1::NewTask> = tasks.into_iter().map(NewTask::into_message).collect();
        let bytes: usize = tasks.iter().map(bytes_of).sum();
        let permits = u32::try_from(bytes.div_ceil(BYTES_PER_PERMIT)).unwrap_or(u32::MAX).clamp(1, self.bytes);
        let acquire = async {
            // Nobody closes them.
            let one = Arc::clone(&self.room).acquire_owned().await.ok();
            let bytes = Arc::clone(&self.byte_room).acquire_many_owned(permits).await.ok();
            (one, bytes)
        };
        let room = tokio::time::timeout_at(deadline, acquire).await.map_err(|_| Error::no_room())?;
        let (answer, receipt) = oneshot::channel();
        let insert = Pending { number: 0, tasks, answer, deadline, is_in_doubt: false, _room: room };
        self.commands.send(Command::Insert(insert)).await.map_err(|_| Error::closed())?;
        Ok(Receipt { answer: receipt, unclaimed: Arc::clone(&self.unclaimed) })
    }

    /// Waits until all that was sent before is done, or has failed.
    ///
    /// # Errors
    /// The first error since the last flush of those inserts whose receipts were dropped unread, before or after they failed.
    pub async fn flush(&self) -> Result<()> {
        self.settled(Command::Flush).await
    }

    /// Flushes, and ends the stream. Clones can send no more then.
    ///
    /// # Errors
    /// As [`Producer::flush`].
    pub async fn close(self) -> Result<()> {
        self.settled(Command::Close).await
    }

    /// The error is taken only here, so that it is not lost with somebody who waits no more.
    async fn settled(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) -> Result<()> {
        let (answer, settled) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| Error::closed())?;
        settled.await.map_err(|_| Error::closed())?;
        self.unclaimed.claim()
    }
}

/// What becomes of an insert: a future of one result for each of its tasks, in order. It can be dropped; [`Producer::flush`] tells then
/// whether it failed.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] and others if the insert was refused: nothing of it was done, unless the text says that it may
/// have been, on an earlier stream whose answer was lost. The inserts behind it go on. [`ErrorKind::Internal`] if the server
/// failed at it, and [`ErrorKind::DeadlineExceeded`] if it was not answered in time: it may have been done.
#[derive(Debug)]
pub struct Receipt {
    answer: oneshot::Receiver<Result<Vec<InsertedTask>>>,
    unclaimed: Arc<Unclaimed>,
}

impl Future for Receipt {
    type Output = Result<Vec<InsertedTask>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // The runtime was shut down under it.
        Poll::Ready(ready!(self.answer.poll_unpin(context)).unwrap_or_else(|_| Err(Error::unanswered(None))))
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        // Closed first: what comes from now on is noted by the worker, what has come before is seen here.
        self.answer.close();
        if let Ok(Err(error)) = self.answer.try_recv() {
            self.unclaimed.note(error);
        }
    }
}

#[derive(Debug)]
enum Command {
    Insert(Pending),
    Flush(oneshot::Sender<()>),
    Close(oneshot::Sender<()>),
}

/// An insert that was not answered.
#[derive(Debug)]
struct Pending {
    number: u64,
    tasks: Vec<v1::NewTask>,
    answer: oneshot::Sender<Result<Vec<InsertedTask>>>,
    deadline: Instant,
    /// It was sent on an earlier stream, which may have done it.
    is_in_doubt: bool,
    _room: (Option<OwnedSemaphorePermit>, Option<OwnedSemaphorePermit>),
}

impl Pending {
    fn message(&self) -> v1::ProduceRequest {
        let insert = v1::ProduceInsert { number: self.number, tasks: self.tasks.clone() };
        v1::ProduceRequest { request: Some(Sent::Insert(insert)) }
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<v1::ProduceResponse, Status>> + Send>>;

/// One stream to the server.
struct Connection {
    requests: mpsc::UnboundedSender<v1::ProduceRequest>,
    answers: Answers,
}

/// What the background waits for.
enum Event {
    Command(Option<Command>),
    Answered(Option<Result<v1::ProduceResponse, Status>>),
    /// The first deadline has passed, or a pause is over.
    Time,
}

/// The task in the background.
struct Worker {
    grpc: DataQueueClient<Channel>,
    open: v1::ProduceOpen,
    /// Nothing when all that was sent is all that will be.
    inbox: Option<mpsc::Receiver<Command>>,
    /// In the order of their numbers, and nearly in that of their deadlines.
    pending: VecDeque<Pending>,
    /// Who waits until all before this number are settled.
    flushes: VecDeque<(u64, oneshot::Sender<()>)>,
    next: u64,
    backoff: Backoff,
    last_failure: Option<Status>,
    unclaimed: Arc<Unclaimed>,
}

impl Worker {
    fn new(
        grpc: DataQueueClient<Channel>,
        open: v1::ProduceOpen,
        inbox: mpsc::Receiver<Command>,
        unclaimed: Arc<Unclaimed>,
    ) -> Self {
        Self {
            grpc,
            open,
            inbox: Some(inbox),
            pending: VecDeque::new(),
            flushes: VecDeque::new(),
            next: 1,
            backoff: Backoff::new(),
            last_failure: None,
            unclaimed,
        }
    }

    async fn run(mut self) {
        let mut connection: Option<Connection> = None;
        let mut pause_until: Option<Instant> = None;
        while self.inbox.is_some() || !self.pending.is_empty() {
            if connection.is_none() && pause_until.is_none() && !self.pending.is_empty() {
                connection = Some(self.connect());
            }
            match self.next_event(&mut connection, pause_until).await {
                Event::Command(command) => self.take(command, connection.as_ref()),
                Event::Answered(Some(Ok(response))) => {
                    if !self.settle_answered(response) {
                        connection = None;
                        pause_until = self.fail(Status::internal("the server answered what it was not asked"));
                    }
                }
                Event::Answered(Some(Err(status))) => {
                    connection = None;
                    pause_until = self.fail(status);
                }
                Event::Answered(None) => {
                    connection = None;
                    pause_until = self.fail(Status::unavailable("the server ended the stream"));
                }
                Event::Time => {
                    pause_until = pause_until.filter(|until| Instant::now() < *until);
                    if self.expire() && connection.take().is_some() {
                        // It may stand still, and would go on to hold what has expired.
                        self.doubt();
                        pause_until = Some(Instant::now() + self.backoff.pause());
                    }
                }
            }
            self.answer_flushes();
        }
    }

    fn connect(&self) -> Connection {
        // Bounded by what is pending.
        let (requests, mut inbox) = mpsc::unbounded_channel();
        let _ = requests.send(v1::ProduceRequest { request: Some(Sent::Open(self.open.clone())) });
        for pending in &self.pending {
            let _ = requests.send(pending.message());
        }
        let messages = stream::poll_fn(move |context| inbox.poll_recv(context));
        let mut grpc = self.grpc.clone();
        let opening = async move { grpc.produce(messages).await.map(tonic::Response::into_inner) };
        Connection { requests, answers: Box::pin(opening.try_flatten_stream()) }
    }

    /// Answers come first: they make room.
    async fn next_event(&mut self, connection: &mut Option<Connection>, pause_until: Option<Instant>) -> Event {
        let first_deadline = self.pending.front().map(|pending| pending.deadline);
        let wake_at = [first_deadline, pause_until].into_iter().flatten().min();
        let answered = poll_fn(|context| match connection {
            Some(connection) => connection.answers.poll_next_unpin(context),
            None => Poll::Pending,
        });
        let commanded = async {
            match &mut self.inbox {
                Some(inbox) => inbox.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = answered => Event::Answered(answer),
            command = commanded => Event::Command(command),
            () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => Event::Time,
        }
    }

    fn take(&mut self, command: Option<Command>, connection: Option<&Connection>) {
        match command {
            Some(Command::Insert(mut pending)) => {
                pending.number = self.next;
                self.next += 1;
                if let Some(connection) = connection {
                    // If it is lost with the stream, it is sent on the next one.
                    let _ = connection.requests.send(pending.message());
                }
                self.pending.push_back(pending);
            }
            Some(Command::Flush(answer)) => self.flushes.push_back((self.next, answer)),
            Some(Command::Close(answer)) => {
                self.flushes.push_back((self.next, answer));
                // What clones have sent meanwhile still comes.
                if let Some(inbox) = &mut self.inbox {
                    inbox.close();
                }
            }
            None => self.inbox = None,
        }
    }

    /// False if these are not answers to what was sent.
    fn settle_answered(&mut self, response: v1::ProduceResponse) -> bool {
        for answer in response.answers {
            match self.pending.front() {
                Some(first) if first.number == answer.number && first.tasks.len() == answer.results.len() => {
                    self.settle_first(Ok(answer.results.into_iter().map(InsertedTask::from).collect()));
                    self.backoff.reset();
                    self.last_failure = None;
                }
                // Its deadline had passed.
                Some(first) if answer.number < first.number => {}
                None => {}
                Some(_) => return false,
            }
        }
        true
    }

    fn settle_first(&mut self, result: Result<Vec<InsertedTask>>) {
        let Some(first) = self.pending.pop_front() else { return };
        if let Err(Err(error)) = first.answer.send(result) {
            self.unclaimed.note(error);
        }
    }

    /// Settles the first insert with what a stream ended with.
    fn refuse_first(&mut self, status: &Status) {
        let error = Error::from(status.clone());
        let is_in_doubt = self.pending.front().is_some_and(|first| first.is_in_doubt);
        let may_be_done = is_in_doubt || error.kind() == ErrorKind::Internal;
        self.settle_first(Err(if may_be_done { error.in_doubt() } else { error }));
    }

    /// The stream is lost, and nobody knows what it has done.
    fn doubt(&mut self) {
        self.pending.iter_mut().for_each(|pending| pending.is_in_doubt = true);
    }

    /// What a stream that ended means. Answers until when to pause before the next one.
    fn fail(&mut self, status: Status) -> Option<Instant> {
        let error = Error::from(status.clone());
        let pause = self.backoff.pause() + error.retry_after().unwrap_or_default();
        if self.is_about_first(&status, &error) {
            self.refuse_first(&status);
            return None;
        }
        if !passes(&status, &error) {
            // It is about the stream, not about an insert: none can be done.
            while !self.pending.is_empty() {
                self.refuse_first(&status);
            }
        }
        if !error.is_unsent() {
            self.doubt();
        }
        self.last_failure = Some(status);
        Some(Instant::now() + pause)
    }

    /// Whether it refuses the first insert that was not answered, so that the others may go on without it. One that the server
    /// cannot read has no number, but all before it were answered.
    fn is_about_first(&self, status: &Status, error: &Error) -> bool {
        if error.kind() == ErrorKind::MessageTooLarge {
            return true;
        }
        let first = self.pending.front().map(|first| first.number);
        !passes(status, error) && first.is_some() && number_of(status) == first
    }

    /// Whether there were some whose deadline has passed.
    fn expire(&mut self) -> bool {
        let (now, before) = (Instant::now(), self.pending.len());
        while self.pending.front().is_some_and(|first| first.deadline <= now) {
            let last = self.last_failure.clone().map(Error::from);
            self.settle_first(Err(Error::unanswered(last)));
        }
        self.pending.len() < before
    }

    fn answer_flushes(&mut self) {
        let settled = self.pending.front().map_or(self.next, |first| first.number);
        while self.flushes.front().is_some_and(|(before, _)| *before <= settled) {
            let Some((_, answer)) = self.flushes.pop_front() else { return };
            // Whoever asked may not wait any more.
            let _ = answer.send(());
        }
    }
}

/// Whether another stream may fare better.
fn passes(status: &Status, error: &Error) -> bool {
    let code = status.code();
    error.is_retriable()
        || error.kind() == ErrorKind::DeadlineExceeded
        || matches!(code, Code::ResourceExhausted | Code::Aborted)
}

/// About what a task takes.
fn bytes_of(task: &v1::NewTask) -> usize {
    let value = match &task.value {
        Some(v1::new_task::Value::Json(text)) => text.len(),
        Some(v1::new_task::Value::Data(data)) => data.len(),
        None => 0,
    };
    value + task.headers.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
}

/// Which insert of the stream a status is about.
fn number_of(status: &Status) -> Option<u64> {
    status.get_details_error_info()?.metadata.get("number")?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::collections::HashMap;

    use data_queue_proto::{ERROR_DOMAIN, reason};
    use tonic::transport::Endpoint;
    use tonic_types::ErrorDetails;

    use super::*;

    fn worker() -> Worker {
        let (_, inbox) = mpsc::channel(1);
        let grpc = DataQueueClient::new(Endpoint::from_static("http://127.0.0.1:1").connect_lazy());
        Worker::new(grpc, v1::ProduceOpen::default(), inbox, Arc::default())
    }

    /// Gives the worker one more insert.
    fn send(worker: &mut Worker) -> Receipt {
        let (sender, answer) = oneshot::channel();
        let deadline = Instant::now() + LONGEST;
        let pending =
            Pending { number: 0, tasks: Vec::new(), answer: sender, deadline, is_in_doubt: false, _room: (None, None) };
        worker.take(Some(Command::Insert(pending)), None);
        Receipt { answer, unclaimed: Arc::clone(&worker.unclaimed) }
    }

    fn refusal(code: Code, reason: &str, number: u64) -> Status {
        let metadata = HashMap::from([("number".to_owned(), number.to_string())]);
        Status::with_error_details(code, "no", ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata))
    }

    #[tokio::test]
    async fn a_refusal_says_what_an_earlier_stream_may_have_done() {
        let mut worker = worker();
        let refused = |number| refusal(Code::InvalidArgument, reason::JSON_INVALID, number);
        let first = send(&mut worker);
        assert!(worker.fail(refused(1)).is_none());
        let (second, third) = (send(&mut worker), send(&mut worker));
        assert!(worker.fail(Status::unavailable("gone")).is_some());
        let (fourth, fifth) = (send(&mut worker), send(&mut worker));
        for number in 2..=4 {
            assert!(worker.fail(refused(number)).is_none());
        }
        assert!(worker.fail(refusal(Code::Internal, reason::INTERNAL, 5)).is_none());
        for (receipt, kind, may_be_done) in [
            (first, ErrorKind::InvalidArgument, false),
            (second, ErrorKind::InvalidArgument, true),
            (third, ErrorKind::InvalidArgument, true),
            (fourth, ErrorKind::InvalidArgument, false),
            (fifth, ErrorKind::Internal, true),
        ] {
            let error = receipt.await.unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().contains("may have been done")),
                (kind, may_be_done),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn what_passes_settles_nothing() {
        let mut worker = worker();
        let mut receipt = send(&mut worker);
        for status in [
            Status::deadline_exceeded("you did not read"),
            Status::aborted("another stream"),
            Status::resource_exhausted("calm down"),
            refusal(Code::ResourceExhausted, reason::STORE_FULL, 1),
            Status::unavailable("gone"),
        ] {
            assert!(worker.fail(status).is_some());
            assert!((&mut receipt).now_or_never().is_none());
        }
        assert!(worker.fail(Status::permission_denied("not you")).is_some());
        assert_eq!(receipt.await.unwrap_err().kind(), ErrorKind::Refused);
    }

    #[tokio::test]
    async fn an_error_that_nobody_read_is_told_once_and_the_first_one() {
        let mut worker = worker();
        let (dropped_late, dropped_early, read) = (send(&mut worker), send(&mut worker), send(&mut worker));
        assert!(worker.fail(refusal(Code::InvalidArgument, reason::JSON_INVALID, 1)).is_none());
        assert!(worker.unclaimed.claim().is_ok(), "its receipt may still be read");
        drop((dropped_late, dropped_early));
        worker.fail(Status::permission_denied("not you"));
        read.await.unwrap_err();
        assert_eq!(worker.unclaimed.claim().unwrap_err().kind(), ErrorKind::InvalidArgument);
        worker.unclaimed.claim().unwrap();
    }
}
