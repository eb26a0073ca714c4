//! Streams of deliveries: one session of a client, from its open to its end.
//!
//! A session is one task that takes one step at a time: it asks the store what its client asked for, and pops when the
//! client may have more and the stream has room. What the client asked for meanwhile waits and is then done together; acks
//! ride with the next pop. So a busy stream takes one step of the store for many tasks, and no step waits for a timer.
//!
//! How it can end, and what becomes of the leases: the client leaves, with a half-close or without (they end within the
//! grace), or the server ends it (they run out). What was not handed over goes back in every case, since it hangs on its
//! [`super::Unsent`].

mod held;
mod lanes;
mod open;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::{collections::VecDeque, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt, Stream, StreamExt};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::WaitForCancellationFuture;

use self::{held::Held, lanes::Lanes, open::Opened};
use super::{Delivery, Error, PutBackCall, Queues, Span, Unsent, limits, limits::MAX_BATCH, uncancelled::panicked};
use crate::store::{
    Consumer, Millis, Outcome, Pop, PutBack, QueueName, RECLAIM_STEP, Release, Stem, StoreError, Token, Withdrawal,
};

/// The most tasks that a client may be sent before it acks some.
pub const MAX_OUTSTANDING: u32 = 10_000;

/// How long a stream may take to say what it wants.
const OPEN_WITHIN: Duration = Duration::from_secs(10);
/// When a stream has broken, its leases end within this.
const GRACE: Duration = Duration::from_secs(2);
/// The envelopes in one message have about this size at most, in bytes, unless a single one has more: it is what may be
/// leased beyond what the stream has room for.
const MESSAGE_BYTES: usize = 64 << 10;
/// Leases are extended three times as often as they would run out, and at least so often.
const KEEP_EVERY: Duration = Duration::from_secs(20);
/// What a client may have asked for that was not done: after so many requests or tokens, its stream is not read.
const ASKED_REQUESTS: usize = 256;
const ASKED_TOKENS: usize = 2 * MAX_BATCH;
/// Answers that wait for room on the stream; beyond it, nothing more is asked of the store.
const ANSWERS_WAITING: usize = 1_024;
/// How long an old stream goes on after it was told that it will end.
const DRAIN_FOR: Duration = Duration::from_secs(30);
/// Between tries to end the leases of a broken stream.
const ABANDON_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// What a client sends.
#[derive(Debug)]
pub enum ConsumeCall {
    /// First, and only then.
    Open(ConsumeOpen),
    /// These are done.
    Ack(Tokens),
    /// These go back.
    PutBack(Tokens, PutBackCall),
    /// These go on, for so long.
    Heartbeat(Tokens, Option<Span>),
    /// How many it will hold from now on.
    MaxOutstanding(u32),
    /// A message of a newer client, or an empty one.
    Unknown,
}

/// Opens a session.
#[derive(Debug)]
pub struct ConsumeOpen {
    /// Names and weights, unchecked like the rest; weight 0 is the default.
    pub queues: Vec<(String, u32)>,
    /// Of each delivery.
    pub lease: Option<Span>,
    /// How many tasks the client will hold.
    pub max_outstanding: u32,
    /// Empty, or what names the client's work over its streams.
    pub session: Vec<u8>,
    /// For how long leases are extended.
    pub max_hold: Option<Span>,
}

/// Lease tokens of a queue; without a name, of the only one.
#[derive(Debug)]
pub struct Tokens {
    /// Unchecked like the rest.
    pub queue: String,
    /// The tokens' texts.
    pub lease_tokens: Vec<String>,
}

/// What is sent to the client at once. Any part may be missing.
#[derive(Default)]
pub struct ConsumeMessage {
    /// At the beginning: what an earlier stream held.
    pub resumed: Vec<(QueueName, Vec<Token>)>,
    /// Tasks of one queue.
    pub delivery: Option<(QueueName, Delivery)>,
    /// In the order of what was asked.
    pub answers: Vec<ConsumeAnswer>,
    /// What is with the client and is to be deleted.
    pub cancelled: Vec<(QueueName, Vec<Token>)>,
    /// The stream is about to end.
    pub drain: bool,
}

