//! What a consumer holds, what is to be said about it, and what its streams say. All of it is under one lock.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    task::Waker,
    time::Duration,
};

use data_queue_proto::v1::{self, consume_request::Request};
use tokio::time::Instant;

use super::{
    lane::{Answer, Ask, Lane, Wish},
    line::{Line, Role, Sent},
    token::{FENCE, Token},
};
use crate::{
    Error, Outcome, Putback, Result,
    client::{duration, outcomes},
};

/// What the server does not extend is extended three times a lease, and at least so often.
const KEEP_EVERY: Duration = Duration::from_secs(20);

/// A task that was delivered, and whose end the server has not confirmed.
pub(super) struct Hold {
    pub(super) lane: usize,
    /// The last stream that delivered it or took it over: that one extends its lease.
    pub(super) line: u64,
    pub(super) since: Instant,
    /// Its ack or putback is on its way.
    pub(super) is_settling: bool,
    pub(super) is_lost: bool,
    /// An operator deleted the task.
    pub(super) is_cancelled: bool,
}

pub(super) enum End {
    Well,
    Failed { error: Error, is_told: bool },
}

/// A task that has come, and what its holder needs to know besides.
pub(super) struct Received {
    pub(super) task: v1::Task,
    pub(super) token: Token,
    pub(super) lane: usize,
}

pub(super) struct State {
    pub(super) lanes: Vec<Lane>,
    pub(super) held: HashMap<Token, Hold>,
    pub(super) received: VecDeque<Received>,
    /// What arrived damaged, and when it is put back.
    pub(super) damaged: VecDeque<(Instant, usize, Token)>,
    /// More than this is not received without some of it being lost.
    pub(super) room: usize,
    pub(super) max_outstanding: u32,
    pub(super) max_hold: Duration,
    /// Of the latest task.
    pub(super) lease: Duration,
    pub(super) lines: Vec<Line>,
    pub(super) reader: Option<Waker>,
    pub(super) is_closing: bool,
    pub(super) late_acks: u64,
    /// Why the last stream broke, until somebody asks.
    pub(super) broken: Option<Error>,
    pub(super) end: Option<End>,
}

/// How often a lease of this length is extended.
pub(super) fn keep_every(lease: Duration) -> Duration {
    (lease / 3).clamp(Duration::from_millis(30), KEEP_EVERY)
}

impl State {
    pub(super) fn new(queues: impl Iterator<Item = String>, max_outstanding: u32, max_hold: Duration) -> Self {
        Self {
            lanes: queues.map(Lane::new).collect(),
            held: HashMap::new(),
            received: VecDeque::new(),
            damaged: VecDeque::new(),
            room: max_outstanding as usize,
            max_outstanding,
            max_hold,
            lease: KEEP_EVERY,
            lines: Vec::new(),
            reader: None,
            is_closing: false,
            late_acks: 0,
            broken: None,
            end: None,
        }
    }

    pub(super) fn wanted(&self) -> u32 {
        if self.is_closing { 0 } else { self.max_outstanding }
    }

    pub(super) fn is_lost(&self, token: Token) -> bool {
        matches!(self.end, Some(End::Failed { .. })) || self.held.get(&token).is_some_and(|hold| hold.is_lost)
    }

    pub(super) fn is_cancelled(&self, token: Token) -> bool {
        self.held.get(&token).is_some_and(|hold| hold.is_cancelled)
    }

    /// The handle is closed, and nothing is held, to be said or to be answered.
    pub(super) fn is_finished(&self) -> bool {
        self.is_closing
            && self.held.is_empty()
            && self.lanes.iter().all(Lane::is_idle)
            && self.lines.iter().all(|line| line.sent.is_empty())
    }

