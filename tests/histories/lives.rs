//! Whole lives under kills: tasks with delays, priorities, ends and unique keys; workers that fail, put off and reject; an operator
//! who deletes, pauses, redrives and purges. All that is sent and answered goes into the [`Books`].

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_proto::v1::{
    DeleteTasksRequest, GetQueueResponse, HeartbeatRequest, InsertRequest, ListTasksRequest, NewTask, Outcome,
    PauseQueueRequest, PopBatchRequest, PopRequest, PurgeQueueRequest, PutbackRequest, PutbackTokens, QueueCounts,
    QueueSettings, RedriveIds, RedriveTasksRequest, ResumeQueueRequest, RetryBackoff, Task, TaskInfo, TaskState,
    UpdateQueueRequest, putback_request, redrive_tasks_request,
};
use prost_types::{FieldMask, Timestamp};
use tokio::{
    task::{JoinSet, LocalSet},
    time::{sleep, timeout},
};
use tonic::{Response, Status};

use super::{
    books::{Books, Ended, Given, Inserted, Span, Way},
    load::{CALL_LIMIT, RETRY, excuse},
    random::Random,
};
use crate::support::{
    PATIENCE,
    call::{
        ack_request, add_up, duration, get_queue_request, heartbeat_request, insert_request, json, outcomes,
        pop_batch_request, pop_request, proto,
    },
    embedded::Embedded,
    poll_until,
    redis::{Options, Persistence},
    rounds,
    server::{Client, Server},
    unique_queue, wire_tests,
};

/// Short, so that what a kill swallowed comes back soon.
const LEASE: Duration = Duration::from_millis(700);
const HOUR: Duration = Duration::from_secs(3_600);
const WAIT: Duration = Duration::from_millis(100);
const BACKOFF: [Duration; 2] = [Duration::from_millis(40), Duration::from_millis(100)];
const MAX_FAILURES: u32 = 3;
const MAX_EXPIRIES: u32 = 3;
const PRODUCERS: usize = 3;
const WORKERS: usize = 8;
const TASKS_A_KILL: usize = 300;
/// Keys are few, so that they meet.
const KEYS: u64 = 30;
const FAULTS_TOLD: usize = 20;

struct Lives {
    queue: String,
    began: Instant,
    tasks: usize,
    next: AtomicUsize,
    producing: AtomicUsize,
    /// The operator is to stop, workers are to ack all that comes; then they are to stop.
    ending: AtomicBool,
    ended: AtomicBool,
    books: Mutex<Books>,
}

impl Lives {
    /// Sends a call until it is answered.
    async fn answered<T>(&self, call: impl AsyncFn() -> Result<Response<T>, Status>) -> (T, Span) {
        let (sent, mut at_once) = (self.began.elapsed(), true);
        loop {
            match timeout(CALL_LIMIT, call()).await {
                Ok(Ok(answer)) => {
                    return (answer.into_inner(), Span { sent, answered: self.began.elapsed(), at_once });
                }
                Ok(Err(status)) => excuse(&status, false),
                Err(_) => {}
            }
            at_once = false;
            sleep(RETRY).await;
        }
    }

    fn note(&self, note: impl FnOnce(&mut Books)) {
        note(&mut self.books.lock().unwrap());
    }

    async fn produce(self: Arc<Self>, client: Client, mut random: Random) {
        loop {
            let many = 1 + usize::try_from(random.below(10)).unwrap();
            let first = self.next.fetch_add(many, Ordering::SeqCst);
            if first >= self.tasks {
                break;
            }
            let tasks = (first..first + many).map(|number| task(number, &mut random)).collect();
            let request_id = format!("insert-{first}");
            let request = InsertRequest { request_id, ..insert_request(&self.queue, tasks) };
            let (answer, span) = self.answered(async || client.clone().insert(request.clone()).await).await;
            assert_eq!(answer.results.len(), request.tasks.len());
            let inserted = request.tasks.into_iter().zip(answer.results).map(|(task, result)| Inserted {
                id: result.id,
                duplicate: result.duplicate,
                delay: task.delay.map(|delay| duration(Some(delay))).unwrap_or_default(),
                ttl: task.ttl.map(|ttl| duration(Some(ttl))),
                unique_key: task.unique_key,
                span,
            });
            self.note(|books| books.inserts.extend(inserted));
            sleep(random.up_to(RETRY)).await;
        }
        self.producing.fetch_sub(1, Ordering::SeqCst);
    }

