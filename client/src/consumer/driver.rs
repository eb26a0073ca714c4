//! The task that owns a consumer's streams: it opens one, follows it, and opens another with the same session when it ends.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use data_queue_proto::{
    reason,
    v1::{ConsumeOpen, ConsumeRequest, ConsumeResponse, consume_request::Request, data_queue_client::DataQueueClient},
};
use futures_util::Stream;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::shared::Shared;
use crate::{Backoff, Error, ErrorKind, Result, client::dial};

/// How long a stream that is left may take for the answers that it owes.
const FAREWELL: Duration = Duration::from_secs(1);
/// A stream that lived for less has proved nothing: drained, it is not replaced at once, as its server might go on like that.
const YOUNG: Duration = Duration::from_secs(1);

pub(super) struct Driver {
    shared: Arc<Shared>,
    pub(super) grpc: DataQueueClient<Channel>,
    endpoint: Endpoint,
    open: ConsumeOpen,
    /// How long opening a stream may take, and all tries together once the consumer was closed.
    patience: Duration,
    backoff: Backoff,
    streams: u64,
    /// The session was lost to another stream, and no stream has worked or lived for long since.
    was_taken_over: bool,
    closing_since: Option<Instant>,
}

/// An open stream.
struct Line {
    id: u64,
    since: Instant,
    stream: Streaming<ConsumeResponse>,
}

/// How a stream ended.
enum Followed {
    /// All is done.
    Finished,
    /// After this pause another one may be tried.
    Broken(Duration),
    /// It goes on for a while, without new tasks.
    Drains,
}

