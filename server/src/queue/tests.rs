//! What becomes of calls whose store fails them, or whose caller leaves while the store works, where no real one can be made to do
//! so at a given moment.
#![allow(clippy::unwrap_used)]

use std::{collections::VecDeque, future::pending, pin::pin, sync::Mutex};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, poll, stream};
use tokio::task::yield_now;

use super::*;
use crate::store::{
    Consumer, Counts, Deleted, Description, Kept, OnWake, Place, Popped, Produce, Produced, ReapCursor, Reaped,
    Redriven, Seen, Setting, Settings, Sight, State, Store, TEST_RULES, TaskPage, memory::MemoryStore,
};

const QUEUE: &str = "q";

/// A store in memory that fails pops as it is told to, and whose administration takes a while.
struct Failing {
    memory: MemoryStore,
    failures: Mutex<VecDeque<StoreError>>,
}

/// The calls that the tests do not make.
macro_rules! failing {
    (
        Store { $($store:ident($($of_store:ty),*) -> $stored:ty;)* }
        Admin { $($admin:ident($($of_admin:ty),*) -> $found:ty;)* }
    ) => {
        #[async_trait]
        impl Store for Failing {
            async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
                self.memory.insert(queue, insert).await
            }

            async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError> {
                let failure = self.failures.lock().unwrap().pop_front();
                match failure {
                    Some(failure) => Err(failure),
                    None => self.memory.pop(queue, pop).await,
                }
            }

            async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError> {
                self.memory.release(queue, release).await
            }

            async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError> {
                self.memory.look(queues).await
            }

            $(async fn $store(&self, $(_: $of_store),*) -> Result<$stored, StoreError> {
                unreachable!()
            })*
        }

        #[async_trait]
        impl Admin for Failing {
            $(async fn $admin(&self, $(_: $of_admin),*) -> Result<$found, StoreError> {
                unreachable!()
            })*

            async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
                yield_now().await;
                self.memory.redrive(queue, ids).await
            }

            async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError> {
                yield_now().await;
                self.memory.drop_queue(queue, force).await
            }

            fn describe(&self) -> Description {
                unreachable!()
            }
        }
    };
}

failing! {
    Store {
        produce(&QueueName, Produce) -> Produced;
        ack(&QueueName, &[Token]) -> Vec<Outcome>;
        heartbeat(&QueueName, &[Token], Option<Millis>) -> Beaten;
        resume(&QueueName, Consumer, Millis, Millis) -> Vec<(Token, Millis)>;
        keep(&QueueName, Consumer, &[Token], Millis) -> Option<Kept>;
        abandon(&QueueName, Consumer, &[Token], Millis) -> ();
        withdraw(&QueueName, Withdrawal) -> u64;
        release_held(&QueueName, Millis) -> Released;
        reap(ReapCursor, usize) -> Reaped;
        listen(OnWake) -> ();
        check() -> ();
    }
    Admin {
        counts(&[QueueName]) -> Vec<Option<Counts>>;
        queues(Option<&QueueName>, usize) -> Vec<QueueName>;
        settings(&QueueName) -> Option<Settings>;
        change(&QueueName, &[(Setting, Option<u64>)]) -> Settings;
        list(&QueueName, State, Option<&Place>, usize) -> Option<TaskPage>;
        tasks(&QueueName, &[TaskId]) -> Vec<Option<Seen>>;
        delete(&QueueName, &[TaskId]) -> Vec<Deleted>;
        import(&QueueName, Vec<Insert>) -> Vec<Result<Inserted, StoreError>>;
        purge(&QueueName, State) -> u64;
    }
}

fn store() -> Arc<Failing> {
    let memory = MemoryStore::new(Arc::new(SystemClock::default()), TEST_RULES, 1 << 30);
    Arc::new(Failing { memory, failures: Mutex::default() })
}

/// One server of those on this store.
fn server(store: &Arc<Failing>) -> Queues {
    let limits = Limits {
        max_value: 1 << 20,
        default_lease: Duration::from_secs(30),
        max_stream_age: Duration::from_secs(1_800),
        grace: Duration::from_secs(10),
    };
    Queues::new(Arc::clone(store) as _, Arc::default(), limits, CancellationToken::new(), TaskTracker::new())
}

fn pop(wait: Duration, acks: Vec<String>) -> PopCall {
    PopCall {
        queue: QUEUE.to_owned(),
        lease: None,
        wait: Some(Span(Some(wait.as_nanos().cast_signed()))),
        request_id: String::new(),
        fingerprint: Fingerprint([0; 16]),
        acks,
        deadline: None,
    }
}

async fn insert(server: &Queues) {
    let task = NewTask { value: Some(Value::Json("1".to_owned())), ..NewTask::default() };
    let (queue, request_id) = (QUEUE.to_owned(), String::new());
    let insert = InsertCall { queue, tasks: vec![task], request_id, fingerprint: Fingerprint([0; 16]), durability: 0 };
    server.insert(insert).await.unwrap();
}

