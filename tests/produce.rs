//! Inserts over a stream, on every store: in order, each once, whatever breaks on the way.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    iter,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use data_queue_proto::{
    reason,
    v1::{
        NewTask, PopBatchRequest, PopRequest, ProduceAnswer, ProduceInsert, ProduceOpen, ProduceRequest,
        ProduceResponse, Task, produce_request::Request as Given,
    },
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::support::{
    PATIENCE,
    call::{
        ack_request, counts, data, get_queue_request, json, pop, pop_batch, pop_batch_request, pop_request,
        pop_waiting, proto, text,
    },
    on_every_store, poll_until,
    proxy::Proxy,
    raw::Connection,
    redis::Redis,
    rounds,
    server::{Backend, Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

const PRODUCE: &str = "/dataqueue.v1.DataQueue/Produce";
/// So many tasks the server does not put into one step with others.
const ONE_STEP: usize = 200;

/// A producer's stream.
struct Producing {
    requests: Option<mpsc::UnboundedSender<ProduceRequest>>,
    answers: Streaming<ProduceResponse>,
    answered: VecDeque<ProduceAnswer>,
}

fn open(queue: &str, producer: &str) -> ProduceRequest {
    let open = ProduceOpen { queue: queue.to_owned(), producer_id: producer.to_owned(), ..ProduceOpen::default() };
    ProduceRequest { request: Some(Given::Open(open)) }
}

fn insert(number: u64, tasks: Vec<NewTask>) -> ProduceRequest {
    ProduceRequest { request: Some(Given::Insert(ProduceInsert { number, tasks })) }
}

/// One task, whose value is the number.
fn one(number: u64) -> ProduceRequest {
    insert(number, vec![json(&number.to_string())])
}

impl Producing {
    async fn with(client: &mut Client, requests: impl IntoIterator<Item = ProduceRequest>) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        requests.into_iter().for_each(|request| sender.send(request).expect("a stream"));
        let answers = client.produce(UnboundedReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests: Some(sender), answers, answered: VecDeque::new() })
    }

    async fn open(client: &mut Client, queue: &str, producer: &str) -> Self {
        Self::with(client, [open(queue, producer)]).await.expect("a stream")
    }

    /// What is sent on a stream that has ended is lost.
    fn send(&self, request: ProduceRequest) {
        let _ = self.requests.as_ref().expect("an open stream").send(request);
    }

    fn send_all(&self, numbers: RangeInclusive<u64>) {
        numbers.for_each(|number| self.send(one(number)));
    }

    fn half_close(&mut self) {
        self.requests = None;
    }

    /// Nothing at the end.
    async fn answer(&mut self) -> Result<Option<ProduceAnswer>, Status> {
        while self.answered.is_empty() {
            let message = timeout(PATIENCE, self.answers.message()).await.expect("an answer in time")?;
            let Some(message) = message else { return Ok(None) };
            assert!(!message.answers.is_empty(), "a message without an answer");
            self.answered.extend(message.answers);
        }
        Ok(self.answered.pop_front())
    }

    async fn answers(&mut self, numbers: RangeInclusive<u64>) -> Vec<ProduceAnswer> {
        let mut answers = Vec::new();
        for number in numbers {
            let answer = self.answer().await.expect("an answer").expect("no end");
            assert_eq!(answer.number, number);
            answers.push(answer);
        }
        answers
    }

    /// All that is left, and how it ended.
    async fn rest(&mut self) -> (Vec<ProduceAnswer>, Result<(), Status>) {
        let mut answers = Vec::new();
        loop {
            match self.answer().await {
                Ok(Some(answer)) => answers.push(answer),
                Ok(None) => return (answers, Ok(())),
                Err(status) => return (answers, Err(status)),
            }
        }
    }
}

fn ids(answers: &[ProduceAnswer]) -> Vec<String> {
    answers.iter().flat_map(|answer| &answer.results).map(|result| result.id.clone()).collect()
}