/// Answers an ack, a putback or a heartbeat.
pub struct ConsumeAnswer {
    /// One for each token, in order.
    pub outcomes: Vec<Outcome>,
    /// Of a heartbeat: what is left of the lease that ends first among those extended.
    pub lease: Option<Millis>,
}

/// Where messages go.
pub trait Outlet: Send {
    /// Waits until all that was sent has left, and there is room for a message. False: the client is cut off.
    fn clear(&self) -> impl Future<Output = bool> + Send;

    /// Sends a message; only when it is clear.
    fn send(&mut self, message: ConsumeMessage);

    /// Waits until the client is gone.
    fn gone(&self) -> impl Future<Output = ()> + Send;
}

/// A call that could not be read.
pub enum Unread<E> {
    /// The stream is broken.
    Broken,
    /// The stream ends with this when all before it is answered.
    Refused(E),
}

/// How a stream ended other than well.
pub enum Ended<E> {
    /// Nobody is there any more.
    Broken,
    /// With an error of ours.
    Failed(Error),
    /// With what the reader of calls said.
    Refused(E),
    /// The server stops.
    Stopping,
}

impl<E> From<Error> for Ended<E> {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<E> From<StoreError> for Ended<E> {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

impl Queues {
    /// Serves a stream of deliveries until it ends. To be run in a task of its own, which nobody drops.
    pub async fn consume<E>(
        &self,
        calls: impl Stream<Item = Result<ConsumeCall, Unread<E>>> + Send,
        outlet: impl Outlet,
    ) -> Result<(), Ended<E>> {
        // After a panic the stream must not end as if all was well.
        let served = AssertUnwindSafe(self.serve(calls, outlet)).catch_unwind();
        served.await.unwrap_or_else(|_| Err(Ended::Failed(panicked())))
    }

    async fn serve<E>(
        &self,
        calls: impl Stream<Item = Result<ConsumeCall, Unread<E>>> + Send,
        outlet: impl Outlet,
    ) -> Result<(), Ended<E>> {
        let mut calls = pin!(calls);
        let opened = tokio::select! {
            first = calls.next() => match first {
                Some(Ok(ConsumeCall::Open(open))) => open::check(open)?,
                Some(Ok(_)) => return Err(open::misplaced("must be the first message").into()),
                Some(Err(Unread::Broken)) => return Err(Ended::Broken),
                None => return Err(open::misplaced("is missing: the stream has ended").into()),
                Some(Err(Unread::Refused(error))) => return Err(Ended::Refused(error)),
            },
            () = sleep(OPEN_WITHIN) => {
                let late = format!("did not come within {} s; it must be the first message", OPEN_WITHIN.as_secs());
                return Err(open::misplaced(&late).into());
            }
            () = outlet.gone() => return Err(Ended::Broken),
            () = self.stopping.cancelled() => return Err(Ended::Stopping),
        };
        let mut session = Session::begin(self, opened, outlet).await?;
        let stopping = self.stopping.clone();
        let ended = session.run(calls, pin!(stopping.cancelled())).await;
        let has_left = session.is_heard || matches!(ended, Err(Ended::Broken));
        if has_left && !self.stopping.is_cancelled() {
            session.lanes.stand_up();
            session.do_what_was_heard().await;
            // The client is not kept waiting for its end.
            let Session { queues, consumer, lanes, held, .. } = session;
            self.spawn(abandon(queues, consumer, lanes, held));
        }
        ended
    }
}

struct Session<O> {
    queues: Queues,
    outlet: O,
    consumer: Consumer,
    max_hold: Duration,
    max_outstanding: usize,
    lanes: Lanes,
    held: Held,
    woken: Arc<Notify>,
    asked: Asked,
    /// What was resumed, and answers, on their way out.
    message: ConsumeMessage,
    /// All that was sent has left.
    is_clear: bool,
    /// The client will say no more.
    is_heard: bool,
    /// The client said what is not right, and is not listened to any more.
    refuses: bool,
    /// The server stops.
    stops: bool,
    keep_at: Instant,
    drain: Drain,
}

/// From its beginning to its end a stream delivers, is told that it will end, and lets its client finish.
#[derive(Clone, Copy)]
enum Drain {
    /// It delivers, until it is old.
    From(Instant),
    /// It is to be told.
    Due(Instant),
    /// It was told, and ends then at the latest.
    Until(Instant),
}

impl Drain {
    /// The same, ended by this time.
    fn by(self, end: Instant) -> Self {
        match self {
            Self::From(_) => Self::Due(end),
            Self::Due(at) => Self::Due(at.min(end)),
            Self::Until(at) => Self::Until(at.min(end)),
        }
    }
}

/// What the client asked for, in its order.
#[derive(Default)]
struct Asked {
    requests: VecDeque<Request>,
    tokens: usize,
}

enum Request {
    Ack(usize, Vec<Token>),
    PutBack(usize, PutBack),
    Heartbeat(usize, Vec<Token>, Millis),
    /// The stream ends when all before this is answered.
    Refused(Error),
}

impl Request {
    fn tokens(&self) -> usize {
        match self {
            Self::Ack(_, tokens) | Self::Heartbeat(_, tokens, _) => tokens.len(),
            Self::PutBack(_, put_back) => put_back.tokens.len(),
            Self::Refused(_) => 0,
        }
    }
}

impl Asked {
    fn push(&mut self, request: Request) {
        self.tokens += request.tokens();
        self.requests.push_back(request);
    }

