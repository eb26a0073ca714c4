//! A producer: inserts over one stream, many under way at a time, each done once.
//!
//! A task in the background owns the stream. It numbers the inserts and keeps those that were not answered; when the stream
//! breaks, it opens another one and sends them again with the same numbers, which the server knows. All inserts are
//! settled in the order of their numbers, whatever becomes of them.

mod worker;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use data_queue_proto::v1::{self, data_queue_client::DataQueueClient};
use futures_util::FutureExt;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::Instant,
};
use tonic::transport::Channel;

use self::worker::{Command, Pending, Worker};
#[cfg(doc)]
use crate::ErrorKind;
use crate::{Durability, Error, InsertedTask, NewTask, Result};

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
    durability: Durability,
}

impl ProducerBuilder {
    pub(crate) fn new(grpc: DataQueueClient<Channel>, queue: &str, id: Result<String>, deadline: Duration) -> Self {
        Self {
            grpc,
            queue: queue.to_owned(),
            id,
            deadline,
            inserts: MAX_INSERTS,
            bytes: BYTES,
            durability: Durability::default(),
        }
    }

    /// What inserts wait for. Default: that of the client, see [`Client::durability`](crate::Client::durability).
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
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
        let open =
            v1::ProduceOpen { queue: self.queue, producer_id: self.id?, durability: self.durability.into_message() };
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

impl Receipt {
    /// What became of the insert of a single task: its id, and whether another task has its unique key.
    ///
    /// ```no_run
    /// # async fn example(producer: data_queue_client::Producer) -> data_queue_client::Result<()> {
    /// use data_queue_client::NewTask;
    ///
    /// let task = producer.send(NewTask::json("a letter")?.unique_key("letter-17")).await?.one().await?;
    /// println!("{} {}", task.id, if task.duplicate { "was there" } else { "is new" });
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of the receipt; [`ErrorKind::Internal`] if it is not of one task.
    pub async fn one(self) -> Result<InsertedTask> {
        let mut tasks = self.await?;
        match (tasks.pop(), tasks.is_empty()) {
            (Some(task), true) => Ok(task),
            _ => Err(Error::internal("the receipt is not of one task")),
        }
    }
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

/// About what a task takes.
fn bytes_of(task: &v1::NewTask) -> usize {
    let value = match &task.value {
        Some(v1::new_task::Value::Json(text)) => text.len(),
        Some(v1::new_task::Value::Data(data)) => data.len(),
        None => 0,
    };
    value + task.headers.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
}