    pub(super) fn set_role(&mut self, id: u64, role: Role) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.id == id) {
            line.role = role;
        }
        self.wake_speaker();
    }

    pub(super) fn wake_speaker(&mut self) {
        let speakers = self.lines.iter_mut().filter(|line| line.role == Role::Speaking);
        speakers.filter_map(|line| line.waker.take()).for_each(Waker::wake);
    }

    pub(super) fn ask(&mut self, lane: usize, wish: Wish, ask: Ask) {
        if self.end.is_some() {
            self.late_acks += u64::from(wish == Wish::Ack && ask.waiter.is_none());
            return;
        }
        if matches!(wish, Wish::Ack | Wish::PutBack(_))
            && let Some(hold) = self.held.get_mut(&ask.token)
        {
            hold.is_settling = true;
        }
        self.lanes[lane].push(wish, ask);
        self.wake_speaker();
    }

    /// What is there to say on this stream.
    pub(super) fn next_request(&mut self, at: usize) -> Option<Request> {
        let wanted = self.wanted();
        let line = &mut self.lines[at];
        if line.told != wanted {
            line.told = wanted;
            return Some(Request::MaxOutstanding(wanted));
        }
        let popped = self.lanes.iter_mut().enumerate().find_map(|(lane, asked)| Some((lane, asked.pop()?)));
        let (lane, wish, asks) = match popped {
            Some((lane, (wish, asks))) => (lane, wish, asks),
            None if self.is_closing && !line.is_fenced => {
                line.is_fenced = true;
                (0, Wish::Heartbeat(None), vec![Ask { token: FENCE, waiter: None }])
            }
            None => return None,
        };
        let queue = self.lanes[lane].queue.clone();
        let lease_tokens = asks.iter().map(|ask| ask.token.text()).collect();
        let request = match wish {
            Wish::Ack => Request::Ack(v1::ConsumeAck { queue, lease_tokens }),
            Wish::PutBack(None) => Request::Putback(Putback::new().consumed(queue, lease_tokens)),
            Wish::PutBack(Some(ref options)) => Request::Putback(options.consumed(queue, lease_tokens)),
            Wish::Heartbeat(lease) => {
                Request::Heartbeat(v1::ConsumeHeartbeat { queue, lease_tokens, lease: lease.map(duration) })
            }
        };
        line.sent.push_back(Sent { lane, wish, asks });
        Some(request)
    }

    /// Notes what the stream took over. What is not known here was lost on its way, or given up meanwhile: it goes back. What
    /// is known and was not taken over may be lost; what of it nobody has seen is not worth finding out, and goes back too.
    pub(super) fn resume(&mut self, id: u64, resumed: Vec<v1::ResumedQueue>) -> Result<()> {
        for v1::ResumedQueue { queue, lease_tokens } in resumed {
            let lane = self.lane(&queue)?;
            for token in &lease_tokens {
                let token = Token::parse(token)?;
                match self.held.get_mut(&token) {
                    Some(hold) => hold.line = id,
                    None => self.lanes[lane].push(Wish::PutBack(None), Ask { token, waiter: None }),
                }
            }
        }
        for received in mem::take(&mut self.received) {
            match self.held.get_mut(&received.token) {
                Some(hold) if hold.line != id => {
                    hold.is_settling = true;
                    self.lanes[received.lane].push(Wish::PutBack(None), Ask { token: received.token, waiter: None });
                }
                _ => self.received.push_back(received),
            }
        }
        Ok(())
    }

    fn lane(&self, queue: &str) -> Result<usize> {
        let lane = self.lanes.iter().position(|lane| lane.queue == queue);
        lane.ok_or_else(|| Error::internal("the server sent a task of a queue that it was not asked for"))
    }

    pub(super) fn deliver(&mut self, line: u64, task: v1::Task) -> Result<()> {
        let (lane, token) = (self.lane(&task.queue)?, Token::parse(&task.lease_token)?);
        if let Some(lease) = task.lease.and_then(|lease| Duration::try_from(lease).ok()) {
            self.lease = lease;
        }
        if self.held.contains_key(&token) {
            // It is handed out once, whatever comes.
            return Ok(());
        }
        let hold = Hold { lane, line, since: Instant::now(), is_settling: false, is_lost: false, is_cancelled: false };
        self.held.insert(token, hold);
        self.received.push_back(Received { task, token, lane });
        Ok(())
    }

    /// Notes what was deleted while it was held. True if that is news of any of it.
    pub(super) fn cancel(&mut self, cancelled: Vec<v1::CancelledTasks>) -> Result<bool> {
        let mut is_news = false;
        for token in cancelled.iter().flat_map(|tasks| &tasks.lease_tokens) {
            if let Some(hold) = self.held.get_mut(&Token::parse(token)?) {
                is_news |= !mem::replace(&mut hold.is_cancelled, true);
            }
        }
        Ok(is_news)
    }

    /// Gives back what arrived damaged: what has rested by now, or all.
    pub(super) fn put_back_damaged(&mut self, now: Option<Instant>) {
        while let Some(&(until, lane, token)) = self.damaged.front()
            && now.is_none_or(|now| until <= now)
        {
            self.damaged.pop_front();
            self.ask(lane, Wish::PutBack(None), Ask { token, waiter: None });
        }
    }

    /// Gives back the oldest tasks that nobody has taken. There are too many only if the server takes some for lost.
    pub(super) fn shorten_received(&mut self, room: usize) {
        let over = self.received.len().saturating_sub(room);
        for Received { token, lane, .. } in self.received.drain(..over).collect::<Vec<_>>() {
            self.ask(lane, Wish::PutBack(None), Ask { token, waiter: None });
        }
    }

    /// Takes the answer to the first request of the line that has none. True if a lease turned out to be lost.
    pub(super) fn hear(&mut self, at: usize, answer: v1::ConsumeAnswer) -> Result<bool> {
        let Some(Sent { wish, asks, .. }) = self.lines[at].sent.pop_front() else {
            return Err(Error::internal("the server answered what it was not asked"));
        };
        let lease = answer.lease.and_then(|lease| Duration::try_from(lease).ok());
        let mut is_any_lost = false;
        let outcomes = outcomes(&answer.outcomes, asks.len())?;
        for (Ask { token, waiter }, outcome) in asks.into_iter().zip(outcomes) {
            is_any_lost |= self.note(&wish, token, outcome, waiter.is_some());
            if let Some(waiter) = waiter {
                // Whoever asked may not wait any more.
                let _ = waiter.send(Answer { outcome, lease });
            }
        }
        Ok(is_any_lost)
    }

    /// What an answer says about a task. True if its lease turned out to be lost.
    fn note(&mut self, wish: &Wish, token: Token, outcome: Outcome, is_awaited: bool) -> bool {
        match wish {
            Wish::Ack | Wish::PutBack(_) => {
                self.held.remove(&token);
                self.late_acks += u64::from(*wish == Wish::Ack && outcome == Outcome::LeaseLost && !is_awaited);
                false
            }
            Wish::Heartbeat(_) if outcome == Outcome::Applied => false,
            Wish::Heartbeat(_) => match self.held.get_mut(&token) {
                Some(hold) => !mem::replace(&mut hold.is_lost, true),
                None => false,
            },
        }
    }
}