fn is_about(status: &Status, number: u64) -> bool {
    use tonic_types::StatusExt;
    let info = status.get_details_error_info().expect("an ErrorInfo");
    info.metadata.get("number") == Some(&number.to_string())
}

/// Takes all tasks that are there.
async fn drain(client: &mut Client, queue: &str) -> Vec<Task> {
    let mut all = Vec::new();
    loop {
        let request = PopBatchRequest { max_tasks: 1_000, ..pop_batch_request(queue) };
        let some = pop_batch(client, request).await.expect("a batch");
        if some.is_empty() {
            return all;
        }
        let tokens = some.iter().map(|task| task.lease_token.clone()).collect::<Vec<_>>();
        client.ack(ack_request(queue, &tokens)).await.expect("acks");
        all.extend(some);
    }
}

fn numbers(tasks: &[Task]) -> Vec<u64> {
    tasks.iter().map(|task| text(task).parse().expect("a number")).collect()
}

on_every_store! {
    /// G2, G11: a pipeline as deep as it may be is answered in order, and its tasks are in order; then the stream ends well.
    async fn a_pipeline_of_1024_is_answered_in_order(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=1_000);
        stream.send(insert(2_000, (1_001..=1_999).map(|value: u64| json(&value.to_string())).collect()));
        stream.send(one(u64::MAX));
        stream.half_close();
        let mut answers = stream.answers(1..=1_000).await;
        let (rest, end) = stream.rest().await;
        end.expect("a good end");
        assert_eq!(rest.iter().map(|answer| answer.number).collect::<Vec<_>>(), [2_000, u64::MAX]);
        answers.extend(rest);
        assert!(answers.iter().all(|answer| !answer.replayed));
        let tasks = drain(&mut client, &queue).await;
        assert_eq!(tasks.iter().map(|task| task.id.clone()).collect::<Vec<_>>(), ids(&answers));
        assert_eq!(numbers(&tasks), (1..=1_999).chain([u64::MAX]).collect::<Vec<_>>());
    }

    /// The headers come at once, and answers when there is something to answer; nobody lingers for more.
    async fn an_insert_is_answered_while_the_stream_is_idle(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut silent = Producing::with(&mut client, []).await.expect("headers before the first message");
        silent.send(open(&queue, "p"));
        for number in 1..=20 {
            silent.send(one(number));
            silent.answers(number..=number).await;
        }
    }

    /// G15: whoever waits gets what is produced.
    async fn a_waiting_pop_is_woken(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut waiting = JoinSet::new();
        for _ in 0..3 {
            let (mut client, queue) = (client.clone(), queue.clone());
            waiting.spawn(async move { text(&pop_waiting(&mut client, &queue).await).to_owned() });
        }
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=3);
        stream.answers(1..=3).await;
        let mut got = waiting.join_all().await;
        got.sort();
        assert_eq!(got, ["1", "2", "3"]);
    }

    /// G15: the inserts of a producer that does not read its answers reach those who wait, and not only when somebody looks, which is
    /// after 0.7 s or more.
    async fn a_producer_that_does_not_read_wakes_a_waiting_pop(backend) {
        const BEFORE_ANY_LOOK: Duration = Duration::from_millis(500);
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        // On a machine that stands still the wait may be over before the insert is there: then once more.
        poll_until("a pop to be woken", PATIENCE, async || {
            let queue = unique_queue("produce");
            let open = open(&queue, "p");
            let again = [1, 2].map(|number| insert(number, vec![json("1"); ONE_STEP]));
            let messages = iter::once(&open).chain(&again).cloned();
            let mut known = Producing::with(&mut client, messages).await.expect("a stream");
            known.answers(1..=2).await;
            assert_eq!(drain(&mut client, &queue).await.len(), 2 * ONE_STEP);

            let connection = Connection::with_window(server.address(), 1).await;
            let mut unread = connection.open_stream(PRODUCE, &open).await;
            let mut popper = client.clone();
            let wait = Some(proto(BEFORE_ANY_LOOK));
            let waiting = popper.pop(PopRequest { wait, ..pop_request(&queue) });
            let producing = async {
                // In the line behind the other: when this one is answered, that one waits.
                assert_eq!(pop(&mut client.clone(), &queue).await, None);
                // The answers to the first two, which bring nothing new, take the window up and wait for more of it, while the third is
                // under way.
                let [first, second] = again;
                unread.say(&[first, second, one(3)]);
            };
            let (woken, ()) = tokio::join!(waiting, producing);
            let task = woken.expect("an answer").into_inner().task?;
            assert_eq!(text(&task), "3");
            Some(())
        })
        .await;
    }

    /// G3: what was not answered when a stream broke is sent again on another, and everything is there once.
    async fn a_broken_stream_is_taken_up_again(backend) {
        const TASKS: u64 = 5_000;
        let server = backend.start(&[]).await;
        let queue = unique_queue("produce");
        let (mut done, mut known): (BTreeMap<u64, Vec<String>>, usize) = Default::default();
        let mut cuts = 0;
        while (done.len() as u64) < TASKS {
            // On a connection of its own, which is cut while much is under way.
            let mut client = server.client().await;
            let mut stream = Producing::open(&mut client, &queue, "p").await;
            let first = done.len() as u64 + 1;
            let last = (first + 1_023).min(TASKS);
            stream.send_all(first..=last);
            for number in first..=first + (last - first) / 2 {
                let answer = stream.answers(number..=number).await.remove(0);
                known += usize::from(answer.replayed);
                done.insert(number, ids(&[answer]));
            }
            cuts += 1;
        }
        println!("{cuts} cuts, {known} of {TASKS} were known");
        assert!(known > 0, "nothing was ever done and not answered");
        let mut client = server.client().await;
        let tasks = drain(&mut client, &queue).await;
        assert_eq!(numbers(&tasks), (1..=TASKS).collect::<Vec<_>>());
        assert_eq!(tasks.into_iter().map(|task| task.id).collect::<Vec<_>>(), done.into_values().flatten().collect::<Vec<_>>());
    }

    /// An insert that is refused is named; those before it were done, and nothing behind it.
    async fn a_refused_insert_ends_the_stream(backend) {
        let server = backend.start(&["--max-value", "1000"]).await;
        let mut client = server.client().await;
        for (case, tasks, reason, field) in [
            ("no task", vec![], reason::BATCH_EMPTY, "insert.tasks"),
            ("1,001 tasks", vec![json("1"); 1_001], reason::BATCH_TOO_LARGE, "insert.tasks"),
            ("no value", vec![json("1"), NewTask::default()], reason::VALUE_MISSING, "insert.tasks[1].value"),
            ("a large value", vec![data(vec![0; 1_001])], reason::VALUE_TOO_LARGE, "insert.tasks[0].data"),
            ("no JSON", vec![json("{")], reason::JSON_INVALID, "insert.tasks[0].json"),
            ("a header without a key", vec![NewTask { headers: [(String::new(), String::new())].into(), ..json("1") }], reason::HEADERS_INVALID, "insert.tasks[0].headers"),
        ] {
            let queue = unique_queue("produce");
            let mut stream = Producing::open(&mut client, &queue, "p").await;
            stream.send_all(1..=2);
            stream.send(insert(3, tasks));
            stream.send_all(4..=5);
            stream.answers(1..=2).await;
            let status = Refusal::invalid(reason, field).check(case, stream.answer().await);
            assert!(is_about(&status, 3), "{case}: {status:?}");
            // The number is as good as new.
            let mut stream = Producing::open(&mut client, &queue, "p").await;
            stream.send_all(1..=3);
            let answers = stream.answers(1..=3).await;
            assert_eq!(answers.iter().map(|answer| answer.replayed).collect::<Vec<_>>(), [true, true, false], "{case}");
            assert_eq!(numbers(&drain(&mut client, &queue).await), [1, 2, 3], "{case}");
        }
    }

    /// G3: a number with other content is refused, and one that is too old to be known.
    async fn a_number_that_cannot_be_answered_again_is_refused(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=1_030);
        stream.answers(1..=1_030).await;
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send(one(1_000));
        stream.send(insert(1_001, vec![json("\"other\"")]));
        stream.send(one(1_031));
        assert!(stream.answers(1_000..=1_000).await[0].replayed);
        let refusal = Refusal { field: Some("number"), ..Refusal::of(Code::AlreadyExists, reason::REQUEST_ID_REUSED) };
        let status = refusal.check("other content", stream.answer().await);
        assert!(is_about(&status, 1_001), "{status:?}");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send(one(6));
        let status = Refusal::invalid(reason::PRODUCE_INVALID, "number").check("too old", stream.answer().await);
        assert!(is_about(&status, 6), "{status:?}");
        assert_eq!(counts(&mut client, &queue).await.inserted, 1_030);
    }

    /// Messages that are out of place, and names and numbers that are not right.
    async fn messages_out_of_place_are_refused(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let (queue, long) = (unique_queue("produce"), "p".repeat(129));
        let nothing = || ProduceRequest { request: None };
        for (case, requests, field) in [
            ("an insert first", vec![one(1)], "open"),
            ("nothing first", vec![nothing()], "open"),
            ("no id", vec![open(&queue, "")], "open.producer_id"),
            ("a long id", vec![open(&queue, &long)], "open.producer_id"),
            ("two opens", vec![open(&queue, "p"), open(&queue, "p")], "open"),
            ("nothing then", vec![open(&queue, "p"), nothing()], "request"),
            ("number 0", vec![open(&queue, "p"), one(0)], "number"),
            ("a number twice", vec![open(&queue, "a"), one(1), one(1)], "number"),
            ("a smaller number", vec![open(&queue, "b"), one(2), one(1)], "number"),
        ] {
            let mut stream = Producing::with(&mut client, requests).await.expect("headers");
            let (answers, end) = stream.rest().await;
            assert!(answers.len() <= 1, "{case}: {answers:?}");
            Refusal::invalid(reason::PRODUCE_INVALID, field).check(case, end);
        }
        let mut stream = Producing::with(&mut client, [open("a b", "p")]).await.expect("headers");
        Refusal::invalid(reason::QUEUE_NAME_INVALID, "open.queue").check("no name", stream.rest().await.1);
        let mut stream = Producing::with(&mut client, []).await.expect("headers");
        stream.half_close();
        Refusal::invalid(reason::PRODUCE_INVALID, "open").check("no message", stream.rest().await.1);
        assert_eq!(numbers(&drain(&mut client, &queue).await), [1, 2]);
        // The longest that is right, and a stream without an insert.
        let mut stream = Producing::open(&mut client, &queue, &long[1..]).await;
        stream.half_close();
        let (answers, end) = stream.rest().await;
        assert_eq!(answers, []);
        end.expect("a good end");
    }

    /// A message that is too long is refused as it is elsewhere, and those before it are answered.
    async fn a_message_that_is_too_long_is_refused(backend) {
        let server = backend.start(&["--max-message", "300000", "--max-value", "100000"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=3);
        stream.send(insert(4, vec![data(vec![0; 100_000]); 3]));
        stream.send(one(5));
        stream.answers(1..=3).await;
        let status = Refusal::of(Code::ResourceExhausted, reason::MESSAGE_TOO_LARGE).check("too long", stream.answer().await);
        assert!(status.has_metadata("300000"), "{status:?}");
        assert_eq!(numbers(&drain(&mut client, &queue).await), [1, 2, 3]);
    }

    /// G13: a full store refuses, with the number and when to try again; what was answered is in, and nothing else is.
    async fn a_full_store_refuses(backend) {
        let flags: &[&str] = match backend {
            Backend::Memory => &["--memory-capacity", "1000000"],
            Backend::Redis => &[],
            // More than there is.
            Backend::Sqlite => &["--disk-reserve", "1000000000000000"],
        };
        let server = backend.start(flags).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        if backend == Backend::Redis {
            server.redis().config_set("maxmemory", "1mb");
        }
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        for number in 1..=100 {
            stream.send(insert(number, vec![data(vec![0; 64 << 10])]));
        }
        let (answers, end) = stream.rest().await;
        let status = Refusal::of(Code::ResourceExhausted, reason::STORE_FULL).check("a full store", end);
        assert!(status.retry_delay().is_some() && is_about(&status, answers.len() as u64 + 1), "{status:?}");
        assert_eq!(drain(&mut client, &queue).await.len(), answers.len());
    }

    /// G16: a server that stops answers what it has taken, ends the streams, and ends in time with code 0.
    async fn sigterm_ends_streams(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut idle = Producing::open(&mut client, &queue, "idle").await;
        idle.send(one(1));
        idle.answers(1..=1).await;
        let mut unopened = Producing::with(&mut client, []).await.expect("headers");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=1_000);
        stream.answers(1..=10).await;
        server.terminate();
        let (answers, end) = stream.rest().await;
        let shutting_down = Refusal::of(Code::Unavailable, reason::SHUTTING_DOWN);
        // It may be that all were read before.
        let status = shutting_down.check("a busy stream", end);
        assert!(status.retry_delay().is_some(), "{status:?}");
        shutting_down.check("an idle stream", idle.rest().await.1);
        shutting_down.check("a stream that was not opened", unopened.rest().await.1);
        let status = server.wait_exit(PATIENCE);
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(!server.log().contains("did not end within"), "{}", server.log());
        if backend == Backend::Memory {
            return;
        }
        server.restart().await;
        let mut client = server.client().await;
        assert_eq!(counts(&mut client, &queue).await.inserted, 1 + 10 + answers.len() as u64);
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=1_000);
        let again = stream.answers(1..=1_000).await;
        assert_eq!(again.iter().filter(|answer| answer.replayed).count(), 10 + answers.len());
    }
}

