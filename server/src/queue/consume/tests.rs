//! Sessions with a client that never stops talking, and with one that does not read.

use std::{
    future::pending,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::stream;
use tokio::{sync::mpsc, time::advance};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    queue::{InsertCall, Limits, NewTask, Value, Waits},
    store::{Admin, Attempt, Clock, Fingerprint, SessionId, TEST_RULES, memory::MemoryStore},
};

const SESSION: [u8; 16] = [7; 16];
const LEASE: Duration = Duration::from_secs(1);

/// The paused clock of the runtime.
struct Paused(Instant);

impl Clock for Paused {
    fn now(&self) -> Millis {
        1_000_000 + self.0.elapsed().as_millis() as Millis
    }
}

/// A client that reads so many messages.
#[derive(Clone)]
struct Wire {
    sent: mpsc::UnboundedSender<ConsumeMessage>,
    room: Arc<AtomicUsize>,
    made_room: Arc<Notify>,
}

impl Wire {
    fn new(room: usize) -> (Self, mpsc::UnboundedReceiver<ConsumeMessage>) {
        let (sent, received) = mpsc::unbounded_channel();
        (Self { sent, room: Arc::new(room.into()), made_room: Arc::default() }, received)
    }

    fn read_one(&self) {
        self.room.fetch_add(1, Ordering::Relaxed);
        self.made_room.notify_one();
    }
}

impl Outlet for Wire {
    async fn clear(&self) -> bool {
        while self.room.load(Ordering::Relaxed) == 0 {
            self.made_room.notified().await;
        }
        true
    }

    fn send(&mut self, message: ConsumeMessage) {
        self.room.fetch_sub(1, Ordering::Relaxed);
        self.sent.send(message).unwrap();
    }

    async fn gone(&self) {
        pending().await
    }
}

type Heard = Result<ConsumeCall, Unread<()>>;

fn queues() -> Queues {
    let store: Arc<dyn Admin> = Arc::new(MemoryStore::new(Arc::new(Paused(Instant::now())), TEST_RULES, 1 << 30));
    let limits = Limits {
        max_value: 1 << 20,
        default_lease: LEASE,
        max_stream_age: Duration::from_secs(1_800),
        grace: Duration::from_secs(10),
    };
    Queues::new(store, Arc::new(Waits::default()), limits, CancellationToken::new(), TaskTracker::new())
}

async fn insert(queues: &Queues) {
    let tasks = vec![NewTask { value: Some(Value::Json("1".to_owned())), ..NewTask::default() }];
    let fingerprint = Fingerprint([0; 16]);
    let call = InsertCall { queue: "q".to_owned(), tasks, request_id: String::new(), fingerprint };
    queues.insert(call).await.unwrap();
}

fn open() -> Heard {
    Ok(ConsumeCall::Open(ConsumeOpen {
        queues: vec![("q".to_owned(), 1)],
        lease: None,
        max_outstanding: 10,
        session: SESSION.to_vec(),
        max_hold: None,
    }))
}

/// For a token that nobody has.
fn heartbeat() -> Heard {
    let tokens = Tokens { queue: String::new(), lease_tokens: vec!["0".repeat(32)] };
    Ok(ConsumeCall::Heartbeat(tokens, None))
}

fn handed_over(received: &mut mpsc::UnboundedReceiver<ConsumeMessage>) -> Vec<Token> {
    let mut tokens = Vec::new();
    while let Ok(message) = received.try_recv() {
        if let Some((_, Delivery { tasks, unsent })) = message.delivery {
            tokens.extend(tasks.iter().map(|task| task.token));
            unsent.handed_over();
        }
    }
    tokens
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_stops_talking_gets_tasks() {
    let queues = queues();
    insert(&queues).await;
    let (wire, mut received) = Wire::new(usize::MAX);
    let talk = stream::iter([open()]).chain(stream::repeat_with(heartbeat).take(2 * ASKED_REQUESTS));
    assert!(queues.consume(talk, wire).await.is_ok());
    assert_eq!(handed_over(&mut received).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn leases_are_kept_while_the_client_never_stops_talking() {
    let queues = queues();
    insert(&queues).await;
    let (wire, mut received) = Wire::new(usize::MAX);
    let talk = stream::repeat_with(|| {
        // Time passes, and nothing that waits for it has had its turn.
        let _ = advance(Duration::from_millis(1)).now_or_never();
        heartbeat()
    });
    let talk = stream::iter([open()]).chain(talk.take(10_000));
    assert!(queues.consume(talk, wire).await.is_ok());
    let tokens = handed_over(&mut received);
    assert_eq!(tokens.len(), 1, "delivered once");
    let queue = QueueName::parse("q").unwrap();
    assert_eq!(queues.store.ack(&queue, &tokens).await.unwrap(), [Outcome::Applied]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_session_was_taken_over_answers_before_it_ends() {
    let queues = queues();
    insert(&queues).await;
    insert(&queues).await;
    let (wire, mut received) = Wire::new(1);
    let (say, talk) = mpsc::unbounded_channel();
    let talk = stream::unfold(talk, async |mut talk| Some((talk.recv().await?, talk)));
    say.send(open()).unwrap();
    let session = tokio::spawn({
        let (queues, wire) = (queues.clone(), wire.clone());
        async move { queues.consume(Box::pin(talk), wire).await }
    });
    sleep(LEASE / 10).await;
    let tokens = handed_over(&mut received);
    let lease_tokens = vec![tokens[0].text()];
    say.send(Ok(ConsumeCall::Ack(Tokens { queue: String::new(), lease_tokens }))).unwrap();
    sleep(LEASE / 10).await;
    let queue = QueueName::parse("q").unwrap();
    let other = Consumer { session: SessionId(SESSION), stream: Attempt::mint().unwrap() };
    queues.store.resume(&queue, other, 1_000, 1_000).await.unwrap();
    sleep(LEASE).await;
    // The answer, and the end.
    wire.read_one();
    wire.read_one();
    assert!(matches!(session.await.unwrap(), Err(Ended::Failed(Error::SessionTakenOver))));
    assert_eq!(received.try_recv().unwrap().answers[0].outcomes, [Outcome::Applied]);
}
