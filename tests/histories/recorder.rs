//! What callers saw, written down as they saw it, on one clock.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use data_queue_proto::v1::{InsertResponse, Outcome, Task};

use crate::support::call::{duration, text};

/// All that happened in one queue. Times are since the beginning of the run.
#[derive(Debug, Default)]
pub struct History {
    pub inserts: Vec<Insert>,
    pub deliveries: Vec<Delivery>,
    pub tries: Vec<Try>,
    pub reclaims: Vec<Reclaim>,
    pub leavings: Vec<Leaving>,
}

/// An insert that was answered OK in the end.
#[derive(Clone, Debug)]
pub struct Insert {
    pub texts: Vec<String>,
    pub ids: Vec<String>,
    pub replayed: bool,
    /// How often it was sent.
    pub sent: usize,
}

/// A task that a worker received.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The call that brought it, for people.
    pub call: String,
    /// Of the stream that brought it.
    pub session: Option<u64>,
    pub id: String,
    pub token: String,
    pub text: String,
    pub deliveries: u32,
    pub expiries: u32,
    /// Before the first try of that call; on a stream, before the store was asked for it.
    pub first_sent: Duration,
    /// Before the try that was answered with it.
    pub sent: Duration,
    /// After its answer.
    pub answered: Duration,
    /// How much of the lease was left when the answer left the store.
    pub left: Duration,
}

/// What a call wanted to do with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    Ack,
    PutBack,
    Heartbeat,
    /// A stream was opened with this session, and told what it took over.
    Resume(u64),
}

/// One call about one token, each repetition a try of its own.
#[derive(Clone, Debug)]
pub struct Try {
    pub token: String,
    pub intent: Intent,
    pub sent: Duration,
    /// None if the call failed, which says nothing about whether it was done.
    pub answer: Option<Answer>,
}

#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub at: Duration,
    pub outcome: Outcome,
    /// Of an applied heartbeat: how much of the lease was left at least.
    pub left: Option<Duration>,
}

/// A worker let go of a stream on which it had this token. The server may notice that later, and not before.
#[derive(Clone, Debug)]
pub struct Leaving {
    pub token: String,
    pub at: Duration,
}

/// A Putback of whatever was held for some time.
#[derive(Clone, Copy, Debug)]
pub struct Reclaim {
    pub held_for: Duration,
    pub sent: Duration,
    /// After this it takes nothing back any more: it was answered, or it failed long ago.
    pub over: Duration,
}

impl History {
    /// All that happened to a task, given its id or one of its tokens, in the order in which it was sent.
    pub fn about(&self, id_or_token: &str) -> String {
        let named = |delivery: &&Delivery| delivery.id == id_or_token || delivery.token == id_or_token;
        let id = self.deliveries.iter().find(named).map_or(id_or_token, |delivery| &delivery.id);
        let deliveries = self.deliveries.iter().filter(|delivery| delivery.id == id).collect::<Vec<_>>();
        let of_task = |one: &&Try| deliveries.iter().any(|delivery| delivery.token == one.token);
        let line = |it: &Delivery| {
            let Delivery { call, id, token, deliveries, expiries, sent, answered, left, .. } = it;
            let counted = format!("deliveries {deliveries}, expiries {expiries}");
            (*sent, format!("{sent:?} to {answered:?}: {call} got {id} under {token} for {left:?}, {counted}"))
        };
        let mut lines = deliveries.iter().copied().map(line).collect::<Vec<_>>();
        let line = |Try { token, intent, sent, answer }: &Try| {
            let answer = answer.map(|answer| (answer.at, answer.outcome));
            (*sent, format!("{sent:?}: {intent:?} {token}, answered {answer:?}"))
        };
        lines.extend(self.tries.iter().filter(of_task).map(line));
        let of_task = |one: &&Leaving| deliveries.iter().any(|delivery| delivery.token == one.token);
        let line = |Leaving { token, at }: &Leaving| (*at, format!("{at:?}: its stream was left, with {token}"));
        lines.extend(self.leavings.iter().filter(of_task).map(line));
        let span = lines.iter().map(|(sent, _)| *sent).min().zip(lines.iter().map(|(sent, _)| *sent).max());
        let near = |one: &&Reclaim| span.is_some_and(|(first, last)| one.over >= first && one.sent <= last);
        let line = |one: &Reclaim| {
            let Reclaim { held_for, sent, over } = one;
            (*sent, format!("{sent:?} to {over:?}: whatever was held for {held_for:?} was put back"))
        };
        lines.extend(self.reclaims.iter().filter(near).map(line));
        lines.sort();
        lines.into_iter().map(|(_, line)| format!("    {line}\n")).collect()
    }
}

impl Delivery {
    fn of(call: &str, session: Option<u64>, task: &Task, [first_sent, sent, answered]: [Duration; 3]) -> Self {
        Self {
            call: call.to_owned(),
            session,
            id: task.id.clone(),
            token: task.lease_token.clone(),
            text: text(task).to_owned(),
            deliveries: task.deliveries,
            expiries: task.expiries,
            first_sent,
            sent,
            answered,
            left: duration(task.lease),
        }
    }
}

/// Where all callers of a run write.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    history: Mutex<History>,
}

impl Recorder {
    pub fn start() -> Self {
        Self { began: Instant::now(), history: Mutex::default() }
    }

    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn inserted(&self, texts: Vec<String>, answer: &InsertResponse, sent: usize) {
        let ids = answer.results.iter().map(|result| result.id.clone()).collect();
        self.history.lock().unwrap().inserts.push(Insert { texts, ids, replayed: answer.replayed, sent });
    }

    pub fn delivered(&self, call: &str, task: &Task, first_sent: Duration, sent: Duration, answered: Duration) {
        self.received(Delivery::of(call, None, task, [first_sent, sent, answered]));
    }

    /// On a stream that did not ask for it before the fence.
    pub fn streamed(&self, session: u64, task: &Task, fence: Duration, read: Duration) {
        self.received(Delivery::of(&format!("stream of {session:016x}"), Some(session), task, [fence, fence, read]));
    }

    fn received(&self, delivery: Delivery) {
        self.history.lock().unwrap().deliveries.push(delivery);
    }

    pub fn tried(&self, token: &str, intent: Intent, sent: Duration, answer: Option<Answer>) {
        self.history.lock().unwrap().tries.push(Try { token: token.to_owned(), intent, sent, answer });
    }

    pub fn left(&self, token: &str, at: Duration) {
        self.history.lock().unwrap().leavings.push(Leaving { token: token.to_owned(), at });
    }

    pub fn reclaimed(&self, held_for: Duration, sent: Duration, over: Duration) {
        self.history.lock().unwrap().reclaims.push(Reclaim { held_for, sent, over });
    }

    pub fn take(&self) -> History {
        std::mem::take(&mut self.history.lock().unwrap())
    }
}