const PRODUCERS: u64 = 3;

/// What a producer does until it is told that it is enough: it keeps many inserts under way, and sends again on a new
/// stream what was not answered. Gives what it was answered.
async fn keep_producing(
    server: Arc<Server>,
    queue: String,
    producer: u64,
    enough: Arc<AtomicBool>,
    mut up: watch::Receiver<bool>,
) -> HashMap<u64, String> {
    let value = |number: u64| vec![json(&(producer * 1_000_000 + number).to_string())];
    let (mut done, mut next): (HashMap<u64, String>, u64) = (HashMap::new(), 1);
    'streams: while !enough.load(Ordering::Relaxed) || (done.len() as u64) < next - 1 {
        up.wait_for(|up| *up).await.expect("the test");
        let Ok(mut client) = Client::try_connect(server.address()).await else { continue };
        let first = done.len() as u64 + 1;
        let Ok(mut stream) = Producing::with(&mut client, [open(&queue, &format!("p{producer}"))]).await else {
            continue;
        };
        (first..next).for_each(|number| stream.send(insert(number, value(number))));
        loop {
            while !enough.load(Ordering::Relaxed) && next - (done.len() as u64) <= 500 {
                stream.send(insert(next, value(next)));
                next += 1;
            }
            if done.len() as u64 == next - 1 {
                return done;
            }
            match stream.answer().await {
                Ok(Some(answer)) => {
                    assert_eq!(answer.number, done.len() as u64 + 1);
                    done.insert(answer.number, answer.results[0].id.clone());
                }
                Ok(None) => panic!("an end that nobody asked for"),
                Err(status) => {
                    assert!(
                        matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal),
                        "{status:?}"
                    );
                    continue 'streams;
                }
            }
        }
    }
    done
}