    async fn work(self: Arc<Self>, client: Client, mut random: Random) {
        while !self.ended.load(Ordering::SeqCst) {
            for (task, span) in self.pop(client.clone(), &mut random).await {
                self.received(&task, LEASE, span);
                self.treat(&client, &task, &mut random).await;
            }
        }
    }

    /// Sent once: what it leased without an answer runs out.
    async fn pop(&self, mut client: Client, random: &mut Random) -> Vec<(Task, Span)> {
        let (lease, wait, sent) = (Some(proto(LEASE)), Some(proto(WAIT)), self.began.elapsed());
        let mut tasks = Vec::new();
        let mut received = |all: Vec<Task>| {
            let span = Span { sent, answered: self.began.elapsed(), at_once: true };
            tasks.extend(all.into_iter().map(|task| (task, span)));
        };
        let done = if random.chance(500) {
            let request = PopRequest { lease, wait, ..pop_request(&self.queue) };
            client.pop(request).await.map(|answer| received(answer.into_inner().task.into_iter().collect()))
        } else {
            let max_tasks = 1 + u32::try_from(random.below(8)).unwrap();
            let request = PopBatchRequest { max_tasks, lease, wait, ..pop_batch_request(&self.queue) };
            async {
                let mut stream = client.pop_batch(request).await?.into_inner();
                while let Some(message) = stream.message().await? {
                    received(message.tasks);
                }
                Ok(())
            }
            .await
        };
        if let Err(status) = done {
            excuse(&status, false);
            sleep(RETRY).await;
        }
        tasks
    }

    fn received(&self, task: &Task, lease: Duration, span: Span) {
        let given = Given {
            id: task.id.clone(),
            deliveries: task.deliveries,
            failures: task.failures,
            expiries: task.expiries,
            inserted_at: time(task.inserted_at),
            at: time(task.lease_expires_at) - lease,
            span,
        };
        self.note(|books| books.given.push(given));
    }

    /// Does with a task whatever a worker may do.
    async fn treat(&self, client: &Client, task: &Task, random: &mut Random) {
        let all = if self.ending.load(Ordering::SeqCst) { 1_000 } else { random.below(1_000) };
        let delay = random.chance(500).then(|| millis(random, 1, 300));
        let (way, delay) = match all {
            0..120 => return,
            120..320 => (Way::Fail, delay),
            320..400 => (Way::Reject, None),
            400..560 => (Way::PutBack, delay),
            _ => (Way::Ack, None),
        };
        let lease_tokens = vec![task.lease_token.clone()];
        if way == Way::Ack {
            let request = ack_request(&self.queue, &lease_tokens);
            let (answer, span) = self.answered(async || client.clone().ack(request.clone()).await).await;
            return self.over(task, way, Duration::ZERO, outcomes(&answer.outcomes)[0], span);
        }
        // What is put off is put off from a time that the store has told.
        let request = HeartbeatRequest { lease: Some(proto(LEASE)), ..heartbeat_request(&self.queue, &lease_tokens) };
        let (answer, _) = self.answered(async || client.clone().heartbeat(request.clone()).await).await;
        let Some(until) = answer.lease_expires_at else { return };
        let wait = delay.unwrap_or_else(|| match way {
            Way::Fail => (BACKOFF[0] * 2u32.pow(task.failures)).min(BACKOFF[1]),
            _ => Duration::ZERO,
        });
        self.end(client, task, way, delay, time(Some(until)) - LEASE + wait).await;
    }

    /// Puts a task back; if it is to come again, then not before this time.
    async fn end(&self, client: &Client, task: &Task, way: Way, delay: Option<Duration>, not_before: Duration) {
        let tokens = PutbackTokens {
            lease_tokens: vec![task.lease_token.clone()],
            delay: delay.map(proto),
            reason: format!("{way:?} {}", task.deliveries),
            failed: way == Way::Fail,
            dead_letter: way == Way::Reject,
        };
        let selection = Some(putback_request::Selection::Tokens(tokens));
        let request = PutbackRequest { queue: self.queue.clone(), selection };
        let (answer, span) = self.answered(async || client.clone().putback(request.clone()).await).await;
        let not_before = if answer.put_back == 1 { not_before } else { Duration::ZERO };
        self.over(task, way, not_before, outcomes(&answer.outcomes)[0], span);
    }

    fn over(&self, task: &Task, way: Way, not_before: Duration, outcome: Outcome, span: Span) {
        let applied = outcome != Outcome::LeaseLost;
        let ended = Ended { id: task.id.clone(), deliveries: task.deliveries, way, not_before, applied, span };
        self.note(|books| books.ended.push(ended));
    }