/// Ends what is shared, also when the task is dropped with its runtime.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end(Err(Error::internal("the runtime of the consumer has ended")));
    }
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        grpc: DataQueueClient<Channel>,
        endpoint: Endpoint,
        open: ConsumeOpen,
        patience: Duration,
    ) -> Self {
        Self {
            shared,
            grpc,
            endpoint,
            open,
            patience,
            backoff: Backoff::new(),
            streams: 0,
            was_taken_over: false,
            closing_since: None,
        }
    }

    /// Runs until the consumer was closed and all is answered, or an error comes that no other stream helps against.
    pub(super) async fn run(mut self) {
        let ending = Ending(Arc::clone(&self.shared));
        let shared = Arc::clone(&self.shared);
        let ended = tokio::select! {
            ended = self.work() => ended,
            () = shared.finished() => Ok(()),
            never = shared.put_back_rested() => match never {},
        };
        ending.0.end(ended);
    }

    async fn work(&mut self) -> Result<()> {
        let mut line = self.connect(Duration::ZERO).await?;
        loop {
            self.shared.speak(line.id);
            line = match self.follow(&mut line).await? {
                Followed::Finished => return Ok(()),
                Followed::Broken(pause) => {
                    self.shared.remove_line(line.id);
                    drop(line);
                    self.connect(pause).await?
                }
                Followed::Drains => self.replace(line).await?,
            };
        }
    }

    /// Takes the messages of a stream until it ends, or is about to.
    async fn follow(&mut self, line: &mut Line) -> Result<Followed> {
        let mut keep_at = None;
        loop {
            let message = tokio::select! {
                message = line.stream.message() => message,
                () = sleep_until(keep_at.unwrap_or_else(Instant::now)), if keep_at.is_some() => {
                    keep_at = self.shared.keep(line.id);
                    continue;
                }
            };
            let error = match message {
                Ok(Some(message)) => {
                    self.note_progress(&message);
                    let drains = message.drain;
                    if self.shared.receive(line.id, message)? {
                        keep_at = self.shared.keep(line.id);
                    }
                    if drains {
                        return Ok(Followed::Drains);
                    }
                    continue;
                }
                Ok(None) => Error::ended("the server ended the stream"),
                Err(status) => Error::from(status),
            };
            if self.shared.is_finished() {
                return Ok(Followed::Finished);
            }
            if line.since.elapsed() >= YOUNG {
                self.was_taken_over = false;
            }
            return Ok(Followed::Broken(self.pause_after(error)?));
        }
    }

    fn note_progress(&mut self, message: &ConsumeResponse) {
        if !message.tasks.is_empty() || !message.answers.is_empty() {
            self.backoff.reset();
            self.was_taken_over = false;
            self.closing_since = None;
        }
    }

    /// Opens another stream while the old one is still good for answers.
    async fn replace(&mut self, mut old: Line) -> Result<Line> {
        // On the connection at hand the server that stops refuses new streams; on a new one there may be another server.
        self.grpc = dial(&self.endpoint);
        let pause = if old.since.elapsed() < YOUNG { self.backoff.pause() } else { Duration::ZERO };
        let shared = Arc::clone(&self.shared);
        let mut is_old_there = true;
        let line = {
            let mut connect = pin!(self.connect(pause));
            loop {
                tokio::select! {
                    line = connect.as_mut() => break line?,
                    message = old.stream.message(), if is_old_there => match message {
                        Ok(Some(message)) => drop(shared.receive(old.id, message)?),
                        Ok(None) | Err(_) => {
                            is_old_there = false;
                            shared.remove_line(old.id);
                        }
                    }
                }
            }
        };
        // What was said on it is better answered than said again: a repeated putback cannot tell what became of the first.
        shared.silence(old.id);
        let limit = Instant::now() + FAREWELL;
        while is_old_there && !shared.is_answered(old.id) {
            match timeout_at(limit, old.stream.message()).await {
                Ok(Ok(Some(message))) => drop(shared.receive(old.id, message)?),
                Ok(Ok(None) | Err(_)) | Err(_) => break,
            }
        }
        shared.remove_line(old.id);
        Ok(line)
    }

    /// Opens a stream, however many tries it takes.
    async fn connect(&mut self, mut pause: Duration) -> Result<Line> {
        loop {
            sleep(pause).await;
            match self.open().await {
                Ok(line) => return Ok(line),
                Err(error) => pause = self.pause_after(error)?,
            }
        }
    }

    async fn open(&mut self) -> Result<Line> {
        self.streams += 1;
        let id = self.streams;
        let attempt = Attempt { shared: &self.shared, id, is_open: false };
        let max_outstanding = self.shared.add_line(id);
        let open = ConsumeOpen { max_outstanding, ..self.open.clone() };
        let outbox = Outbox { shared: Arc::clone(&self.shared), id, open: Some(open) };
        let opened = timeout(self.patience, self.grpc.consume(outbox)).await;
        let stream = opened.map_err(|_| Error::deadline(None))??.into_inner();
        attempt.succeeded();
        Ok(Line { id, since: Instant::now(), stream })
    }

    /// How long to pause before another stream is tried, or the error if that would not help.
    fn pause_after(&mut self, error: Error) -> Result<Duration> {
        let is_taken_over = error.reason() == Some(reason::SESSION_TAKEN_OVER);
        // The session is this consumer's alone: it was a stream of its own that was thought dead and came late. Once.
        let helps = error.is_retriable()
            || error.retry_after().is_some()
            || matches!(error.kind(), ErrorKind::DeadlineExceeded | ErrorKind::Overloaded)
            || (is_taken_over && !self.was_taken_over);
        self.was_taken_over |= is_taken_over;
        if !helps {
            return Err(error);
        }
        self.shared.note_break(&error);
        if error.reason() == Some(reason::SHUTTING_DOWN) {
            self.grpc = dial(&self.endpoint);
        }
        if self.shared.is_closing() {
            let now = Instant::now();
            if now > *self.closing_since.get_or_insert(now) + self.patience {
                return Err(error);
            }
        }
        Ok(self.backoff.pause() + error.retry_after().unwrap_or_default())
    }
}

/// A stream that is being opened. Given up, it leaves nothing behind.
struct Attempt<'a> {
    shared: &'a Shared,
    id: u64,
    is_open: bool,
}

impl Attempt<'_> {
    fn succeeded(mut self) {
        self.is_open = true;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.is_open {
            self.shared.remove_line(self.id);
        }
    }
}

/// The requests of a stream: the first one, and then what waits whenever the stream has room.
struct Outbox {
    shared: Arc<Shared>,
    id: u64,
    open: Option<ConsumeOpen>,
}

impl Stream for Outbox {
    type Item = ConsumeRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let said = |request| ConsumeRequest { request: Some(request) };
        if let Some(open) = self.open.take() {
            return Poll::Ready(Some(said(Request::Open(open))));
        }
        self.shared.poll_request(self.id, context).map(|request| request.map(said))
    }
}
