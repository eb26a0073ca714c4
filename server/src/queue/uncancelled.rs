//! Work that goes on when its caller leaves.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::CatchUnwind};
use tokio::runtime::Handle;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::Error;

type Caught<F> = CatchUnwind<AssertUnwindSafe<F>>;

/// Runs work as a task of its own, which goes on too while nobody asks for its answer.
pub(super) async fn in_background<T: Send + 'static>(
    background: &TaskTracker,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    background.spawn(work).await.unwrap_or_else(|_| Err(panicked()))
}

/// What comes of a step that panicked.
pub(super) fn panicked() -> Error {
    Error::Bug("a step of a call panicked; standard error has the place".to_owned())
}

/// Runs work that becomes a task of its own when its caller leaves, and not before: most callers stay. Only for callers who ask
/// for the answer whenever they are woken, or what is to be done behind the store's step stays undone.
///
/// A panic of the work is answered as a bug. `background` is what must end before the process does.
pub(super) async fn uncancelled<T: Send + 'static>(
    background: &TaskTracker,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let work = Some(Box::pin(AssertUnwindSafe(work).catch_unwind()));
    Uncancelled { work, undecided: background.token() }.await.map_err(|_| panicked())?
}

struct Uncancelled<F: Future<Output: Send> + Send + 'static> {
    /// Until it is done.
    work: Option<Pin<Box<Caught<F>>>>,
    /// The process does not end before this is decided.
    undecided: TaskTrackerToken,
}

impl<F: Future<Output: Send> + Send + 'static> Future for Uncancelled<F> {
    type Output = <Caught<F> as Future>::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(work) = &mut self.work else { return Poll::Pending };
        let polled = work.as_mut().poll(context);
        if polled.is_ready() {
            self.work = None;
        }
        polled
    }
}

impl<F: Future<Output: Send> + Send + 'static> Drop for Uncancelled<F> {
    fn drop(&mut self) {
        // A runtime that is being torn down drops it.
        if let (Some(work), Ok(runtime)) = (self.work.take(), Handle::try_current()) {
            // Nobody hears what comes of it; a delivery that nobody takes goes back.
            self.undecided.task_tracker().spawn_on(async move { drop(work.await) }, &runtime);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::poll;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn work_goes_on_when_its_caller_leaves_and_is_waited_for() {
        let background = TaskTracker::new();
        let ((go, may_go), (done, is_done)) = (oneshot::channel::<()>(), oneshot::channel());
        let mut call = Box::pin(uncancelled(&background, async move {
            may_go.await.unwrap();
            done.send(()).unwrap();
            Ok(())
        }));
        assert!(poll!(&mut call).is_pending());
        drop(call);
        background.close();
        assert!(background.wait().now_or_never().is_none());
        go.send(()).unwrap();
        background.wait().await;
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn work_in_the_background_goes_on_when_nobody_asks_for_its_answer() {
        let background = TaskTracker::new();
        let (done, is_done) = oneshot::channel();
        let mut call = Box::pin(in_background(&background, async move {
            tokio::task::yield_now().await;
            done.send(()).unwrap();
            Ok(())
        }));
        assert!(poll!(&mut call).is_pending());
        is_done.await.unwrap();
        assert!(matches!(call.await, Ok(())));
    }

    #[tokio::test]
    async fn work_whose_caller_stays_is_no_task_and_a_panic_in_it_is_an_answer() {
        let background = TaskTracker::new();
        assert!(matches!(uncancelled(&background, async { Ok(1) }).await, Ok(1)));
        let panics = async { if true { panic!("as asked") } else { Ok(()) } };
        assert!(matches!(uncancelled(&background, panics).await, Err(Error::Bug(_))));
        assert!(background.is_empty());
    }
}