    async fn operate(self: Arc<Self>, client: Client, mut random: Random) {
        let queue = || self.queue.clone();
        while !self.ending.load(Ordering::SeqCst) {
            match random.below(16) {
                0..6 => self.delete(&client, &mut random).await,
                6..10 => {
                    let admin = || client.admin.clone();
                    let pause = PauseQueueRequest { queue: queue() };
                    let (_, paused) = self.answered(async || admin().pause_queue(pause.clone()).await).await;
                    sleep(millis(&mut random, 0, 60)).await;
                    let resume = ResumeQueueRequest { queue: queue() };
                    let (_, resumed) = self.answered(async || admin().resume_queue(resume.clone()).await).await;
                    self.note(|books| books.pauses.push((paused.answered, resumed.sent)));
                }
                10..15 => self.redrive(&client, &mut random).await,
                _ => {
                    // What is ready or held is most of what there is: seldom.
                    let state = match random.below(12) {
                        0 => TaskState::Ready,
                        1 => TaskState::Leased,
                        2..6 => TaskState::Scheduled,
                        _ => TaskState::Dead,
                    };
                    let request = PurgeQueueRequest { queue: queue(), states: vec![state as i32] };
                    let (answer, span) =
                        self.answered(async || client.admin.clone().purge_queue(request.clone()).await).await;
                    self.note(|books| books.purges.push((answer.purged, span)));
                }
            }
            sleep(millis(&mut random, 0, 60)).await;
        }
    }

    /// Some of the tasks that were inserted last.
    async fn delete(&self, client: &Client, random: &mut Random) {
        let mut ids = Vec::new();
        self.note(|books| {
            let known = &books.inserts[books.inserts.len().saturating_sub(200)..];
            for _ in 0..3.min(known.len()) {
                ids.push(known[usize::try_from(random.below(known.len() as u64)).unwrap()].id.clone());
            }
        });
        ids.sort_unstable();
        ids.dedup();
        if ids.is_empty() {
            return;
        }
        let request = DeleteTasksRequest { queue: self.queue.clone(), ids: ids.clone() };
        let (answer, span) = self.answered(async || client.admin.clone().delete_tasks(request.clone()).await).await;
        self.note(|books| books.deletes.extend(ids.into_iter().zip(answer.outcomes()).map(|(id, it)| (id, it, span))));
    }

    async fn redrive(&self, client: &Client, random: &mut Random) {
        let selection = if random.chance(500) {
            redrive_tasks_request::Selection::MaxTasks(1 + random.below(20))
        } else {
            let ids = self.listed(client, TaskState::Dead).await.iter().take(5).map(id).collect::<Vec<_>>();
            if ids.is_empty() {
                return;
            }
            redrive_tasks_request::Selection::Ids(RedriveIds { ids })
        };
        let request = RedriveTasksRequest { queue: self.queue.clone(), selection: Some(selection) };
        let (_, span) = self.answered(async || client.admin.clone().redrive_tasks(request.clone()).await).await;
        self.note(|books| books.redrives.push(span));
    }

