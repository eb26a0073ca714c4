//! Counts that come again and again.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use data_queue_proto::v1;
use futures_util::Stream;
use tonic::Streaming;

use super::QueueActivity;
use crate::{Error, Result, client::duration};

/// What is watched, and how often it is told.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Watch {
    queues: Vec<String>,
    interval: Option<Duration>,
}

impl Watch {
    /// All queues, at most the first 1,000 by name.
    pub fn all() -> Self {
        Self::default()
    }

    /// These queues, 1 to 100; they need not exist. None at all counts as [`Watch::all`].
    pub fn queues(queues: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { queues: queues.into_iter().map(Into::into).collect(), interval: None }
    }

    /// How long between two times: 100 ms to 1 min. Default: 1 s.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = Some(interval);
        self
    }

    pub(super) fn into_message(self) -> v1::WatchQueuesRequest {
        v1::WatchQueuesRequest { queues: self.queues, interval: self.interval.map(duration) }
    }
}

/// What goes on in queues, again and again: each time those that are there, by name. Who does not read is told less often.
///
/// It ends with an error, or when the server ends it. Dropping it ends it too.
pub struct ActivityStream {
    answer: Option<Streaming<v1::WatchQueuesResponse>>,
}

impl ActivityStream {
    pub(super) fn new(answer: Streaming<v1::WatchQueuesResponse>) -> Self {
        Self { answer: Some(answer) }
    }

    /// What is told next, or `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Vec<QueueActivity>>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for ActivityStream {
    type Item = Result<Vec<QueueActivity>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(answer) = &mut self.answer else { return Poll::Ready(None) };
        let told = match ready!(Pin::new(answer).poll_next(context)) {
            Some(Ok(message)) => return Poll::Ready(Some(Ok(message.queues.into_iter().map(Into::into).collect()))),
            Some(Err(status)) => Some(Err(Error::from(status))),
            None => None,
        };
        self.answer = None;
        Poll::Ready(told)
    }
}

impl fmt::Debug for ActivityStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActivityStream").field("ended", &self.answer.is_none()).finish_non_exhaustive()
    }
}