    fn pop(&mut self) -> Option<Request> {
        let request = self.requests.pop_front()?;
        self.tokens -= request.tokens();
        Some(request)
    }

    fn is_full(&self) -> bool {
        self.requests.len() >= ASKED_REQUESTS || self.tokens >= ASKED_TOKENS
    }

    /// The acks in front that one step can take: of one queue, as one list, with how many are in each.
    fn pop_acks(&mut self, lane: usize, first: Vec<Token>) -> (Vec<Token>, Vec<usize>) {
        let (mut tokens, mut counts) = (first, Vec::new());
        counts.push(tokens.len());
        while let Some(Request::Ack(other, more)) = self.requests.front()
            && *other == lane
            && tokens.len() + more.len() <= MAX_BATCH
            && let Some(Request::Ack(_, more)) = self.pop()
        {
            counts.push(more.len());
            tokens.extend(more);
        }
        (tokens, counts)
    }
}

impl<O: Outlet> Session<O> {
    async fn begin(queues: &Queues, opened: Opened, outlet: O) -> Result<Self, Error> {
        let now = Instant::now();
        let mut lanes = Vec::with_capacity(opened.queues.len());
        for (queue, weight) in opened.queues {
            let lease = match opened.lease {
                Some(lease) => lease,
                None => queues.lease_of(&queue).await?,
            };
            lanes.push((queue, weight, lease));
        }
        let mut session = Self {
            queues: queues.clone(),
            outlet,
            consumer: opened.consumer,
            max_hold: opened.max_hold,
            max_outstanding: opened.max_outstanding,
            lanes: Lanes::new(lanes),
            held: Held::default(),
            woken: Arc::default(),
            asked: Asked::default(),
            message: ConsumeMessage::default(),
            is_clear: false,
            is_heard: false,
            refuses: false,
            stops: false,
            keep_at: now,
            drain: Drain::From(now + queues.limits.stream_age()),
        };
        if opened.resumes {
            session.resume().await?;
        }
        Ok(session)
    }

    /// Takes over what an earlier stream of the client held.
    async fn resume(&mut self) -> Result<(), Error> {
        let max_hold = self.max_hold.as_millis() as Millis;
        for at in 0..self.lanes.len() {
            let queue = self.lanes.queue(at).clone();
            let held = self.queues.store.resume(&queue, self.consumer, self.lanes.lease(at), max_hold).await?;
            let now = Instant::now();
            let since = |age| now.checked_sub(Duration::from_millis(age)).unwrap_or(now);
            self.held.add(at, held.iter().map(|(token, age)| (*token, since(*age))), &mut self.lanes);
            if !held.is_empty() {
                self.message.resumed.push((queue, held.into_iter().map(|(token, _)| token).collect()));
            }
        }
        Ok(())
    }

