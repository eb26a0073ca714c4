//! A load on several queues through several servers, that is written down: what was sent, answered and delivered, and when which
//! queue took calls.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use data_queue_proto::v1::{Durability, InsertRequest, Outcome, PopRequest};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Response, Status};

use super::account::{Account, account};
use crate::{
    histories::{
        load::{CALL_LIMIT, RETRY, excuse},
        random::Random,
        recorder::{Answer, Intent, Recorder},
    },
    support::{
        PATIENCE,
        call::{ack_request, add_up, get_queue_request, insert_request, json, outcomes, pop_request, proto},
        poll_until,
        server::{Client, Server},
    },
};

/// Of each queue on each server.
const PRODUCERS: usize = 1;
const WORKERS: usize = 2;
/// Between two inserts of a producer, at most.
const PACE: Duration = Duration::from_millis(20);
/// For how long a task is worked on, at most.
const WORK: Duration = Duration::from_millis(15);
const MOST_TASKS: u64 = 3;
/// Short, so that what a fault swallowed comes back soon.
const LEASE: Duration = Duration::from_secs(3);
const WAIT: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Insert,
    Pop,
    Ack,
}

/// One try of one call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub kind: Kind,
    /// By their numbers.
    pub queue: usize,
    pub server: usize,
    pub sent: Duration,
    pub ended: Duration,
    pub is_ok: bool,
}

pub struct Load {
    pub queues: Vec<String>,
    durability: Durability,
    recorder: Recorder,
    calls: Mutex<Vec<Call>>,
    /// The texts of all tasks that were ever sent.
    sent: Mutex<BTreeSet<String>>,
    /// The ids of which was said that a replica has them.
    replicated: Mutex<BTreeSet<String>>,
    is_producing: AtomicBool,
    producers: AtomicUsize,
    is_over: AtomicBool,
}

impl Load {
    /// Starts it on all queues through all servers.
    pub async fn start(
        queues: Vec<String>,
        servers: &[Server],
        durability: Durability,
        random: &mut Random,
    ) -> (Arc<Self>, JoinSet<()>) {
        let load = Arc::new(Self {
            durability,
            recorder: Recorder::start(),
            calls: Mutex::default(),
            sent: Mutex::default(),
            replicated: Mutex::default(),
            is_producing: AtomicBool::new(true),
            producers: AtomicUsize::new(queues.len() * servers.len() * PRODUCERS),
            is_over: AtomicBool::new(false),
            queues,
        });
        let mut hands = JoinSet::new();
        for queue in 0..load.queues.len() {
            for (number, server) in servers.iter().enumerate() {
                for producer in 0..PRODUCERS {
                    let name = format!("{queue}-{number}-{producer}");
                    let hand = Hand {
                        load: Arc::clone(&load),
                        client: server.client().await,
                        queue,
                        server: number,
                        random: random.fork(),
                    };
                    hands.spawn(hand.produce(name));
                }
                for _ in 0..WORKERS {
                    let hand = Hand {
                        load: Arc::clone(&load),
                        client: server.client().await,
                        queue,
                        server: number,
                        random: random.fork(),
                    };
                    hands.spawn(hand.work());
                }
            }
        }
        (load, hands)
    }

    /// Whether inserts are refused where a master has no replica.
    pub fn wants_replicas(&self) -> bool {
        self.durability == Durability::Replicated
    }

    pub fn now(&self) -> Duration {
        self.recorder.now()
    }

    /// Waits until every queue took so many inserts and acks more, through those of the servers that count.
    pub async fn goes_on(&self, servers: &[usize], times: usize) {
        let since = self.now();
        let went_on = || {
            let calls = self.calls.lock().unwrap();
            let done = |kind, queue| {
                let newest = calls.iter().rev().take_while(|call| call.ended >= since);
                newest
                    .filter(|call| {
                        call.is_ok && call.kind == kind && call.queue == queue && servers.contains(&call.server)
                    })
                    .count()
                    >= times
            };
            (0..self.queues.len()).all(|queue| done(Kind::Insert, queue) && done(Kind::Ack, queue))
        };
        poll_until("the load to go on", PATIENCE, async || went_on().then_some(())).await;
    }

