//! What a consumer holds and has asked for, shared by its handle, its tasks and the task behind them that owns the streams.
//!
//! Whoever wants something of the server notes it here and goes on; a stream takes what waits when it has room, so what
//! waits together goes together. What was sent is kept until its answer comes. If the stream ends before, it waits again.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use data_queue_proto::v1::{self, consume_request::Request};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    Error, Outcome, Putback, Result,
    client::{duration, outcomes},
    task::hex,
};

/// The most tokens of one request.
const MAX_BATCH: usize = 1_000;
/// Nobody's token: a heartbeat for it changes nothing, and its answer tells that all before it was heard.
const FENCE: Token = Token(0);
/// What the server does not extend is extended three times a lease, and at least so often.
const KEEP_EVERY: Duration = Duration::from_secs(20);
/// The longest that a damaged task is kept from coming again.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// A lease token. Its text is 32 hex characters; so it is small, and a list of them is one piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Token(u128);

impl Token {
    fn parse(text: &str) -> Result<Self> {
        let digits = text.chars().try_fold(0, |value, digit| Some(value << 4 | u128::from(digit.to_digit(16)?)));
        let token = digits.filter(|_| text.len() == 32).map(Self);
        token.ok_or_else(|| Error::internal("the server sent a lease token that is not 32 hex characters"))
    }

    fn text(self) -> String {
        hex(&self.0.to_be_bytes())
    }
}

/// What the holder of a task wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Ack,
    /// As these options say; at once and to the head if there are none.
    PutBack(Option<Arc<Putback>>),
    /// For so long; unless it is said, as long as the stream's leases are.
    Heartbeat(Option<Duration>),
}

/// What became of it.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) lease: Option<Duration>,
}

struct Ask {
    token: Token,
    waiter: Option<oneshot::Sender<Answer>>,
}

