//! What a handler gets.

use std::{future::Future, ops::Deref, sync::Arc};

use futures_util::{FutureExt, future::BoxFuture};
use serde::de::DeserializeOwned;

#[cfg(doc)]
use super::Worker;
use super::{Failure, Reject};
use crate::{Task, consumer::Delivered};

/// A task that a worker has given to its handler: a [`Task`]. It is settled by what the handler answers, and by nothing else.
///
/// Clones are cheap, and of the same delivery: for what a handler does on other threads.
#[derive(Clone, Debug)]
pub struct Assigned(pub(super) Arc<Delivered>);

impl Assigned {
    /// Whether there is no use in working on the task any more: an operator deleted it, its lease is known to be lost, or its handler was
    /// cancelled, by the deadline or because the worker stops. A handler that succeeds nevertheless is acked if that is still possible;
    /// one that fails because of this counts as no failure.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.is_over()
    }

    /// Waits until [`Assigned::is_cancelled`]: for ever, if it never is.
    ///
    /// ```no_run
    /// # use data_queue_client::{Assigned, Failure, Task};
    /// # async fn work(task: &Task) -> Result<(), Failure> { Ok(()) }
    /// async fn handle(task: Assigned) -> Result<(), Failure> {
    ///     tokio::select! {
    ///         result = work(&task) => result,
    ///         () = task.cancelled() => Err("cancelled".into()),
    ///     }
    /// }
    /// ```
    ///
    /// Meanwhile the server is asked three times a lease, so that a lost lease is noticed.
    pub async fn cancelled(&self) {
        tokio::select! {
            () = self.0.over() => {}
            () = self.0.lost() => {}
        }
    }

    /// Whether the lease is known to be lost, or the worker has ended with an error: the task may be delivered to another.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}

impl Deref for Assigned {
    type Target = Task;

    fn deref(&self) -> &Task {
        &self.0
    }
}

/// A handler that gets the task's value, read from JSON, and the task. A value that is no JSON, or does not fit `T`, makes a dead
/// letter: it would not fit the next time either. The reason tells the place, and never the value.
///
/// [`Worker`] has an example.
pub fn json<T, F, Fut, E>(
    handler: F,
) -> impl Fn(Assigned) -> BoxFuture<'static, Result<(), Failure>> + Send + Sync + 'static
where
    T: DeserializeOwned,
    F: Fn(T, Assigned) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<Failure> + 'static,
{
    move |task: Assigned| match task.json::<T>() {
        Ok(value) => handler(value, task).map(|result| result.map_err(Into::into)).boxed(),
        Err(error) => std::future::ready(Err(Reject::new(error.to_string()).into())).boxed(),
    }
}