    /// All tasks in a state, page by page.
    async fn listed(&self, client: &Client, state: TaskState) -> Vec<TaskInfo> {
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request =
                ListTasksRequest { queue: self.queue.clone(), state: state as i32, page_size: 50, page_token };
            let (page, _) = self.answered(async || client.admin.clone().list_tasks(request.clone()).await).await;
            all.extend(page.tasks);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return all;
            }
        }
    }

    /// G14: they add up at any time.
    async fn counts(&self, client: &Client) -> QueueCounts {
        let request = get_queue_request(&self.queue);
        let ask = async || client.admin.clone().get_queue(request.clone()).await;
        let (GetQueueResponse { queue }, _) = self.answered(ask).await;
        let counts = queue.expect("a queue").counts.expect("counts");
        add_up(&counts);
        counts
    }

    /// Waits for a moment somewhere in one of so many parts of the run.
    async fn moment(&self, random: &mut Random, part: u64, parts: u64) {
        let per_mille = part * 950 / parts + random.below(950 / parts);
        let wanted = self.tasks * usize::try_from(per_mille).unwrap() / 1_000;
        let reached = async || (self.next.load(Ordering::SeqCst) >= wanted).then_some(());
        poll_until("the load to go on", PATIENCE, reached).await;
        sleep(random.up_to(RETRY)).await;
    }

    /// Until nothing is left but dead letters and what will be due much later.
    async fn worked_off(&self, client: &Client) {
        let producing = async || (self.producing.load(Ordering::SeqCst) == 0).then_some(());
        poll_until("the producers", PATIENCE, producing).await;
        self.ending.store(true, Ordering::SeqCst);
        let settled = |info: &TaskInfo| {
            info.due_at.is_some_and(|due| {
                let task = info.task.as_ref().expect("a task");
                info.expires_at.is_none() && time(Some(due)) >= time(task.inserted_at) + HOUR
            })
        };
        poll_until("the rest to be worked off", PATIENCE, async || {
            let counts = self.counts(client).await;
            let moves = counts.ready + counts.leased > 0
                || !self.listed(client, TaskState::Scheduled).await.iter().all(settled);
            (!moves).then_some(())
        })
        .await;
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Something in every state, so that the last look has something to see.
    async fn leave_some(&self, client: &Client) {
        let delay = |number: u32| (number % 10 == 9).then_some(HOUR);
        let task = |number: u32| NewTask { priority: number % 4, delay: delay(number).map(proto), ..json("1") };
        let tasks = (0..33).map(task).collect();
        let request = InsertRequest { request_id: "last".to_owned(), ..insert_request(&self.queue, tasks) };
        let (answer, span) = self.answered(async || client.clone().insert(request.clone()).await).await;
        let inserted = (0..).zip(answer.results).map(|(number, it)| {
            let delay = delay(number).unwrap_or_default();
            Inserted { id: it.id, delay, span, ..Inserted::default() }
        });
        self.note(|books| books.inserts.extend(inserted));
        let mut rejected = 2;
        for _ in 0..9 {
            let request = PopRequest { lease: Some(proto(HOUR)), ..pop_request(&self.queue) };
            let (answer, span) = self.answered(async || client.clone().pop(request.clone()).await).await;
            let task = answer.task.expect("a task");
            self.received(&task, HOUR, span);
            if rejected > 0 {
                rejected -= 1;
                self.end(client, &task, Way::Reject, None, Duration::ZERO).await;
            }
        }
    }

    async fn look(&self, client: &Client) {
        let mut left = Vec::new();
        for state in [TaskState::Ready, TaskState::Scheduled, TaskState::Leased, TaskState::Dead] {
            left.extend(self.listed(client, state).await);
        }
        let counts = self.counts(client).await;
        self.note(|books| (books.left, books.counts) = (left, counts));
    }

    fn judge(&self) {
        let books = self.books.lock().unwrap();
        let faults = books.faults();
        let number = |way: Way| books.ended.iter().filter(|ended| ended.way == way && ended.applied).count();
        let duplicates = books.inserts.iter().filter(|task| task.duplicate).count();
        println!(
            "{} deliveries, {} acks, {} putbacks, {} failures, {} rejections, {duplicates} duplicates, {} deletions, {} purges, \
             {} redrives, {} pauses, {:?}: {:?}",
            books.given.len(),
            number(Way::Ack),
            number(Way::PutBack),
            number(Way::Fail),
            number(Way::Reject),
            books.deletes.len(),
            books.purges.len(),
            books.redrives.len(),
            books.pauses.len(),
            self.began.elapsed(),
            books.counts,
        );
        // A run in which nothing of it happened proves nothing.
        let QueueCounts { scheduled, dead, acked, expired, deleted, .. } = books.counts;
        for (what, count) in
            [("scheduled", scheduled), ("dead", dead), ("acked", acked), ("expired", expired), ("deleted", deleted)]
        {
            assert!(count > 0, "nothing is {what}");
        }
        assert!(duplicates > 0, "no key met itself");
        for (rule, about) in faults.iter().take(FAULTS_TOLD) {
            println!("{rule}: {about}\n{}", books.about(about));
        }
        assert!(faults.is_empty(), "{} faults", faults.len());
    }
}

/// With this number as its value, and a plan at random.
fn task(number: usize, random: &mut Random) -> NewTask {
    let mut task = json(&number.to_string());
    if random.chance(300) {
        task.priority = u32::try_from(random.below(10)).unwrap();
    }
    if random.chance(200) {
        task.delay = Some(proto(millis(random, 1, 400)));
    } else if random.chance(50) {
        task.delay = Some(proto(HOUR));
    }
    if random.chance(150) {
        task.ttl = Some(proto(millis(random, 20, 800)));
    }
    if random.chance(200) {
        task.unique_key = format!("key {}", random.below(KEYS));
    }
    task
}

