//! Sessions with a client that never stops talking, with one that does not read, and with others that are no matter of the wire.

use std::{
    future::pending,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::stream;
use tokio::{sync::mpsc, task::JoinHandle, time::advance};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{asked::ASKED_REQUESTS, *};
use crate::{
    queue::{Delivery, InsertCall, Limits, NewTask, Seat, Value, Waits},
    store::{
        Admin, Attempt, Clock, Fingerprint, Millis, QueueName, SessionId, Setting, State, TEST_RULES,
        memory::MemoryStore,
    },
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
    server(store)
}

/// One server of those on this store.
fn server(store: Arc<dyn Admin>) -> Queues {
    let limits = Limits {
        max_value: 1 << 20,
        default_lease: LEASE,
        max_stream_age: Duration::from_secs(1_800),
        grace: Duration::from_secs(10),
    };
    Queues::new(store, Arc::new(Waits::default()), limits, CancellationToken::new(), TaskTracker::new())
}

async fn insert(queues: &Queues) {
    insert_into(queues, "q").await;
}

async fn insert_into(queues: &Queues, queue: &str) {
    let tasks = vec![NewTask { value: Some(Value::Json("1".to_owned())), ..NewTask::default() }];
    let fingerprint = Fingerprint([0; 16]);
    let call = InsertCall { queue: queue.to_owned(), tasks, request_id: String::new(), fingerprint, durability: 0 };
    queues.insert(call).await.unwrap();
}

fn open() -> Heard {
    open_for(&["q"], 10)
}

fn open_for(queues: &[&str], max_outstanding: u32) -> Heard {
    Ok(ConsumeCall::Open(ConsumeOpen {
        queues: queues.iter().map(|queue| ((*queue).to_owned(), 1)).collect(),
        lease: None,
        max_outstanding,
        session: SESSION.to_vec(),
        max_hold: None,
    }))
}

/// For a token that nobody has.
fn heartbeat() -> Heard {
    let tokens = Tokens { queue: String::new(), lease_tokens: vec!["0".repeat(32)] };
    Ok(ConsumeCall::Heartbeat(tokens, None))
}

fn ack(token: Token) -> Heard {
    Ok(ConsumeCall::Ack(Tokens { queue: String::new(), lease_tokens: vec![token.text()] }))
}

/// Opens a stream on which the client says what it is told to.
fn begin(
    queues: &Queues,
    wire: &Wire,
    open: Heard,
) -> (mpsc::UnboundedSender<Heard>, JoinHandle<Result<(), Ended<()>>>) {
    let (say, talk) = mpsc::unbounded_channel();
    let talk = stream::unfold(talk, async |mut talk| Some((talk.recv().await?, talk)));
    say.send(open).unwrap();
    let (queues, wire) = (queues.clone(), wire.clone());
    (say, tokio::spawn(async move { queues.consume(Box::pin(talk), wire).await }))
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
    let (say, session) = begin(&queues, &wire, open());
    sleep(LEASE / 10).await;
    let tokens = handed_over(&mut received);
    say.send(ack(tokens[0])).unwrap();
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

#[tokio::test(start_paused = true)]
async fn a_full_stream_does_not_wait_and_hears_of_what_came_when_it_has_room() {
    let (queues, queue) = (queues(), QueueName::parse("q").unwrap());
    let (wire, mut received) = Wire::new(usize::MAX);
    let (say, _session) = begin(&queues, &wire, open_for(&["q"], 1));
    sleep(LEASE / 10).await;
    assert_eq!(queues.waits.waiting(&queue), 1);
    insert(&queues).await;
    sleep(LEASE / 10).await;
    let first = handed_over(&mut received);
    assert_eq!((first.len(), queues.waits.waiting(&queue)), (1, 0));
    let free = Seat::take(&queues.waits, &queue);
    insert(&queues).await;
    assert!(free.woken().now_or_never().is_some());
    drop(free);
    say.send(ack(first[0])).unwrap();
    sleep(LEASE / 10).await;
    let second = handed_over(&mut received);
    assert_eq!(second.len(), 1);
    say.send(ack(second[0])).unwrap();
    sleep(LEASE / 10).await;
    assert_eq!(queues.waits.waiting(&queue), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fills_with_the_last_of_a_backlog_wakes_nobody() {
    let (queues, queue) = (queues(), QueueName::parse("q").unwrap());
    insert(&queues).await;
    let idle = Seat::take(&queues.waits, &queue);
    let mut full = Seat::take(&queues.waits, &queue);
    full.step_aside();
    let (wire, mut received) = Wire::new(usize::MAX);
    let (_say, _session) = begin(&queues, &wire, open_for(&["q"], 1));
    sleep(LEASE / 10).await;
    assert_eq!(handed_over(&mut received).len(), 1);
    assert!(idle.woken().now_or_never().is_none());
    assert!(!full.come_back(), "nothing has come");
}

#[tokio::test(start_paused = true)]
async fn a_stream_woken_in_two_queues_that_fills_in_one_passes_the_other_wake_up_on() {
    let queues = queues();
    let names = ["a", "b"].map(|name| QueueName::parse(name).unwrap());
    let (wire, mut received) = Wire::new(usize::MAX);
    let (_say, _session) = begin(&queues, &wire, open_for(&["a", "b"], 1));
    sleep(LEASE / 10).await;
    let idle = names.each_ref().map(|queue| Seat::take(&queues.waits, queue));
    // Two tasks come at once, from another server.
    let elsewhere = server(Arc::clone(&queues.store));
    for queue in &names {
        insert_into(&elsewhere, queue.as_str()).await;
    }
    names.iter().for_each(|queue| queues.waits.wake(queue, 1));
    sleep(LEASE / 10).await;
    assert_eq!(handed_over(&mut received).len(), 1);
    assert_eq!(idle.map(|seat| seat.woken().now_or_never().is_some()), [false, true]);
}

#[tokio::test(start_paused = true)]
async fn what_was_heard_before_a_message_that_cannot_be_read_is_answered() {
    let (wire, mut received) = Wire::new(usize::MAX);
    let talk = stream::iter([open(), heartbeat(), Err(Unread::Refused(()))]);
    assert!(matches!(queues().consume(talk, wire).await, Err(Ended::Refused(()))));
    assert_eq!(received.try_recv().unwrap().answers[0].outcomes, [Outcome::LeaseLost]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_session_panics_ends_with_a_bug() {
    let (wire, _received) = Wire::new(usize::MAX);
    let panics = stream::repeat_with(|| if true { panic!("as asked") } else { heartbeat() });
    let ended = queues().consume(stream::iter([open()]).chain(panics), wire).await;
    assert!(matches!(ended, Err(Ended::Failed(Error::Bug(_)))));
}

#[tokio::test(start_paused = true)]
async fn the_leases_of_each_queue_are_kept_at_its_own_pace() {
    let queues = queues();
    let leases = [("short", 900), ("long", 30_000)].map(|(name, lease)| (QueueName::parse(name).unwrap(), lease));
    for (queue, lease) in &leases {
        queues.store.change(queue, &[(Setting::Lease, Some(*lease))]).await.unwrap();
        insert_into(&queues, queue.as_str()).await;
    }
    let (wire, mut received) = Wire::new(usize::MAX);
    let (_say, _session) = begin(&queues, &wire, open_for(&["short", "long"], 10));
    let (began, mut ends) = (Instant::now(), [Vec::new(), Vec::new()]);
    let clock = Paused(began);
    while began.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(50)).await;
        handed_over(&mut received);
        for ((queue, lease), ends) in leases.iter().zip(&mut ends) {
            let page = queues.store.list(queue, State::Leased, None, 2).await.unwrap().unwrap();
            let end = page.tasks[0].at.unwrap();
            assert!(end <= clock.now() + lease, "no longer than its queue says");
            assert_eq!(page.tasks[0].expiries, 0, "it is kept");
            if ends.last() != Some(&end) {
                ends.push(end);
            }
        }
    }
    // Each third of a lease: in a minute 200 times and 6 times, give or take the rounds that they share.
    let [short, long] = ends.map(|ends| ends.len());
    assert!((190..=202).contains(&short) && (5..=8).contains(&long), "{short} and {long} times");
}
