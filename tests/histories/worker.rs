//! A worker with habits. It writes down every try of every call.

use std::{sync::Arc, time::Duration};

use data_queue_proto::v1::{HeartbeatRequest, HeartbeatResponse, Outcome, PopBatchRequest, PopRequest, Task};
use tokio::time::{sleep, timeout};

use super::{
    load::Load,
    random::Random,
    recorder::{Answer, Intent},
    stream::StreamWorker,
};
use crate::support::{
    call::{
        ack_request, duration, heartbeat_request, held_for_request, outcomes, pop_batch_request, pop_request, proto,
        putback_request,
    },
    server::Client,
};

/// How long a worker waits for tasks.
pub const WAIT: Duration = Duration::from_millis(300);
const LARGEST_BATCH: u64 = 20;
/// A task that was delivered so often is not refused any more, so that every run ends.
pub const REFUSALS: u32 = 6;
/// A failed call does nothing any more when so much time has passed.
const FORGOTTEN: Duration = Duration::from_secs(6);
/// About as long as a pop takes.
const IMPATIENCE: Duration = Duration::from_millis(3);
pub const PAST_THE_LEASE: Duration = Duration::from_millis(100);

/// How a worker gets tasks and acks them.
#[derive(Clone, Copy, Debug)]
pub enum Style {
    /// One by one, without a request id.
    Plain,
    /// Many by PopBatch, acked together.
    Batch,
    /// With a request id, acked with the next pop.
    Fused,
    /// With a request id.
    Named,
    /// On a stream: see [`super::stream`].
    Stream,
}

impl Style {
    /// A third of the workers have streams.
    pub const ALL: [Self; 6] = [Self::Plain, Self::Stream, Self::Batch, Self::Fused, Self::Stream, Self::Named];
}

pub struct Worker {
    load: Arc<Load>,
    clients: Vec<Client>,
    at: usize,
    style: Style,
    random: Random,
    name: String,
    named: u64,
}

/// A delivery that is to be acked.
pub struct Held {
    pub id: String,
    pub token: String,
}

impl Held {
    pub fn of(task: &Task) -> Self {
        Self { id: task.id.clone(), token: task.lease_token.clone() }
    }
}

impl Worker {
    pub fn new(load: Arc<Load>, clients: Vec<Client>, style: Style, mut random: Random) -> Self {
        let name = format!("{style:?}-{:016x}", random.below(u64::MAX));
        Self { load, clients, at: 0, style, random, name, named: 0 }
    }

    pub async fn work(mut self) {
        if matches!(self.style, Style::Stream) {
            let random = self.random.fork();
            return StreamWorker::new(Arc::clone(&self.load), self, random).work().await;
        }
        let mut finished: Vec<Held> = Vec::new();
        while !self.load.done() {
            let tasks = match self.style {
                Style::Plain | Style::Stream => self.pop_plain().await,
                Style::Batch => self.pop_batch().await,
                Style::Fused => self.pop_named(std::mem::take(&mut finished)).await,
                Style::Named => self.pop_named(Vec::new()).await,
            };
            if tasks.is_empty() {
                continue;
            }
            let done = self.treat(tasks).await;
            match self.style {
                Style::Fused => finished = done,
                _ => self.ack(&done).await,
            }
        }
    }

    /// Works on tasks for some time; gives those that are to be acked.
    async fn treat(&mut self, tasks: Vec<Task>) -> Vec<Held> {
        let (habits, lease) = (self.load.plan.habits, self.load.plan.lease);
        let mut tokens = tasks.iter().map(|task| task.lease_token.clone()).collect::<Vec<_>>();
        if self.random.chance(habits.heartbeat) {
            self.heartbeat(&tokens).await;
        }
        if self.random.chance(habits.long) {
            for _ in 0..3 {
                sleep(lease / 2).await;
                self.heartbeat(&tokens).await;
            }
        } else if self.random.chance(habits.late) {
            sleep(lease + PAST_THE_LEASE).await;
        }
        if self.random.chance(habits.reclaim) {
            self.reclaim().await;
        }
        tokens.clear();
        let mut done = Vec::new();
        for task in tasks {
            if task.deliveries < REFUSALS && self.random.chance(habits.abandon) {
                continue;
            }
            if task.deliveries < REFUSALS && self.random.chance(habits.put_back) {
                tokens.push(task.lease_token);
                continue;
            }
            done.push(Held::of(&task));
        }
        self.put_back(&tokens).await;
        done
    }

    async fn pop_plain(&mut self) -> Vec<Task> {
        let sent = self.load.recorder.now();
        let request = self.pop_request(String::new(), Vec::new());
        let Some((answer, answered)) = self.load.answer(self.clients[self.at].pop(request)).await else {
            self.turn();
            return Vec::new();
        };
        self.received("plain", answer.task.into_iter().collect(), sent, sent, answered)
    }

    async fn pop_batch(&mut self) -> Vec<Task> {
        let max_tasks = 1 + u32::try_from(self.random.below(LARGEST_BATCH)).unwrap();
        let lease = Some(proto(self.load.plan.lease));
        let request =
            PopBatchRequest { max_tasks, lease, wait: Some(proto(WAIT)), ..pop_batch_request(&self.load.queue) };
        let sent = self.load.recorder.now();
        let Some((mut stream, _)) = self.load.answer(self.clients[self.at].pop_batch(request)).await else {
            self.turn();
            return Vec::new();
        };
        let mut tasks = Vec::new();
        // What came before the stream broke is there to be worked on.
        while let Ok(Ok(Some(message))) = timeout(WAIT * 10, stream.message()).await {
            let answered = self.load.recorder.now();
            tasks.extend(self.received("batch", message.tasks, sent, sent, answered));
        }
        tasks
    }