    /// How long after this moment each queue took an insert and an ack again through one of these servers, the longest of all.
    pub fn back_after(&self, moment: Duration, servers: &[usize]) -> Duration {
        let calls = self.calls.lock().unwrap();
        let first = |kind, queue, server| {
            let own = |call: &&Call| call.kind == kind && call.queue == queue && call.server == server;
            let done = calls.iter().filter(own).filter(|call| call.is_ok && call.ended >= moment);
            done.map(|call| call.ended - moment).min().unwrap_or(Duration::MAX)
        };
        let all = (0..self.queues.len()).flat_map(|queue| servers.iter().map(move |server| (queue, *server)));
        all.flat_map(|(queue, server)| [first(Kind::Insert, queue, server), first(Kind::Ack, queue, server)])
            .max()
            .unwrap_or_default()
    }

    /// Inserts and acks that were answered OK through this server, of those sent in this span.
    pub fn taken(&self, from: Duration, to: Duration, server: usize) -> usize {
        let calls = self.calls.lock().unwrap();
        let taken = calls.iter().filter(|call| call.server == server && call.is_ok && call.kind != Kind::Pop);
        taken.filter(|call| call.sent >= from && call.ended <= to).count()
    }

    /// The longest time in which some queue took neither an insert nor an ack through any server.
    pub fn longest_silence(&self) -> Duration {
        let calls = self.calls.lock().unwrap();
        let silence = |queue| {
            let ok = calls.iter().filter(|call| call.queue == queue && call.is_ok && call.kind != Kind::Pop);
            let mut moments: Vec<_> = ok.map(|call| call.ended).collect();
            moments.sort_unstable();
            moments.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
        };
        (0..self.queues.len()).map(silence).max().unwrap_or_default()
    }

    /// Calls under way at some time of this span; and of those, which failed, or took longer than any of their kind had before.
    pub fn disturbed(&self, from: Duration, to: Duration) -> (usize, usize) {
        let calls = self.calls.lock().unwrap();
        let usual = |kind| {
            let before = calls.iter().filter(|call| call.kind == kind && call.ended < from);
            before.map(|call| call.ended - call.sent).max().unwrap_or_default()
        };
        let usual = [Kind::Insert, Kind::Pop, Kind::Ack].map(|kind| (kind, usual(kind)));
        let is_unusual = |call: &&Call| {
            let took = call.ended - call.sent;
            !call.is_ok || usual.iter().any(|(kind, longest)| *kind == call.kind && took > *longest)
        };
        let under_way: Vec<_> = calls.iter().filter(|call| call.sent <= to && call.ended >= from).collect();
        (under_way.len(), under_way.iter().copied().filter(is_unusual).count())
    }

    /// Ends it once everything is worked off, and says what became of all tasks.
    pub async fn finish(&self, mut hands: JoinSet<()>, server: &Server) -> Account {
        self.is_producing.store(false, Ordering::SeqCst);
        // Each insert is repeated until it is answered.
        poll_until("the inserts to be answered", PATIENCE, async || {
            (self.producers.load(Ordering::SeqCst) == 0).then_some(())
        })
        .await;
        let mut client = server.client().await;
        for queue in &self.queues {
            let is_empty = async || {
                let answer = client.admin.get_queue(get_queue_request(queue)).await.ok()?.into_inner();
                let counts = answer.queue?.counts?;
                add_up(&counts);
                (counts.ready + counts.leased + counts.scheduled + counts.dead == 0).then_some(())
            };
            poll_until("a queue to be worked off", PATIENCE, is_empty).await;
        }
        self.is_over.store(true, Ordering::SeqCst);
        while let Some(hand) = hands.join_next().await {
            hand.expect("a producer or worker");
        }
        let (sent, replicated) = (self.sent.lock().unwrap(), self.replicated.lock().unwrap());
        let history = self.recorder.take();
        let account = account(&history, &sent, &replicated);
        account.wrong.iter().for_each(|fault| println!("{fault:?}\n{}", history.about(fault.about())));
        account
    }
}