    async fn run<E>(
        &mut self,
        mut calls: impl Stream<Item = Result<ConsumeCall, Unread<E>>> + Unpin + Send,
        mut stopping: std::pin::Pin<&mut WaitForCancellationFuture<'_>>,
    ) -> Result<(), Ended<E>> {
        let mut alarm = pin!(sleep_until(self.next_alarm()));
        let mut unread = None;
        loop {
            while self.hears() {
                match calls.next().now_or_never() {
                    Some(call) => self.hear(call, &mut unread)?,
                    None => break,
                }
            }
            self.notice();
            if self.next_alarm() <= Instant::now() && self.attend().await? {
                return if self.queues.stopping.is_cancelled() { Err(Ended::Stopping) } else { Ok(()) };
            }
            if self.step().await? {
                continue;
            }
            if self.has_ended() {
                return unread.map_or_else(|| self.end(), |error| Err(Ended::Refused(error)));
            }
            let next = self.next_alarm();
            if alarm.is_elapsed() || next < alarm.deadline() {
                alarm.as_mut().reset(next);
            }
            let hears = self.hears();
            tokio::select! {
                biased;
                () = self.outlet.gone() => return Err(Ended::Broken),
                call = calls.next(), if hears => self.hear(call, &mut unread)?,
                clear = self.outlet.clear(), if !self.is_clear => match clear {
                    true => self.is_clear = true,
                    // It was told why by those who cut it off.
                    false => return Ok(()),
                },
                () = self.woken.notified() => self.note_woken(),
                () = stopping.as_mut(), if !self.stops => {}
                () = alarm.as_mut() => {}
            }
        }
    }

    /// Notices what else has happened: a client that never stops talking must not keep the session from it.
    fn notice(&mut self) {
        self.is_clear = self.is_clear || self.outlet.clear().now_or_never() == Some(true);
        if self.woken.notified().now_or_never().is_some() {
            self.note_woken();
        }
        if !self.stops && self.queues.stopping.is_cancelled() {
            self.stops = true;
            self.drain = self.drain.by(Instant::now() + self.queues.limits.grace / 2);
        }
    }

    fn note_woken(&mut self) {
        let can_take = self.delivers() && self.is_clear && self.held.len() < self.max_outstanding;
        self.lanes.note_woken(can_take);
    }

    fn hears(&self) -> bool {
        !self.is_heard && !self.refuses && !self.asked.is_full()
    }

    /// Notes what the client said. What is not right ends the stream when all before it is answered.
    fn hear<E>(
        &mut self,
        call: Option<Result<ConsumeCall, Unread<E>>>,
        unread: &mut Option<E>,
    ) -> Result<(), Ended<E>> {
        let call = match call {
            Some(Ok(call)) => call,
            Some(Err(Unread::Broken)) => return Err(Ended::Broken),
            Some(Err(Unread::Refused(error))) => {
                self.hear_no_more();
                *unread = Some(error);
                return Ok(());
            }
            None => {
                self.is_heard = true;
                self.lanes.stand_up();
                return Ok(());
            }
        };
        match self.understand(call) {
            Ok(Some(request)) => self.asked.push(request),
            Ok(None) => {}
            Err(error) => self.refuse(error),
        }
        Ok(())
    }

    /// The stream ends with this when all that was asked before is answered.
    fn refuse(&mut self, error: Error) {
        self.hear_no_more();
        self.asked.push(Request::Refused(error));
    }

    fn hear_no_more(&mut self) {
        self.refuses = true;
        self.lanes.stand_up();
    }

    fn understand(&mut self, call: ConsumeCall) -> Result<Option<Request>, Error> {
        Ok(Some(match call {
            ConsumeCall::Ack(tokens) => {
                let (lane, tokens) = self.tokens("ack.lease_tokens", &tokens)?;
                Request::Ack(lane, tokens)
            }
            ConsumeCall::PutBack(tokens, call) => {
                let (lane, tokens) = self.tokens("putback.lease_tokens", &tokens)?;
                Request::PutBack(lane, PutBack { tokens, ..call.check("putback")? })
            }
            ConsumeCall::Heartbeat(tokens, lease) => {
                let (lane, tokens) = self.tokens("heartbeat.lease_tokens", &tokens)?;
                let lease = limits::lease(lease).map_err(|invalid| invalid.within("heartbeat"))?;
                let lease = lease.unwrap_or(self.lanes.lease(lane));
                Request::Heartbeat(lane, tokens, lease)
            }
            ConsumeCall::MaxOutstanding(max) => {
                self.max_outstanding = open::max_outstanding("max_outstanding", max, 0)?;
                return Ok(None);
            }
            ConsumeCall::Open(_) => return Err(open::misplaced("is only for the first message")),
            ConsumeCall::Unknown => return Err(open::unknown()),
        }))
    }