impl Ask {
    /// Somebody waited for the answer, and does no more.
    fn is_forgotten(&self) -> bool {
        self.waiter.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// One request, as it was sent.
struct Sent {
    lane: usize,
    wish: Wish,
    asks: Vec<Ask>,
}

/// A queue, and what is to be said about its tasks.
struct Lane {
    queue: String,
    acks: Vec<Ask>,
    put_backs: VecDeque<(Option<Arc<Putback>>, Ask)>,
    heartbeats: Vec<(Option<Duration>, Ask)>,
}

impl Lane {
    fn push(&mut self, wish: Wish, ask: Ask) {
        match wish {
            Wish::Ack => self.acks.push(ask),
            Wish::PutBack(options) => self.put_backs.push_back((options, ask)),
            Wish::Heartbeat(lease) => {
                // Before the list grows, what nobody waits for any more goes: a holder may ask as often as it likes.
                if self.heartbeats.len() == self.heartbeats.capacity() {
                    self.heartbeats.retain(|(_, ask)| !ask.is_forgotten());
                }
                self.heartbeats.push((lease, ask));
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.acks.is_empty() && self.put_backs.is_empty() && self.heartbeats.is_empty()
    }

    /// As much of what waits as fits in one request.
    fn pop(&mut self) -> Option<(Wish, Vec<Ask>)> {
        if !self.acks.is_empty() {
            return Some((Wish::Ack, take_batch(&mut self.acks)));
        }
        if let Some((lease, _)) = self.heartbeats.first() {
            let lease = *lease;
            let mut asks = Vec::new();
            for (other, ask) in mem::take(&mut self.heartbeats) {
                if other == lease && asks.len() < MAX_BATCH {
                    asks.push(ask);
                } else {
                    self.heartbeats.push((other, ask));
                }
            }
            return Some((Wish::Heartbeat(lease), asks));
        }
        // Only those that are put back alike go together, and all of them in their order.
        let options = self.put_backs.front()?.0.clone();
        let alike = self.put_backs.iter().take(MAX_BATCH).take_while(|(other, _)| *other == options).count();
        let asks = self.put_backs.drain(..alike).map(|(_, ask)| ask).collect();
        Some((Wish::PutBack(options), asks))
    }
}

fn take_batch(asks: &mut Vec<Ask>) -> Vec<Ask> {
    let rest = asks.split_off(asks.len().min(MAX_BATCH));
    mem::replace(asks, rest)
}

/// A task that was delivered, and whose end the server has not confirmed.
struct Hold {
    lane: usize,
    /// The last stream that delivered it or took it over: that one extends its lease.
    line: u64,
    since: Instant,
    /// Its ack or putback is on its way.
    is_settling: bool,
    is_lost: bool,
    /// An operator deleted the task.
    is_cancelled: bool,
}

/// A stream, from this side.
struct Line {
    id: u64,
    role: Role,
    waker: Option<Waker>,
    /// The `max_outstanding` that the server knows.
    told: u32,
    /// The server was asked for a sign that it has heard that no more tasks are wanted.
    is_fenced: bool,
    /// Its first message has come.
    is_heard: bool,
    sent: VecDeque<Sent>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Not known to be open yet.
    Opening,
    /// What waits is sent on it.
    Speaking,
    /// Its answers are waited for.
    Silent,
    /// All was said.
    Closed,
}

enum End {
    Well,
    Failed { error: Error, is_told: bool },
}

/// A task that has come, and what its holder needs to know besides.
pub(super) struct Received {
    pub(super) task: v1::Task,
    pub(super) token: Token,
    pub(super) lane: usize,
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// A lease was lost, a task was cancelled, a damaged one has come, or an end.
    changed: Notify,
}

struct State {
    lanes: Vec<Lane>,
    held: HashMap<Token, Hold>,
    received: VecDeque<Received>,
    /// What arrived damaged, and when it is put back.
    damaged: VecDeque<(Instant, usize, Token)>,
    /// More than this is not received without some of it being lost.
    room: usize,
    max_outstanding: u32,
    max_hold: Duration,
    /// Of the latest task.
    lease: Duration,
    lines: Vec<Line>,
    reader: Option<Waker>,
    is_closing: bool,
    late_acks: u64,
    end: Option<End>,
}

impl Shared {
    pub(super) fn new(queues: impl Iterator<Item = String>, max_outstanding: u32, max_hold: Duration) -> Self {
        let lane = |queue| Lane { queue, acks: Vec::new(), put_backs: VecDeque::new(), heartbeats: Vec::new() };
        let state = State {
            lanes: queues.map(lane).collect(),
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
            end: None,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What the handle does.

    /// The next task; `None` at the end.
    pub(super) fn poll_received(&self, context: &mut Context<'_>) -> Poll<Option<Result<Received>>> {
        let mut state = self.state();
        if let Some(received) = state.received.pop_front() {
            return Poll::Ready(Some(Ok(received)));
        }
        match &mut state.end {
            Some(End::Failed { error, is_told }) => {
                let is_new = !mem::replace(is_told, true);
                Poll::Ready(is_new.then(|| Err(error.again())))
            }
            Some(End::Well) => Poll::Ready(None),
            None => {
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn set_max_outstanding(&self, max_outstanding: u32) {
        let mut state = self.state();
        state.max_outstanding = max_outstanding;
        state.wake_speaker();
    }

    /// No more tasks are wanted; those that nobody has taken go back.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closing = true;
        state.shorten_received(0);
        state.put_back_damaged(None);
        state.wake_speaker();
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits for the end, and answers how it was.
    pub(super) async fn ended(&self) -> Result<()> {
        self.until(|state| match &state.end {
            None => None,
            Some(End::Well) => Some(Ok(())),
            Some(End::Failed { error, .. }) => Some(Err(error.again())),
        })
        .await
    }

    pub(super) fn late_acks(&self) -> u64 {
        self.state().late_acks
    }

    // What the holder of a task does.

    /// Notes what is wanted, without waiting for an answer.
    pub(super) fn tell(&self, lane: usize, token: Token, wish: Wish) {
        self.state().ask(lane, wish, Ask { token, waiter: None });
    }

    /// Puts a damaged task back after about a lease. At once, it would only come again at once.
    pub(super) fn rest(&self, lane: usize, token: Token) {
        let mut state = self.state();
        let until = Instant::now() + state.lease.min(LONGEST_REST);
        state.damaged.push_back((until, lane, token));
        drop(state);
        self.changed.notify_waiters();
    }

    /// Notes what is wanted; the answer comes later.
    pub(super) fn ask(&self, lane: usize, token: Token, wish: Wish) -> oneshot::Receiver<Answer> {
        let (waiter, answer) = oneshot::channel();
        self.state().ask(lane, wish, Ask { token, waiter: Some(waiter) });
        answer
    }

    /// Waits for an answer. None will come if the consumer has ended.
    pub(super) async fn answer(&self, answer: oneshot::Receiver<Answer>) -> Result<Answer> {
        match answer.await {
            Ok(answer) => Ok(answer),
            Err(_) => match &self.state().end {
                Some(End::Failed { error, .. }) => Err(error.again()),
                _ => Err(Error::internal("the consumer has ended")),
            },
        }
    }

    pub(super) fn is_lost(&self, token: Token) -> bool {
        self.state().is_lost(token)
    }

    pub(super) fn is_cancelled(&self, token: Token) -> bool {
        self.state().is_cancelled(token)
    }

    /// Waits until the task is known to be cancelled.
    pub(super) async fn cancelled(&self, token: Token) {
        self.until(|state| state.is_cancelled(token).then_some(())).await;
    }

    /// Waits until the lease is known to be lost, without asking.
    pub(super) async fn lost(&self, token: Token) {
        self.until(|state| state.is_lost(token).then_some(())).await;
    }

    /// Waits until there is something.
    async fn until<T>(&self, mut look: impl FnMut(&State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look(&self.state()) {
                return found;
            }
            changed.await;
        }
    }

    // What the task behind them does.

    pub(super) fn is_closing(&self) -> bool {
        self.state().is_closing
    }

    /// Adds a stream, opened with the `max_outstanding` that it answers.
    pub(super) fn add_line(&self, id: u64) -> u32 {
        let mut state = self.state();
        // The least that a stream may be opened with is 1. What is really wanted is said behind it.
        let told = state.wanted().max(1);
        let line = Line {
            id,
            role: Role::Opening,
            waker: None,
            told,
            is_fenced: false,
            is_heard: false,
            sent: VecDeque::new(),
        };
        state.lines.push(line);
        told
    }

    /// What is wanted is said on this stream from now on.
    pub(super) fn speak(&self, id: u64) {
        let mut state = self.state();
        if !state.held.is_empty() {
            // The first message tells what was taken over. Nothing may be said for long, so it is asked for.
            state.lanes[0].push(Wish::Heartbeat(None), Ask { token: FENCE, waiter: None });
        }
        state.set_role(id, Role::Speaking);
    }

    /// Nothing more is said on this stream.
    pub(super) fn silence(&self, id: u64) {
        self.state().set_role(id, Role::Silent);
    }

    /// Whether all that was said on this stream was answered.
    pub(super) fn is_answered(&self, id: u64) -> bool {
        self.state().lines.iter().find(|line| line.id == id).is_none_or(|line| line.sent.is_empty())
    }

    /// The stream has ended: what was not answered is said again on the next one.
    pub(super) fn remove_line(&self, id: u64) {
        let mut state = self.state();
        let Some(at) = state.lines.iter().position(|line| line.id == id) else { return };
        let line = state.lines.swap_remove(at);
        for Sent { lane, wish, asks } in line.sent {
            for ask in asks {
                // What was only asked to hear something would be answered too late to matter.
                if !matches!((&wish, &ask.waiter), (Wish::Heartbeat(_), None)) {
                    state.lanes[lane].push(wish.clone(), ask);
                }
            }
        }
        state.wake_speaker();
        if let Some(waker) = line.waker {
            waker.wake();
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// The next request for the stream; `None` when all was said, or the stream is gone.
    pub(super) fn poll_request(&self, id: u64, context: &mut Context<'_>) -> Poll<Option<Request>> {
        let mut state = self.state();
        let Some(at) = state.lines.iter().position(|line| line.id == id) else { return Poll::Ready(None) };
        match state.lines[at].role {
            Role::Closed => return Poll::Ready(None),
            Role::Speaking => {
                if let Some(request) = state.next_request(at) {
                    return Poll::Ready(Some(request));
                }
                if state.is_finished() {
                    state.lines[at].role = Role::Closed;
                    return Poll::Ready(None);
                }
            }
            Role::Opening | Role::Silent => {}
        }
        state.lines[at].waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// Takes a message of a stream. Answers whether it was the first one.
    pub(super) fn receive(&self, id: u64, message: v1::ConsumeResponse) -> Result<bool> {
        let mut state = self.state();
        let Some(at) = state.lines.iter().position(|line| line.id == id) else { return Ok(false) };
        let is_first = !mem::replace(&mut state.lines[at].is_heard, true);
        if is_first {
            state.resume(id, message.resumed)?;
        }
        let mut is_any_lost = false;
        for answer in message.answers {
            is_any_lost |= state.hear(at, answer)?;
        }
        for task in message.tasks {
            state.deliver(id, task)?;
        }
        let is_any_cancelled = state.cancel(message.cancel)?;
        if state.is_closing {
            state.shorten_received(0);
        }
        let room = state.room;
        state.shorten_received(room);
        if is_first || state.is_closing {
            state.wake_speaker();
        }
        let reader = if state.received.is_empty() { None } else { state.reader.take() };
        let is_closing = state.is_closing;
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        if is_any_lost || is_any_cancelled || is_closing {
            self.changed.notify_waiters();
        }
        Ok(is_first)
    }

    /// Extends what is held and was not taken over by the stream that lives: the server has forgotten whose it is, as it may
    /// when it was started again. The answers tell what is lost. Answers when to do so again, if there is anything.
    pub(super) fn keep(&self, id: u64) -> Option<Instant> {
        let mut state = self.state();
        let now = Instant::now();
        let State { held, lanes, max_hold, .. } = &mut *state;
        let mut is_any = false;
        for (token, hold) in held.iter() {
            if hold.line != id && !hold.is_settling && !hold.is_lost && now < hold.since + *max_hold {
                lanes[hold.lane].push(Wish::Heartbeat(None), Ask { token: *token, waiter: None });
                is_any = true;
            }
        }
        state.wake_speaker();
        is_any.then(|| now + keep_every(state.lease))
    }

    /// Puts back what arrived damaged when it has rested. Never ends.
    pub(super) async fn put_back_rested(&self) -> Infallible {
        loop {
            sleep_until(self.until(|state| state.damaged.front().map(|(until, ..)| *until)).await).await;
            self.state().put_back_damaged(Some(Instant::now()));
        }
    }

    /// Waits until all is done that was to be done before the end, and there is no stream to say farewell on.
    pub(super) async fn finished(&self) {
        self.until(|state| {
            let speaks = |line: &Line| matches!(line.role, Role::Speaking | Role::Closed);
            (state.is_finished() && !state.lines.iter().any(speaks)).then_some(())
        })
        .await;
    }

    pub(super) fn is_finished(&self) -> bool {
        self.state().is_finished()
    }

    /// The end. Only the first one counts.
    pub(super) fn end(&self, ended: Result<()>) {
        let mut state = self.state();
        if state.end.is_some() {
            return;
        }
        state.end = Some(match ended {
            Ok(()) => End::Well,
            Err(error) => End::Failed { error, is_told: false },
        });
        state.received.clear();
        let unanswered = state.lines.drain(..).flat_map(|line| line.sent).map(|sent| (sent.wish, sent.asks));
        let mut untold: Vec<_> = unanswered.collect();
        for lane in &mut state.lanes {
            untold.extend(std::iter::from_fn(|| lane.pop()));
        }
        let acks = untold.iter().filter(|(wish, _)| *wish == Wish::Ack).flat_map(|(_, asks)| asks);
        state.late_acks += acks.filter(|ask| ask.waiter.is_none()).count() as u64;
        let reader = state.reader.take();
        drop(state);
        // Those who wait find the end when their answer cannot come any more.
        drop(untold);
        if let Some(reader) = reader {
            reader.wake();
        }
        self.changed.notify_waiters();
    }
}

/// How often a lease of this length is extended.
pub(super) fn keep_every(lease: Duration) -> Duration {
    (lease / 3).clamp(Duration::from_millis(30), KEEP_EVERY)
}

impl State {
    fn wanted(&self) -> u32 {
        if self.is_closing { 0 } else { self.max_outstanding }
    }

    fn is_lost(&self, token: Token) -> bool {
        matches!(self.end, Some(End::Failed { .. })) || self.held.get(&token).is_some_and(|hold| hold.is_lost)
    }

    fn is_cancelled(&self, token: Token) -> bool {
        self.held.get(&token).is_some_and(|hold| hold.is_cancelled)
    }

    /// The handle is closed, and nothing is held, to be said or to be answered.
    fn is_finished(&self) -> bool {
        self.is_closing
            && self.held.is_empty()
            && self.lanes.iter().all(Lane::is_idle)
            && self.lines.iter().all(|line| line.sent.is_empty())
    }

    fn set_role(&mut self, id: u64, role: Role) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.id == id) {
            line.role = role;
        }
        self.wake_speaker();
    }

    fn wake_speaker(&mut self) {
        let speakers = self.lines.iter_mut().filter(|line| line.role == Role::Speaking);
        speakers.filter_map(|line| line.waker.take()).for_each(Waker::wake);
    }

    fn ask(&mut self, lane: usize, wish: Wish, ask: Ask) {
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
    fn next_request(&mut self, at: usize) -> Option<Request> {
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
    fn resume(&mut self, id: u64, resumed: Vec<v1::ResumedQueue>) -> Result<()> {
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

    fn deliver(&mut self, line: u64, task: v1::Task) -> Result<()> {
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
    fn cancel(&mut self, cancelled: Vec<v1::CancelledTasks>) -> Result<bool> {
        let mut is_news = false;
        for token in cancelled.iter().flat_map(|tasks| &tasks.lease_tokens) {
            if let Some(hold) = self.held.get_mut(&Token::parse(token)?) {
                is_news |= !mem::replace(&mut hold.is_cancelled, true);
            }
        }
        Ok(is_news)
    }

    /// Gives back what arrived damaged: what has rested by now, or all.
    fn put_back_damaged(&mut self, now: Option<Instant>) {
        while let Some(&(until, lane, token)) = self.damaged.front()
            && now.is_none_or(|now| until <= now)
        {
            self.damaged.pop_front();
            self.ask(lane, Wish::PutBack(None), Ask { token, waiter: None });
        }
    }

    /// Gives back the oldest tasks that nobody has taken. There are too many only if the server takes some for lost.
    fn shorten_received(&mut self, room: usize) {
        let over = self.received.len().saturating_sub(room);
        for Received { token, lane, .. } in self.received.drain(..over).collect::<Vec<_>>() {
            self.ask(lane, Wish::PutBack(None), Ask { token, waiter: None });
        }
    }

    /// Takes the answer to the first request of the line that has none. True if a lease turned out to be lost.
    fn hear(&mut self, at: usize, answer: v1::ConsumeAnswer) -> Result<bool> {
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