/// Kills the server again and again while producers send. Every answered insert is there once, and no other twice.
async fn kills(server: Server, kills: u64) {
    let (server, queue, enough) = (Arc::new(server), unique_queue("produce"), Arc::new(AtomicBool::new(false)));
    let up = watch::Sender::new(true);
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let work = keep_producing(Arc::clone(&server), queue.clone(), producer, Arc::clone(&enough), up.subscribe());
        producers.spawn(async move { (producer, work.await) });
    }
    let mut seen = 0;
    for _ in 0..kills {
        let mut client = server.client().await;
        let goal = seen + 1_000;
        seen = poll_until("inserts", PATIENCE, async || {
            let answer = client.admin.get_queue(get_queue_request(&queue)).await.ok()?;
            let inserted = answer.into_inner().queue?.counts?.inserted;
            (inserted > goal).then_some(inserted)
        })
        .await;
        up.send_replace(false);
        server.kill();
        server.restart().await;
        up.send_replace(true);
    }
    enough.store(true, Ordering::Relaxed);
    let mut client = server.client().await;
    let done: HashMap<u64, HashMap<u64, String>> = producers.join_all().await.into_iter().collect();
    let tasks = drain(&mut client, &queue).await;
    let sent: usize = done.values().map(HashMap::len).sum();
    println!("{sent} inserts, {kills} kills");
    assert_eq!(tasks.len(), sent, "as many tasks as answers");
    for (producer, done) in &done {
        let own = tasks.iter().filter(|task| numbers(std::slice::from_ref(task))[0] / 1_000_000 == *producer);
        for (at, task) in own.enumerate() {
            let number = at as u64 + 1;
            assert_eq!(
                numbers(std::slice::from_ref(task))[0],
                producer * 1_000_000 + number,
                "out of order, lost or doubled"
            );
            assert_eq!(task.id, done[&number], "another id than was answered");
        }
    }
}