    /// Repeats one pop under its request id until it is answered.
    async fn pop_named(&mut self, finished: Vec<Held>) -> Vec<Task> {
        self.named += 1;
        let request_id = format!("{}-{}", self.name, self.named);
        let request = self.pop_request(request_id, finished.iter().map(|held| held.token.clone()).collect());
        let mut first_sent = None;
        while !self.load.over() {
            let patience = match self.random.chance(self.load.plan.habits.impatient) {
                true => self.random.up_to(IMPATIENCE),
                false => Duration::MAX,
            };
            let sent = self.load.recorder.now();
            let first_sent = *first_sent.get_or_insert(sent);
            let call = self.load.answer(self.clients[self.at].pop(request.clone()));
            let Some((answer, answered)) = timeout(patience, call).await.unwrap_or(None) else {
                self.tried(&finished, Intent::Ack, sent, None);
                self.turn();
                continue;
            };
            self.tried(&finished, Intent::Ack, sent, Some((answered, &answer.ack_outcomes)));
            let tasks = answer.task.into_iter().collect();
            return self.received(&request.request_id, tasks, first_sent, sent, answered);
        }
        Vec::new()
    }

    fn pop_request(&self, request_id: String, ack_lease_tokens: Vec<String>) -> PopRequest {
        let (lease, wait) = (Some(proto(self.load.plan.lease)), Some(proto(WAIT)));
        PopRequest { lease, wait, request_id, ack_lease_tokens, ..pop_request(&self.load.queue) }
    }

    fn received(&self, call: &str, tasks: Vec<Task>, first_sent: Duration, sent: Duration, at: Duration) -> Vec<Task> {
        tasks.iter().for_each(|task| self.load.recorder.delivered(call, task, first_sent, sent, at));
        tasks
    }

    /// Repeats the ack until it is answered.
    pub async fn ack(&mut self, done: &[Held]) {
        let request = ack_request(&self.load.queue, &done.iter().map(|held| held.token.clone()).collect::<Vec<_>>());
        while !done.is_empty() && !self.load.over() {
            let sent = self.load.recorder.now();
            let answer = self.load.answer(self.clients[self.at].ack(request.clone())).await;
            self.tried(done, Intent::Ack, sent, answer.as_ref().map(|(answer, at)| (*at, &answer.outcomes[..])));
            if answer.is_some() {
                return;
            }
            self.turn();
        }
    }

    async fn put_back(&mut self, tokens: &[String]) {
        let held = tokens.iter().map(|token| Held { id: String::new(), token: token.clone() }).collect::<Vec<_>>();
        while !tokens.is_empty() && !self.load.over() {
            let sent = self.load.recorder.now();
            let request = putback_request(&self.load.queue, tokens);
            let answer = self.load.answer(self.clients[self.at].putback(request)).await;
            self.tried(&held, Intent::PutBack, sent, answer.as_ref().map(|(answer, at)| (*at, &answer.outcomes[..])));
            if answer.is_some() {
                return;
            }
            self.turn();
        }
    }

    /// Puts back what anybody has held for about a lease. Sent once.
    pub async fn reclaim(&mut self) {
        let held_for = self.load.plan.lease / 2 + self.random.up_to(self.load.plan.lease / 2);
        let sent = self.load.recorder.now();
        let request = held_for_request(&self.load.queue, proto(held_for));
        let answer = self.load.answer(self.clients[self.at].putback(request)).await;
        let over = answer.map_or_else(|| self.load.recorder.now() + FORGOTTEN, |(_, at)| at);
        self.load.recorder.reclaimed(held_for, sent, over);
    }

    /// Sent once: the lease may well run out if the answer does not come.
    async fn heartbeat(&mut self, tokens: &[String]) {
        let lease = Some(proto(self.load.plan.lease));
        let request = HeartbeatRequest { lease, ..heartbeat_request(&self.load.queue, tokens) };
        let sent = self.load.recorder.now();
        let answer: Option<(HeartbeatResponse, _)> = self.load.answer(self.clients[self.at].heartbeat(request)).await;
        for (at, token) in tokens.iter().enumerate() {
            let answer = answer.as_ref().map(|(answer, answered)| {
                let outcome = outcomes(&answer.outcomes)[at];
                let left = (outcome == Outcome::Applied).then(|| duration(answer.lease));
                Answer { at: *answered, outcome, left }
            });
            self.load.recorder.tried(token, Intent::Heartbeat, sent, answer);
        }
    }

    pub fn tried(&self, held: &[Held], intent: Intent, sent: Duration, answer: Option<(Duration, &[i32])>) {
        let answer = answer.map(|(at, all)| (at, outcomes(all)));
        if let Some((_, all)) = &answer {
            assert_eq!(all.len(), held.len(), "one outcome for each token");
        }
        for (position, held) in held.iter().enumerate() {
            let answer = answer.as_ref().map(|(at, all)| Answer { at: *at, outcome: all[position], left: None });
            self.load.recorder.tried(&held.token, intent, sent, answer);
            if intent == Intent::Ack && answer.is_some_and(|answer| answer.outcome != Outcome::LeaseLost) {
                self.load.acked(&held.id);
            }
        }
    }

    /// Of the server whose turn it is.
    pub fn client(&mut self) -> &mut Client {
        &mut self.clients[self.at]
    }

    /// The next try goes to the next server.
    pub fn turn(&mut self) {
        self.at = (self.at + 1) % self.clients.len();
    }
}
