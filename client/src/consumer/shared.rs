//! What a consumer holds and has asked for, shared by its handle, its tasks and the task behind them that owns the streams.
//!
//! Whoever wants something of the server notes it here and goes on; a stream takes what waits when it has room, so what
//! waits together goes together. What was sent is kept until its answer comes. If the stream ends before, it waits again.

use std::{
    convert::Infallible,
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use data_queue_proto::v1::{self, consume_request::Request};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    lane::{Answer, Ask, Wish},
    line::{Line, Role, Sent},
    state::{End, Received, State, keep_every},
    token::{FENCE, Token},
};
use crate::{Error, Result};

/// The longest that a damaged task is kept from coming again.
const LONGEST_REST: Duration = Duration::from_secs(60);

pub(super) struct Shared {
    state: Mutex<State>,
    /// A lease was lost, a task was cancelled, a damaged one has come, a stream has broken, or an end.
    changed: Notify,
}

impl Shared {
    pub(super) fn new(queues: impl Iterator<Item = String>, max_outstanding: u32, max_hold: Duration) -> Self {
        Self { state: Mutex::new(State::new(queues, max_outstanding, max_hold)), changed: Notify::new() }
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

    /// Waits until the task is known to be cancelled or lost, or is settled.
    pub(super) async fn over(&self, token: Token, is_settled: &AtomicBool) {
        let is_over =
            |state: &State| is_settled.load(Ordering::Acquire) || state.is_cancelled(token) || state.is_lost(token);
        self.until(|state| is_over(state).then_some(())).await;
    }

    /// Lets those who wait look again.
    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Why a stream has broken, or could not be opened, since this was last asked.
    pub(super) async fn broken(&self) -> Error {
        loop {
            let changed = self.changed.notified();
            let broken = self.state().broken.take();
            match broken {
                Some(error) => return error,
                None => changed.await,
            }
        }
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

    /// A stream has broken, or could not be opened.
    pub(super) fn note_break(&self, error: &Error) {
        self.state().broken = Some(error.again());
        self.changed.notify_waiters();
    }

    /// Adds a stream, opened with the `max_outstanding` that it answers.
    pub(super) fn add_line(&self, id: u64) -> u32 {
        let mut state = self.state();
        // The least that a stream may be opened with is 1. What is really wanted is said behind it.
        let told = state.wanted().max(1);
        state.lines.push(Line::new(id, told));
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
