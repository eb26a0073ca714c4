//! A load that is written down: producers and workers that retry until they know, and a judgement at the end.

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use data_queue_proto::v1::{InsertRequest, PopRequest};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Response, Status};

use super::{
    checker::faults,
    random::Random,
    recorder::Recorder,
    worker::{Style, Worker},
};
use crate::support::{
    call::{insert_request, json, pop_request, proto},
    keys, poll_until,
    server::{Client, Server},
    status::Details,
    unique_queue,
};

/// A call that is not answered by then is one without an answer.
const CALL_LIMIT: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_millis(20);
/// What is not worked off by then is lost, as far as the judgement goes.
const LIMIT: Duration = Duration::from_secs(200);
const LARGEST_BATCH: u64 = 40;
/// Producers that have time wait while so many tasks are open.
const MOST_OPEN: usize = 1_000;
const FAULTS_TOLD: usize = 20;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub supply: Supply,
    pub producers: usize,
    pub workers: usize,
    /// Short, so that what a fault swallowed comes back soon.
    pub lease: Duration,
    pub habits: Habits,
}

/// How much is inserted.
#[derive(Clone, Copy, Debug)]
pub enum Supply {
    Tasks(usize),
    For(Duration),
}

/// How often workers do something else than to ack at once, of a thousand times.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Never ack.
    pub abandon: u64,
    pub put_back: u64,
    pub heartbeat: u64,
    /// Work longer than a lease, with heartbeats.
    pub long: u64,
    /// Ack when the lease has run out.
    pub late: u64,
    /// Give up a pop after a moment and repeat it under the same request id.
    pub impatient: u64,
}

/// The state of a run that its callers share.
pub struct Load {
    pub plan: Plan,
    pub queue: String,
    pub recorder: Recorder,
    began: Instant,
    next: AtomicUsize,
    producing: AtomicUsize,
    inserted: AtomicUsize,
    acked: Mutex<BTreeSet<String>>,
    unanswered: AtomicUsize,
}

impl Load {
    /// Waits until this share of a fixed number of tasks is acked, in thousandths.
    pub async fn reached(&self, per_mille: u64) {
        let Supply::Tasks(total) = self.plan.supply else { panic!("no fixed number of tasks") };
        let wanted = total * usize::try_from(per_mille).unwrap() / 1_000;
        let reached = async || (self.acked.lock().unwrap().len() >= wanted || self.over()).then_some(());
        poll_until("the load to go on", LIMIT * 2, reached).await;
    }

    /// Whether everything was acked, or it has become too late for that.
    pub fn done(&self) -> bool {
        let producing = self.producing.load(Ordering::SeqCst);
        producing == 0 && self.open() == 0 || self.over()
    }

    pub fn over(&self) -> bool {
        self.began.elapsed() > LIMIT
    }

    fn open(&self) -> usize {
        self.inserted.load(Ordering::SeqCst).saturating_sub(self.acked.lock().unwrap().len())
    }

    pub fn acked(&self, id: &str) {
        self.acked.lock().unwrap().insert(id.to_owned());
    }