/// A producer or a worker.
struct Hand {
    load: Arc<Load>,
    client: Client,
    queue: usize,
    server: usize,
    random: Random,
}

impl Hand {
    fn name(&self) -> &str {
        &self.load.queues[self.queue]
    }

    /// What it was answered and when; none, after a pause, if the call failed in a way in which it may fail.
    async fn answer<T>(
        &self,
        kind: Kind,
        sent: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Option<(T, Duration)> {
        let answer = timeout(CALL_LIMIT, call).await;
        let ended = self.load.now();
        let is_ok = matches!(answer, Ok(Ok(_)));
        let call = Call { kind, queue: self.queue, server: self.server, sent, ended, is_ok };
        self.load.calls.lock().unwrap().push(call);
        match answer {
            Ok(Ok(answer)) => return Some((answer.into_inner(), ended)),
            Ok(Err(status)) => excuse(&status, false),
            Err(_) => {}
        }
        sleep(RETRY).await;
        None
    }

    async fn produce(mut self, name: String) {
        for number in 0.. {
            if !self.load.is_producing.load(Ordering::SeqCst) {
                break;
            }
            sleep(self.random.up_to(PACE)).await;
            let tasks = 1 + self.random.below(MOST_TASKS);
            let texts: Vec<_> = (0..tasks).map(|task| format!("{{\"task\": \"{name}-{number}-{task}\"}}")).collect();
            self.load.sent.lock().unwrap().extend(texts.iter().cloned());
            let request_id = format!("{name}-{number}");
            let insert = InsertRequest {
                request_id,
                durability: self.load.durability.into(),
                ..insert_request(self.name(), texts.iter().map(|text| json(text)).collect())
            };
            for times in 1.. {
                let sent = self.load.now();
                let mut client = self.client.clone();
                let Some((answer, _)) = self.answer(Kind::Insert, sent, client.insert(insert.clone())).await else {
                    continue;
                };
                if answer.durability() == Durability::Replicated {
                    self.load.replicated.lock().unwrap().extend(answer.results.iter().map(|result| result.id.clone()));
                }
                self.load.recorder.inserted(texts, &answer, times);
                break;
            }
        }
        self.load.producers.fetch_sub(1, Ordering::SeqCst);
    }

    async fn work(mut self) {
        while !self.load.is_over.load(Ordering::SeqCst) {
            let request = PopRequest { lease: Some(proto(LEASE)), wait: Some(proto(WAIT)), ..pop_request(self.name()) };
            let sent = self.load.now();
            let mut client = self.client.clone();
            let Some((answer, ended)) = self.answer(Kind::Pop, sent, client.pop(request)).await else { continue };
            let Some(task) = answer.task else { continue };
            self.load.recorder.delivered("pop", &task, sent, sent, ended);
            sleep(self.random.up_to(WORK)).await;
            self.ack(&task.lease_token).await;
        }
    }

    /// Repeats it until it is answered.
    async fn ack(&self, token: &str) {
        let request = ack_request(self.name(), &[token.to_owned()]);
        loop {
            let sent = self.load.now();
            let mut client = self.client.clone();
            let answer = self.answer(Kind::Ack, sent, client.ack(request.clone())).await;
            let told = answer.map(|(answer, at)| (outcomes(&answer.outcomes), at));
            let answer = told.as_ref().map(|(outcomes, at)| Answer { at: *at, outcome: only(outcomes), left: None });
            self.load.recorder.tried(token, Intent::Ack, sent, answer);
            if answer.is_some() {
                return;
            }
        }
    }
}

fn only(outcomes: &[Outcome]) -> Outcome {
    assert_eq!(outcomes.len(), 1, "one outcome for a token");
    outcomes[0]
}
