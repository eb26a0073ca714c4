//! How tasks are asked for: one, or a stream of many.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use data_queue_proto::v1;
use futures_util::Stream;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Streaming;

use crate::{Error, Outcome, Result, Task};

/// What a pop asks for. By default: no wait, and the server's lease.
#[derive(Clone, Default)]
pub struct Pop {
    pub(crate) lease: Option<Duration>,
    pub(crate) wait: Duration,
    pub(crate) request_id: Option<String>,
    pub(crate) ack_lease_tokens: Vec<String>,
}

impl Pop {
    /// A pop that does not wait and takes the server's lease.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How long the task is held, 100 ms to 12 h.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// How long to wait for a task, up to 60 s.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Acks this task first, which must be of the queue that is popped: one round trip instead of two.
    #[must_use]
    pub fn ack(self, task: &Task) -> Self {
        self.ack_token(task.lease_token())
    }

    /// Acks the task with this lease token first.
    #[must_use]
    pub fn ack_token(mut self, lease_token: impl Into<String>) -> Self {
        self.ack_lease_tokens.push(lease_token.into());
        self
    }

    /// Names the call, instead of a fresh random id. A pop repeated with the same id gets the task of the first one, as
    /// long as it is still leased under it.
    #[must_use]
    pub fn request_id(mut self, request_id: impl Into<String>) -> Self {
        self.request_id = Some(request_id.into());
        self
    }
}

impl fmt::Debug for Pop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lease, wait, .. } = self;
        f.debug_struct("Pop").field("lease", lease).field("wait", wait).finish_non_exhaustive()
    }
}

/// What a pop got.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Popped {
    /// The task, if one came.
    pub task: Option<Task>,
    /// What became of the tasks to ack, in order.
    pub ack_outcomes: Vec<Outcome>,
}

/// What a batch pop asks for. By default: no wait, and the server's lease.
#[derive(Clone, Debug)]
pub struct PopBatch {
    pub(crate) max_tasks: u32,
    pub(crate) lease: Option<Duration>,
    pub(crate) wait: Duration,
}

impl PopBatch {
    /// Asks for at most so many tasks, 1 to 10,000.
    #[must_use]
    pub fn new(max_tasks: u32) -> Self {
        Self { max_tasks, lease: None, wait: Duration::ZERO }
    }

    /// How long each task is held from its delivery, 100 ms to 12 h.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// The stream ends when no task came for this long, up to 60 s.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

/// The tasks of a batch pop, as they come.
///
/// A damaged task is an error that names it, and the stream goes on; after any other error it ends. Dropping the stream
/// gives back what was not handed over; what was comes back when its lease runs out.
pub struct TaskStream {
    answer: Option<Streaming<v1::PopBatchResponse>>,
    received: std::vec::IntoIter<v1::Task>,
    patience: Duration,
    // Runs only while the reader waits: a reader may take its time.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl TaskStream {
    pub(crate) fn new(answer: Streaming<v1::PopBatchResponse>, patience: Duration) -> Self {
        Self { answer: Some(answer), received: Vec::new().into_iter(), patience, alarm: None }
    }

    /// The next task, or `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Task>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<v1::PopBatchResponse>>> {
        let Some(answer) = &mut self.answer else { return Poll::Ready(None) };
        if let Poll::Ready(message) = Pin::new(answer).poll_next(context) {
            self.alarm = None;
            return Poll::Ready(message.map(|message| message.map_err(Error::from)));
        }
        let patience = self.patience;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
        ready!(alarm.as_mut().poll(context));
        Poll::Ready(Some(Err(Error::deadline(None))))
    }
}

impl Stream for TaskStream {
    type Item = Result<Task>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(message) = self.received.next() {
                return Poll::Ready(Some(Task::receive(message)));
            }
            match ready!(self.poll_message(context)) {
                Some(Ok(message)) => self.received = message.tasks.into_iter(),
                Some(Err(error)) => {
                    self.answer = None;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.answer = None;
                    return Poll::Ready(None);
                }
            }
        }
    }
}

impl fmt::Debug for TaskStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskStream").field("ended", &self.answer.is_none()).finish_non_exhaustive()
    }
}
