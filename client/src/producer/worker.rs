//! The task behind a producer, which owns the stream.

use std::{collections::VecDeque, future::poll_fn, pin::Pin, sync::Arc, task::Poll};

use data_queue_proto::v1::{self, data_queue_client::DataQueueClient, produce_request::Request as Sent};
use futures_util::{Stream, StreamExt, TryFutureExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use super::Unclaimed;
use crate::{Backoff, Durability, Error, ErrorKind, InsertedTask, Result};

#[derive(Debug)]
pub(super) enum Command {
    Insert(Pending),
    Flush(oneshot::Sender<()>),
    Close(oneshot::Sender<()>),
}

/// An insert that was not answered.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) number: u64,
    pub(super) tasks: Vec<v1::NewTask>,
    pub(super) answer: oneshot::Sender<Result<Vec<InsertedTask>>>,
    pub(super) deadline: Instant,
    /// It was sent on an earlier stream, which may have done it.
    pub(super) is_in_doubt: bool,
    pub(super) _room: (Option<OwnedSemaphorePermit>, Option<OwnedSemaphorePermit>),
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
pub(super) struct Worker {
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
    pub(super) fn new(
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

    pub(super) async fn run(mut self) {
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
                    if self.expire(connection.is_some()) && connection.take().is_some() {
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
                    let reached = Durability::from_message(answer.durability);
                    let tasks = answer.results.into_iter().map(|result| InsertedTask::new(result, reached));
                    self.settle_first(Ok(tasks.collect()));
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
        if !error.is_unsent() && !self.is_refused_by(&status) {
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

    /// Whether a stream ended because there was no room for the first insert that was not answered: then neither it nor any
    /// behind it was done on that stream.
    fn is_refused_by(&self, status: &Status) -> bool {
        let first = self.pending.front().map(|first| first.number);
        status.code() == Code::ResourceExhausted && first.is_some() && number_of(status) == first
    }

    /// Whether there were some whose deadline has passed. `is_sent` says whether they are on a stream now.
    fn expire(&mut self, is_sent: bool) -> bool {
        let (now, before) = (Instant::now(), self.pending.len());
        while let Some(first) = self.pending.front()
            && first.deadline <= now
        {
            let is_in_doubt = is_sent || first.is_in_doubt;
            let error = match self.last_failure.clone() {
                Some(last) if !is_in_doubt && last.code() == Code::ResourceExhausted => {
                    Error::from(last).until_deadline()
                }
                last => Error::unanswered(last.map(Error::from)),
            };
            self.settle_first(Err(error));
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

/// Which insert of the stream a status is about.
fn number_of(status: &Status) -> Option<u64> {
    status.get_details_error_info()?.metadata.get("number")?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::collections::HashMap;

    use data_queue_proto::{ERROR_DOMAIN, reason};
    use futures_util::FutureExt;
    use tonic::transport::Endpoint;
    use tonic_types::ErrorDetails;

    use super::{
        super::{LONGEST, Receipt},
        *,
    };

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

    #[tokio::test(start_paused = true)]
    async fn an_insert_without_room_until_its_deadline_says_so_and_that_nothing_was_done() {
        for (is_lost_first, kind) in [(false, ErrorKind::QueueFull), (true, ErrorKind::DeadlineExceeded)] {
            let mut worker = worker();
            let (first, second) = (send(&mut worker), send(&mut worker));
            if is_lost_first {
                assert!(worker.fail(Status::unavailable("gone")).is_some());
            }
            let full = refusal(Code::ResourceExhausted, reason::QUEUE_FULL, 1);
            assert!(worker.fail(full).is_some());
            tokio::time::advance(LONGEST).await;
            assert!(worker.expire(false));
            for receipt in [first, second] {
                let error = receipt.now_or_never().unwrap().unwrap_err();
                assert_eq!(error.kind(), kind);
                assert_eq!(error.to_string().contains("may have been done"), is_lost_first, "{error}");
            }
        }
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
