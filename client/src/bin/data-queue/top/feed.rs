//! What a server tells, again and again, however often it goes away meanwhile.

use std::time::Duration;

use data_queue_client::{ActivityStream, Backoff, Error, QueueActivity, Watch};
use tokio::{sync::mpsc, time::sleep};

use crate::{Stop, session::Session};

/// What was heard and not looked at.
const AHEAD: usize = 1;

/// What comes from a server.
pub(super) enum Heard {
    Queues(Vec<QueueActivity>),
    /// It cannot be heard any more, or still not: in one line.
    Away(String),
}

pub(super) struct Feed(mpsc::Receiver<Result<Heard, Stop>>);

impl Feed {
    /// Goes on with a watch that was opened, and opens it again.
    pub(super) fn start(session: Session, watch: Watch, first: ActivityStream) -> Self {
        let (sender, heard) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            // Whoever listens may leave.
            if let Some(Err(stop)) = follow(&session, watch, first, &sender).await {
                let _ = sender.send(Err(stop)).await;
            }
        });
        Self(heard)
    }

    /// An error is one that trying again does not help.
    pub(super) async fn next(&mut self) -> Result<Heard, Stop> {
        self.0.recv().await.unwrap_or_else(|| Err(Stop::failed("the watch of the queues broke off")))
    }
}

/// Ends with `None` when nobody listens.
async fn follow(
    session: &Session,
    watch: Watch,
    first: ActivityStream,
    heard: &mpsc::Sender<Result<Heard, Stop>>,
) -> Option<Result<(), Stop>> {
    let (mut stream, mut backoff, mut is_away) = (first, Backoff::new(), false);
    loop {
        let mut why = loop {
            match stream.next().await {
                Some(Ok(queues)) => {
                    backoff.reset();
                    is_away = false;
                    heard.send(Ok(Heard::Queues(queues))).await.ok()?;
                }
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        stream = loop {
            if let Some(error) = why.as_ref().filter(|error| !passes(error)) {
                return Some(Err(session.explain(error)));
            }
            if !std::mem::replace(&mut is_away, true) {
                heard.send(Ok(Heard::Away(away(session, why.as_ref())))).await.ok()?;
            }
            let asked = why.as_ref().and_then(Error::retry_after).unwrap_or_default();
            sleep(backoff.pause().max(Duration::from_millis(100)) + asked).await;
            match session.admin().watch_queues(watch.clone()).await {
                Ok(stream) => break stream,
                Err(error) => why = Some(error),
            }
        };
    }
}

fn passes(error: &Error) -> bool {
    use data_queue_client::ErrorKind::{DeadlineExceeded, Overloaded};
    error.is_retriable() || matches!(error.kind(), DeadlineExceeded | Overloaded)
}

fn away(session: &Session, why: Option<&Error>) -> String {
    match why {
        Some(error) => format!("the server at {} is away: {error}", session.address()),
        None => format!("the server at {} ended the watch", session.address()),
    }
}