    fn tokens(&self, field: &str, tokens: &Tokens) -> Result<(usize, Vec<Token>), Error> {
        let lane = self.lanes.find(&tokens.queue).ok_or_else(|| {
            let call = field.trim_end_matches(".lease_tokens");
            open::no_queue_of_the_stream(call, &tokens.queue)
        })?;
        limits::batch(field, tokens.lease_tokens.len(), MAX_BATCH, "tokens")?;
        Ok((lane, limits::tokens(field, &tokens.lease_tokens)?))
    }

    /// Does what the client asked for first, together with a pop if that is of the same queue; pops if that has not; and sends
    /// what there is. False if there was nothing to do.
    async fn step(&mut self) -> Result<bool, Error> {
        let mut did_any = false;
        if self.message.answers.len() < ANSWERS_WAITING
            && !matches!(self.asked.requests.front(), None | Some(Request::Refused(_)))
            && let Some(request) = self.asked.pop()
        {
            self.answer(request).await?;
            did_any = true;
        }
        if let Some(lane) = self.lane_to_pop() {
            self.pop(lane, Vec::new()).await?;
            did_any = true;
        }
        Ok(self.send() || did_any)
    }

    async fn answer(&mut self, request: Request) -> Result<(), Error> {
        match request {
            Request::Ack(lane, first) => {
                let (tokens, counts) = self.asked.pop_acks(lane, first);
                self.held.remove(lane, &tokens, &mut self.lanes);
                let outcomes = match self.lane_to_pop() {
                    Some(popped) if popped == lane => self.pop(lane, tokens).await?,
                    _ => self.queues.store.ack(self.lanes.queue(lane), &tokens).await?,
                };
                let mut outcomes = outcomes.into_iter();
                for count in counts {
                    let outcomes = outcomes.by_ref().take(count).collect();
                    self.message.answers.push(ConsumeAnswer { outcomes, lease: None });
                }
            }
            Request::PutBack(lane, put_back) => {
                self.held.remove(lane, &put_back.tokens, &mut self.lanes);
                let (outcomes, _) = self.queues.release(self.lanes.queue(lane), Release::PutBack(put_back)).await?;
                self.message.answers.push(ConsumeAnswer { outcomes, lease: None });
            }
            Request::Heartbeat(lane, tokens, lease) => {
                let beaten = self.queues.store.heartbeat(self.lanes.queue(lane), &tokens, Some(lease)).await?;
                self.note_cancelled(lane, beaten.cancelled);
                self.held.remove_lost(lane, &tokens, &beaten.outcomes, &mut self.lanes);
                let left = beaten.earliest.map(|(left, _)| left);
                self.message.answers.push(ConsumeAnswer { outcomes: beaten.outcomes, lease: left });
            }
            Request::Refused(error) => return Err(error),
        }
        Ok(())
    }

    /// Which queue to pop, if the client may have more and the stream has room for it.
    fn lane_to_pop(&mut self) -> Option<usize> {
        let has_room = self.held.len() < self.max_outstanding;
        self.lanes.note_room(has_room);
        let wants = self.delivers() && self.message.delivery.is_none() && has_room;
        if wants && self.is_clear { self.lanes.next() } else { None }
    }

    fn delivers(&self) -> bool {
        !self.is_heard && !self.refuses && matches!(self.drain, Drain::From(_))
    }