fn millis(random: &mut Random, from: u64, up_to: u64) -> Duration {
    Duration::from_millis(from + random.below(up_to - from + 1))
}

fn time(at: Option<Timestamp>) -> Duration {
    let at = at.expect("a time");
    Duration::new(at.seconds.try_into().unwrap(), at.nanos.try_into().unwrap())
}

fn id(info: &TaskInfo) -> String {
    info.task.as_ref().expect("a task").id.clone()
}

/// Runs lives through a server while it, or its store, is killed so often, and judges what was seen.
async fn survive(server: &Server, kills: u64, what: &str, kill: impl AsyncFnMut(&mut Random)) {
    LocalSet::new().run_until(live(server, kills, what, kill)).await;
}

async fn live(server: &Server, kills: u64, what: &str, mut kill: impl AsyncFnMut(&mut Random)) {
    let mut random = Random::new(what);
    let books = Books { lease: LEASE, max_failures: MAX_FAILURES, max_expiries: MAX_EXPIRIES, ..Books::default() };
    let lives = Arc::new(Lives {
        queue: unique_queue("lives"),
        began: Instant::now(),
        tasks: usize::try_from(kills).unwrap() * TASKS_A_KILL,
        next: AtomicUsize::new(0),
        producing: AtomicUsize::new(PRODUCERS),
        ending: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        books: Mutex::new(books),
    });
    let client = server.client().await;
    let retry_backoff = Some(RetryBackoff { min: Some(proto(BACKOFF[0])), max: Some(proto(BACKOFF[1])) });
    let (max_failures, max_expiries) = (Some(MAX_FAILURES), Some(MAX_EXPIRIES));
    let settings = QueueSettings { max_failures, max_expiries, retry_backoff, ..QueueSettings::default() };
    let update_mask = Some(FieldMask { paths: vec!["*".to_owned()] });
    let request = UpdateQueueRequest { queue: lives.queue.clone(), settings: Some(settings), update_mask };
    lives.answered(async || client.admin.clone().update_queue(request.clone()).await).await;

    let mut hands = JoinSet::new();
    for _ in 0..PRODUCERS {
        hands.spawn_local(Arc::clone(&lives).produce(server.client().await, random.fork()));
    }
    for _ in 0..WORKERS {
        hands.spawn_local(Arc::clone(&lives).work(server.client().await, random.fork()));
    }
    hands.spawn_local(Arc::clone(&lives).operate(server.client().await, random.fork()));
    for part in 0..kills {
        lives.moment(&mut random, part, kills).await;
        kill(&mut random).await;
        lives.counts(&client).await;
    }
    lives.worked_off(&client).await;
    while let Some(hand) = hands.join_next().await {
        hand.expect("a producer, a worker or the operator");
    }
    lives.leave_some(&client).await;
    kill(&mut random).await;
    lives.look(&client).await;
    lives.judge();
}

async fn kill_server(server: &Server, random: &mut Random) {
    server.kill();
    sleep(random.up_to(Duration::from_millis(100))).await;
    server.restart().await;
}

async fn on_redis() -> Server {
    let options = Options { persistence: Persistence::Always, ..Options::default() };
    let server = Server::on_redis_with(options, &["--store-timeout", "5s"]);
    server.ready().await;
    server
}

wire_tests! {
    /// G1–G10, G14: whenever the server is killed, every task is in one place or gone in one way, as the counts say; none is
    /// delivered before it is due or after its end, no key is held twice, and no failure is counted that was none.
    async fn lives_survive_kills_of_an_embedded_server() {
        let server = Embedded::start(&[]).await;
        survive(&server, rounds(8, 80), "lives on SQLite", async |random| kill_server(&server, random).await).await;
        server.kill_and_check();
    }

    /// G1–G10, G14: the same of a server on Redis.
    async fn lives_survive_kills_of_a_server_on_redis() {
        let server = on_redis().await;
        survive(&server, rounds(8, 80), "lives on Redis", async |random| kill_server(&server, random).await).await;
    }

    /// G1–G10, G14: the same when Redis, which writes every change to its disk, is killed.
    async fn lives_survive_kills_of_redis() {
        let server = on_redis().await;
        survive(&server, rounds(4, 40), "lives and kills of Redis", async |random| {
            server.redis().kill();
            sleep(random.up_to(Duration::from_millis(100))).await;
            server.redis().restart();
        })
        .await;
    }
}
