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

use data_queue_proto::{
    reason,
    v1::{InsertRequest, PopRequest, QueueCounts},
};
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
    PATIENCE,
    call::{get_queue_request, insert_request, json, pop_request, proto},
    poll_until, rounds,
    server::{Client, Server},
    status::Details,
    unique_queue,
};

/// A call that is not answered by then is one without an answer.
pub const CALL_LIMIT: Duration = Duration::from_secs(15);
pub const RETRY: Duration = Duration::from_millis(20);
/// For servers: no habit of workers makes dead letters.
pub const NO_DEAD_LETTERS: [&str; 2] = ["--max-expiries", "1000000"];
const LARGEST_BATCH: u64 = 40;
/// Producers wait while so many tasks are open, so that there are inserts until the end.
const MOST_OPEN: usize = 300;
const FAULTS_TOLD: usize = 20;
/// Of the run, in thousandths: what happens later happens to next to nothing.
const LAST_MOMENT: u64 = 950;

/// What is not worked off by then is lost, as far as the judgement goes.
fn limit() -> Duration {
    Duration::from_secs(rounds(200, 1_500))
}

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub supply: Supply,
    pub producers: usize,
    pub workers: usize,
    /// Short, so that what a fault swallowed comes back soon.
    pub lease: Duration,
    pub habits: Habits,
    /// The store may run out of room on the way.
    pub may_be_full: bool,
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
    /// Put back whatever anybody has held for about a lease.
    pub reclaim: u64,
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
    met: Mutex<Met>,
}

/// What workers on streams met.
#[derive(Debug, Default)]
pub struct Met {
    pub streams: usize,
    /// By the worker, and not by the server or a fault.
    pub left: usize,
    pub fences: usize,
    pub streamed: usize,
    pub resumed: usize,
    /// Of those, what the worker had not read, or had given up.
    pub unknown: usize,
}

impl Load {
    /// Waits until this share of a fixed number of tasks is acked, in thousandths.
    pub async fn reached(&self, per_mille: u64) {
        let Supply::Tasks(total) = self.plan.supply else { panic!("no fixed number of tasks") };
        let wanted = total * usize::try_from(per_mille).unwrap() / 1_000;
        let reached = async || (self.acked.lock().unwrap().len() >= wanted || self.over()).then_some(());
        poll_until("the load to go on", limit() * 2, reached).await;
    }

    /// Waits for a moment somewhere in one of so many parts of the run.
    pub async fn moment(&self, random: &mut Random, part: u64, parts: u64) {
        self.reached(part * LAST_MOMENT / parts + random.below(LAST_MOMENT / parts)).await;
        sleep(random.up_to(RETRY)).await;
    }

    pub fn met(&self, note: impl FnOnce(&mut Met)) {
        note(&mut self.met.lock().unwrap());
    }

    /// A stream ended, in a way in which it may end.
    #[track_caller]
    pub fn failed(&self, status: &Status) {
        self.excuse(status);
        self.unanswered.fetch_add(1, Ordering::Relaxed);
    }

    /// How many calls failed so far.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::Relaxed)
    }

    /// Whether everything was acked, or it has become too late for that.
    pub fn done(&self) -> bool {
        let producing = self.producing.load(Ordering::SeqCst);
        producing == 0 && self.open() == 0 || self.over()
    }

    pub fn over(&self) -> bool {
        self.began.elapsed() > limit()
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
            Ok(Err(status)) => self.excuse(&status),
            Err(_) => {}
        }
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        sleep(RETRY).await;
        None
    }

    /// See [`excuse`].
    #[track_caller]
    pub fn excuse(&self, status: &Status) {
        excuse(status, self.plan.may_be_full);
    }

    /// G14: the server's counts add up, and agree with what callers were told and with what they asked for.
    pub async fn conserved(&self, server: &Server) -> QueueCounts {
        let told = |counter: &AtomicUsize| u64::try_from(counter.load(Ordering::SeqCst)).unwrap();
        let inserted_before = told(&self.inserted);
        let acked_before = u64::try_from(self.acked.lock().unwrap().len()).unwrap();
        let mut client = server.client().await;
        let request = get_queue_request(&self.queue);
        let ask = async || match client.admin.get_queue(request.clone()).await {
            Ok(answer) => Some(answer.into_inner().queue.expect("a queue").counts.expect("counts")),
            Err(status) if status.code() == Code::NotFound && inserted_before == 0 => Some(QueueCounts::default()),
            Err(status) => {
                self.excuse(&status);
                None
            }
        };
        let counts = poll_until("the queue's counts", PATIENCE, ask).await;
        let QueueCounts { ready, leased, dead, inserted, acked, .. } = counts;
        assert_eq!(inserted, ready + leased + dead + acked, "{counts:?}");
        assert_eq!(dead, 0, "{counts:?}");
        let asked_for = match self.plan.supply {
            Supply::Tasks(total) => told(&self.next).min(u64::try_from(total).unwrap()),
            Supply::For(_) => told(&self.next),
        };
        assert!(inserted >= inserted_before, "{inserted_before} inserts were answered OK, {counts:?}");
        assert!(inserted <= asked_for, "{asked_for} tasks were sent, {counts:?}");
        assert!(acked >= acked_before, "{acked_before} acks were answered OK, {counts:?}");
        counts
    }

    /// The numbers of the next tasks, at most so many; none if there are enough.
    async fn take(&self, most: usize) -> Option<std::ops::Range<usize>> {
        match self.plan.supply {
            Supply::Tasks(total) => {
                while self.open() > MOST_OPEN && !self.over() {
                    sleep(RETRY).await;
                }
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
            self.unanswered(),
            self.began.elapsed()
        );
        let met = self.met.lock().unwrap();
        println!("{met:?}");
        // A run in which they did nothing proves nothing of them.
        assert!(met.streams == 0 || met.streamed > 0, "nothing came over {} streams", met.streams);
        drop(met);
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
pub fn excuse(status: &Status, may_be_full: bool) {
    let said = status.reason();
    let broken = matches!(status.code(), Code::Unknown | Code::Cancelled | Code::Internal) && said.is_none();
    let full = may_be_full && said.as_deref() == Some(reason::STORE_FULL);
    let excused = broken || full || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
    assert!(excused, "no fault explains {status:?}");
    let hint = full || said.as_deref() == Some(reason::STORE_UNAVAILABLE);
    assert!(!hint || status.retry_delay().is_some(), "it may be repeated, and {status:?} does not say when");
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
        met: Mutex::default(),
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
    let inserted = u64::try_from(load.inserted.load(Ordering::SeqCst)).unwrap();
    let expected = QueueCounts { inserted, acked: inserted, ..QueueCounts::default() };
    assert_eq!(load.conserved(server).await, expected);
}