    /// Acks and pops. What was popped waits in the message.
    async fn pop(&mut self, at: usize, acks: Vec<Token>) -> Result<Vec<Outcome>, Error> {
        let room = self.max_outstanding - self.held.len();
        let max_tasks = self.lanes.share(at, room).min(RECLAIM_STEP);
        let (queue, stem) = (self.lanes.queue(at).clone(), Stem::mint()?);
        let pop = Pop {
            acks,
            max_tasks,
            max_bytes: MESSAGE_BYTES,
            lease: Some(self.lanes.lease(at)),
            stem,
            request: None,
            will_wait: self.lanes.is_seated(at),
            consumer: Some(self.consumer),
            spent: self.lanes.take_spent(at),
        };
        let lease = Duration::from_millis(self.lanes.lease(at));
        let popped = match self.queues.store.pop(&queue, pop).await {
            Ok(popped) => popped,
            Err(error) => {
                if matches!(error, StoreError::Unavailable { did_not_run: false, .. }) {
                    let withdrawal = Withdrawal { stem, max_tasks, request: None };
                    drop(Unsent::unanswered(&self.queues, &queue, withdrawal, lease));
                }
                return Err(error.into());
            }
        };
        if popped.taken_over {
            // Whatever it was woken for is for others.
            self.queues.waits.wake(&queue, usize::try_from(popped.reclaimed).unwrap_or(usize::MAX).max(1));
            self.refuse(Error::SessionTakenOver);
            return Ok(popped.acks);
        }
        if popped.reclaimed > 0 && popped.ready > 0 {
            self.queues.waits.wake(&queue, usize::try_from(popped.ready).unwrap_or(usize::MAX));
        }
        let due = popped.due_in.map(|due_in| Instant::now() + Duration::from_millis(due_in));
        self.lanes.note_popped(at, popped.tasks.len(), popped.ready > 0, &self.queues.waits, &self.woken);
        if let Some(due) = due {
            self.queues.waits.look_at(&queue, due);
        }
        if let Some(delivery) = self.queues.deliver(&queue, popped.tasks, None, lease)? {
            let now = Instant::now();
            if self.held.is_empty() {
                self.keep_at = now + self.keep_every();
            }
            self.held.add(at, delivery.tasks.iter().map(|task| (task.token, now)), &mut self.lanes);
            self.message.delivery = Some((queue, delivery));
        }
        Ok(popped.acks)
    }

    /// The client is gone, and what it said last is done all the same; nobody hears the answers.
    async fn do_what_was_heard(&mut self) {
        while let Some(request) = self.asked.pop() {
            let done = match request {
                Request::Ack(lane, tokens) => {
                    self.held.remove(lane, &tokens, &mut self.lanes);
                    self.queues.store.ack(self.lanes.queue(lane), &tokens).await.map(drop)
                }
                Request::PutBack(lane, put_back) => {
                    self.held.remove(lane, &put_back.tokens, &mut self.lanes);
                    self.queues.release(self.lanes.queue(lane), Release::PutBack(put_back)).await.map(drop)
                }
                Request::Heartbeat(..) | Request::Refused(_) => continue,
            };
            if let Err(error) = done {
                return tracing::debug!(%error, "what the client of a broken stream said last was not done");
            }
        }
    }

    /// Sends what there is, if the stream has room. True if that was something.
    fn send(&mut self) -> bool {
        if !self.is_clear {
            return false;
        }
        if let Drain::Due(until) = self.drain {
            self.drain = Drain::Until(until);
            self.lanes.stand_up();
            self.message.drain = true;
        }
        let ConsumeMessage { resumed, delivery, answers, cancelled, drain } = &self.message;
        if resumed.is_empty() && delivery.is_none() && answers.is_empty() && cancelled.is_empty() && !drain {
            return false;
        }
        self.is_clear = false;
        self.outlet.send(std::mem::take(&mut self.message));
        true
    }

    /// All was said and answered, and nothing more will come.
    fn has_ended(&self) -> bool {
        let is_finished =
            self.is_heard || self.refuses || (matches!(self.drain, Drain::Until(_)) && self.held.is_empty());
        let only_refused = matches!(self.asked.requests.front(), None | Some(Request::Refused(_)));
        is_finished && only_refused && self.is_clear && self.message.answers.is_empty()
    }

    fn end<E>(&mut self) -> Result<(), Ended<E>> {
        match self.asked.pop() {
            Some(Request::Refused(error)) => Err(Ended::Failed(error)),
            _ => Ok(()),
        }
    }