    /// The answer and when it came; none, after a pause, if the call failed in a way in which it may fail.
    pub async fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>> + Send,
    ) -> Option<(T, Duration)> {
        match timeout(CALL_LIMIT, call).await {
            Ok(Ok(answer)) => return Some((answer.into_inner(), self.recorder.now())),
            Ok(Err(status)) => excuse(&status),
            Err(_) => {}
        }
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        sleep(RETRY).await;
        None
    }

    /// The numbers of the next tasks, at most so many; none if there are enough.
    async fn take(&self, most: usize) -> Option<std::ops::Range<usize>> {
        match self.plan.supply {
            Supply::Tasks(total) => {
                let first = self.next.fetch_add(most, Ordering::SeqCst);
                (first < total).then(|| first..total.min(first + most))
            }
            Supply::For(time) => {
                // A pace, so that what else runs on the machine gets on, too.
                sleep(RETRY).await;
                while self.open() > MOST_OPEN && self.began.elapsed() < time {
                    sleep(RETRY).await;
                }
                let first = self.next.fetch_add(most, Ordering::SeqCst);
                (self.began.elapsed() < time).then(|| first..first + most)
            }
        }
    }

    async fn produce(self: Arc<Self>, mut client: Client, mut random: Random) {
        while let Some(numbers) = self.take(1 + usize::try_from(random.below(LARGEST_BATCH)).unwrap()).await {
            let padding = "x".repeat(usize::try_from(random.below(300)).unwrap());
            let request_id = format!("insert-{}", numbers.start);
            let texts =
                numbers.map(|number| format!("{{\"task\": {number}, \"x\": \"{padding}\"}}")).collect::<Vec<_>>();
            let tasks = texts.iter().map(|text| json(text)).collect();
            let request = InsertRequest { request_id, ..insert_request(&self.queue, tasks) };
            let mut sent = 0;
            while !self.over() {
                sent += 1;
                let Some((answer, _)) = self.answer(client.insert(request.clone())).await else { continue };
                self.inserted.fetch_add(answer.results.len(), Ordering::SeqCst);
                self.recorder.inserted(texts, &answer, sent);
                break;
            }
        }
        self.producing.fetch_sub(1, Ordering::SeqCst);
    }

    fn judge(&self) {
        let history = self.recorder.take();
        let found = faults(&history);
        let redelivered = history.deliveries.iter().filter(|delivery| delivery.deliveries > 1).count();
        println!(
            "{} tasks, {} deliveries, {redelivered} of them repeated, {} calls without an answer, {:?}",
            self.inserted.load(Ordering::SeqCst),
            history.deliveries.len(),
            self.unanswered.load(Ordering::Relaxed),
            self.began.elapsed()
        );
        if found.is_empty() {
            return;
        }
        for fault in found.iter().take(FAULTS_TOLD) {
            println!("{fault:?}\n{}", history.about(fault.about()));
        }
        panic!("{} faults", found.len());
    }
}

/// A fault may end a call, but only in a way that says that it may be repeated.
#[track_caller]
fn excuse(status: &Status) {
    let broken = matches!(status.code(), Code::Unknown | Code::Cancelled | Code::Internal) && status.reason().is_none();
    let excused = broken || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
    assert!(excused, "no fault explains {status:?}");
}

/// Runs a load through these servers while `faults` happen, until everything is worked off, and judges what was seen.
pub async fn run(plan: Plan, servers: &[&Server], mut random: Random, faults: impl AsyncFnOnce(&Load, &mut Random)) {
    let load = Arc::new(Load {
        plan,
        queue: unique_queue("history"),
        recorder: Recorder::start(),
        began: Instant::now(),
        next: AtomicUsize::new(0),
        producing: AtomicUsize::new(plan.producers),
        inserted: AtomicUsize::new(0),
        acked: Mutex::default(),
        unanswered: AtomicUsize::new(0),
    });
    let mut hands = JoinSet::new();
    for number in 0..plan.producers {
        let client = servers[number % servers.len()].client().await;
        hands.spawn(Arc::clone(&load).produce(client, random.fork()));
    }
    for number in 0..plan.workers {
        // Each its own first server; a repeated call goes to the next one.
        let mut clients = Vec::new();
        for offset in 0..servers.len() {
            clients.push(servers[(number + offset) % servers.len()].client().await);
        }
        let style = Style::ALL[number / servers.len() % Style::ALL.len()];
        hands.spawn(Worker::new(Arc::clone(&load), clients, style, random.fork()).work());
    }
    faults(&load, &mut random).await;
    while let Some(hand) = hands.join_next().await {
        hand.expect("a producer or worker");
    }
    load.judge();
    empty(&load, servers[0]).await;
}

/// Nothing comes for longer than a lease, and what went in came out.
async fn empty(load: &Load, server: &Server) {
    let wait = Some(proto(load.plan.lease * 2));
    let pop = PopRequest { wait, ..pop_request(&load.queue) };
    let left = server.client().await.pop(pop).await.expect("a pop").into_inner().task;
    assert_eq!(left, None, "inserted twice, or acked and back");
    let inserted = i64::try_from(load.inserted.load(Ordering::SeqCst)).unwrap();
    let count = |name| keys::counter(server.redis(), name);
    assert_eq!((count("inserted"), count("acked"), count("ready")), (inserted, inserted, 0));
    assert_eq!((keys::fields(server.redis(), "tasks"), keys::fields(server.redis(), "leases")), (0, 0));
}