wire_tests! {
    /// G1, G3: whenever the server is killed, nothing that was answered is lost and nothing is doubled.
    async fn a_killed_server_on_its_file_loses_and_doubles_nothing() {
        kills(Backend::Sqlite.start(&[]).await, rounds(6, 60)).await;
    }

    /// G1, G3: the same with Redis.
    async fn a_killed_server_on_redis_loses_and_doubles_nothing() {
        kills(Backend::Redis.start(&[]).await, rounds(6, 60)).await;
    }

    /// G3: a producer may go on with any server.
    async fn another_server_knows_the_producer() {
        let redis = Arc::new(Redis::start());
        let servers = [Server::on(Arc::clone(&redis), &[]), Server::on(redis, &[])];
        let queue = unique_queue("produce");
        for round in 0..4_u64 {
            let server = &servers[(round % 2) as usize];
            server.ready().await;
            let mut client = server.client().await;
            let mut stream = Producing::open(&mut client, &queue, "p").await;
            stream.send_all(1..=10 * (round + 1));
            let answers = stream.answers(1..=10 * (round + 1)).await;
            assert_eq!(answers.iter().filter(|answer| answer.replayed).count() as u64, 10 * round);
        }
        let mut client = servers[0].client().await;
        assert_eq!(numbers(&drain(&mut client, &queue).await), (1..=40).collect::<Vec<_>>());
    }

    /// G3, G9: Redis did it, and its answer was lost on the way: the stream ends, and the same number is answered again.
    async fn a_lost_answer_of_redis_does_not_double() {
        let redis = Redis::start();
        let proxy = Proxy::start(&redis).await;
        let server = Server::launch(&proxy.url(), &["--store-timeout", "500ms"], None);
        server.ready().await;
        let mut client = server.client().await;
        let queue = unique_queue("produce");
        let mut stream = Producing::open(&mut client, &queue, "p").await;
        stream.send_all(1..=100);
        stream.answers(1..=100).await;
        proxy.hold_replies();
        stream.send_all(101..=150);
        let status = Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check("no answer", stream.rest().await.1);
        assert!(is_about(&status, 101), "{status:?}");
        proxy.let_go();
        server.ready().await;
        let answers = poll_until("an answer", PATIENCE, async || {
            let mut stream = Producing::open(&mut client, &queue, "p").await;
            stream.send_all(101..=200);
            stream.half_close();
            let (answers, end) = stream.rest().await;
            end.ok().map(|()| answers)
        })
        .await;
        assert_eq!(answers.len(), 100);
        assert_eq!(numbers(&drain(&mut client, &queue).await), (1..=200).collect::<Vec<_>>());
    }
}