    /// The client is told of tasks that are to be deleted, each time its leases are extended, until they are gone.
    fn note_cancelled(&mut self, lane: usize, mut tokens: Vec<Token>) {
        let queue = self.lanes.queue(lane);
        tokens.retain(|token| !self.message.cancelled.iter().any(|(_, told)| told.contains(token)));
        if !tokens.is_empty() {
            self.message.cancelled.push((queue.clone(), tokens));
        }
    }

    fn keep_every(&self) -> Duration {
        keep_every(self.lanes.shortest_lease())
    }

    fn next_alarm(&self) -> Instant {
        let end = match self.drain {
            Drain::From(at) | Drain::Due(at) | Drain::Until(at) => at,
        };
        if self.held.is_empty() || self.refuses { end } else { end.min(self.keep_at) }
    }

    /// Does what it is time for. True if it is time to end.
    async fn attend(&mut self) -> Result<bool, Error> {
        let now = Instant::now();
        match self.drain {
            Drain::From(at) if at <= now => self.drain = Drain::Due(now + DRAIN_FOR),
            Drain::Due(at) | Drain::Until(at) if at <= now => return Ok(true),
            _ => {}
        }
        if !self.held.is_empty() && !self.refuses && self.keep_at <= now {
            self.keep(now).await?;
            self.keep_at = now + self.keep_every();
        }
        Ok(false)
    }

    /// Extends the leases that would not last until the next time twice over. Of those that are held longer than the stream
    /// should, the store is only asked whether they are still held.
    async fn keep(&mut self, now: Instant) -> Result<(), Error> {
        let next_round = now + self.keep_every();
        for at in 0..self.lanes.len() {
            let every = keep_every(self.lanes.lease(at));
            // The others are not extended at the pace of the shortest lease.
            if !self.lanes.is_to_be_kept(at, now, every, next_round) {
                continue;
            }
            let fresh_since = now.checked_sub(every);
            let aged = |since: Instant| fresh_since.is_some_and(|fresh| since <= fresh);
            let (extended, asked) = self.held.of_lane(at, aged, |since| now - since < self.max_hold);
            for (tokens, lease) in [(extended, self.lanes.lease(at)), (asked, 0)] {
                for tokens in tokens.chunks(MAX_BATCH) {
                    let kept = self.queues.store.keep(self.lanes.queue(at), self.consumer, tokens, lease).await?;
                    let Some(kept) = kept else {
                        self.refuse(Error::SessionTakenOver);
                        return Ok(());
                    };
                    self.held.remove_lost(at, tokens, &kept.outcomes, &mut self.lanes);
                    self.note_cancelled(at, kept.cancelled);
                }
            }
        }
        Ok(())
    }
}

fn keep_every(lease: Millis) -> Duration {
    (Duration::from_millis(lease) / 3).min(KEEP_EVERY)
}

/// The client is gone: its tasks go back when the grace is over, unless another stream of its session has come. Tries until
/// the store did it, or the leases ran out, or the server stops.
async fn abandon(queues: Queues, consumer: Consumer, lanes: Lanes, held: Held) {
    let began = Instant::now();
    let end = began + GRACE;
    for at in 0..lanes.len() {
        let give_up = began + Duration::from_millis(lanes.lease(at));
        let (tokens, _) = held.of_lane(at, |_| true, |_| true);
        let queue = lanes.queue(at);
        let mut steps = tokens.chunks(MAX_BATCH);
        let mut step = steps.next();
        while let Some(tokens) = step {
            let left = end.saturating_duration_since(Instant::now()).as_millis() as Millis;
            match queues.store.abandon(queue, consumer, tokens, left).await {
                Ok(()) => {
                    queues.waits.look_at(queue, end);
                    step = steps.next();
                }
                Err(StoreError::Unavailable { .. } | StoreError::Overloaded(_))
                    if Instant::now() < give_up && !queues.stopping.is_cancelled() =>
                {
                    sleep(ABANDON_AGAIN_AFTER).await;
                }
                Err(error) => {
                    tracing::warn!(%error, ?queue, "could not end the leases of a broken stream; they will run out");
                    break;
                }
            }
        }
    }
}