/// A pop, with an ack if asked to, that waits; is woken while another server inserts a task; and fails so in the store. What is
/// answered, and how long after it was woken.
async fn woken_for<const N: usize>(
    with_ack: bool,
    failures: [StoreError; N],
) -> (Result<(Option<Delivery>, Vec<Outcome>), Error>, Duration) {
    let store = store();
    let (here, elsewhere) = (server(&store), server(&store));
    insert(&elsewhere).await;
    let held = elsewhere.pop(pop(Duration::ZERO, Vec::new())).await.unwrap().0.unwrap();
    let acks = if with_ack { vec![held.tasks[0].token.text()] } else { Vec::new() };

    let mut waiting = pin!(here.pop(pop(Duration::from_secs(30), acks)));
    assert!(poll!(&mut waiting).is_pending());
    store.failures.lock().unwrap().extend(failures);
    insert(&elsewhere).await;
    let woken = Instant::now();
    here.waits.wake(&QueueName::parse(QUEUE).unwrap(), 1);
    let answer = tokio::select! {
        answer = waiting => answer,
        () = here.waits.run_looks(&*store) => unreachable!(),
    };
    (answer, woken.elapsed())
}

fn overloaded() -> StoreError {
    StoreError::Overloaded("too much to do".to_owned())
}

fn away() -> StoreError {
    StoreError::Unavailable { message: "gone".to_owned(), did_not_run: true }
}

/// Whether an error says that the store is away, and that nothing was done.
fn nothing_was_done(answer: Result<(Option<Delivery>, Vec<Outcome>), Error>) -> bool {
    match answer.map(|(_, acks)| acks) {
        Err(Error::Store(StoreError::Unavailable { did_not_run, .. })) => did_not_run,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiting_pop_outlives_an_overload_and_looks_again_after_100_ms() {
    let (answer, after) = woken_for(true, [overloaded(), overloaded()]).await;
    let (delivery, acks) = answer.unwrap();
    assert_eq!((delivery.map(|delivery| delivery.tasks.len()), acks), (Some(1), vec![Outcome::Applied]));
    assert!((2 * OVERLOADED_FOR..=3 * OVERLOADED_FOR).contains(&after), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_pop_that_loses_its_store_says_that_its_acks_may_have_been_applied() {
    assert!(!nothing_was_done(woken_for(true, [away()]).await.0));
    assert!(!nothing_was_done(woken_for(true, [overloaded(), away()]).await.0));
    assert!(nothing_was_done(woken_for(false, [overloaded(), away()]).await.0));
}

/// Makes a call and leaves it while the store works. Returns when all that goes on without it is done.
async fn leave<T>(server: &Queues, call: impl Future<Output = Result<T, Error>>) {
    let mut call = Box::pin(call);
    assert!(poll!(&mut call).is_pending());
    drop(call);
    server.background.close();
    server.background.wait().await;
}

#[tokio::test]
async fn a_queue_is_deleted_though_its_caller_leaves() {
    let store = store();
    let server = server(&store);
    insert(&server).await;
    leave(&server, server.delete_queue(QUEUE, true)).await;
    assert_eq!(store.memory.queues(None, 1).await.unwrap(), []);
}

#[tokio::test]
async fn a_redrive_whose_caller_leaves_wakes_those_who_wait() {
    let store = store();
    let server = server(&store);
    insert(&server).await;
    let held = server.pop(pop(Duration::ZERO, Vec::new())).await.unwrap().0.unwrap();
    held.unsent.handed_over();
    let lease_tokens = vec![held.tasks[0].token.text()];
    let rejected = PutBackCall { lease_tokens, dead_letter: true, ..PutBackCall::default() };
    assert_eq!(server.put_back(QUEUE, rejected).await.unwrap().0, [Outcome::Applied]);
    let seat = Seat::take(&server.waits, &QueueName::parse(QUEUE).unwrap());
    leave(&server, server.redrive(QUEUE, Redrive::Ids(vec![held.tasks[0].id.text()]))).await;
    assert!(seat.woken().now_or_never().is_some());
}

/// A client that only listens.
struct Listener;

impl Outlet for Listener {
    async fn clear(&self) -> bool {
        true
    }

    fn send(&mut self, _: ConsumeMessage) {}

    async fn gone(&self) {
        pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_was_woken_and_whose_pop_fails_has_another_waiter_look() {
    let store = store();
    let server = server(&store);
    let open = ConsumeOpen {
        queues: vec![(QUEUE.to_owned(), 1)],
        lease: Some(Span(Some(Duration::from_secs(1).as_nanos().cast_signed()))),
        max_outstanding: 1,
        session: Vec::new(),
        max_hold: None,
    };
    let calls = stream::iter([Ok::<_, Unread<()>>(ConsumeCall::Open(open))]).chain(stream::pending());
    let mut consumes = pin!(server.consume(calls, Listener));
    assert!(poll!(&mut consumes).is_pending());
    let queue = QueueName::parse(QUEUE).unwrap();
    let idle = Seat::take(&server.waits, &queue);
    assert_eq!(server.waits.waiting(&queue), 2);
    insert(&server).await;
    assert!(idle.woken().now_or_never().is_none(), "the stream waits longer");
    let failure = StoreError::Unavailable { message: "gone".to_owned(), did_not_run: true };
    store.failures.lock().unwrap().push_back(failure);
    assert!(matches!(consumes.await, Err(Ended::Failed(Error::Store(_)))));
    assert!(idle.woken().now_or_never().is_some());
}
