//! Streams of deliveries: one session of a client, from its open to its end.
//!
//! A session is one task that takes one step at a time: it asks the store what its client asked for, and pops when the
//! client may have more and the stream has room. What the client asked for meanwhile waits and is then done together; acks
//! ride with the next pop. So a busy stream takes one step of the store for many tasks, and no step waits for a timer.
//!
//! How it can end, and what becomes of the leases: the client leaves, with a half-close or without (they end within the
//! grace), or the server ends it (they run out). What was not handed over goes back in every case, since it hangs on its
//! [`super::Unsent`].

mod asked;
mod drain;
mod held;
mod lanes;
mod leases;
mod messages;
mod open;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt, Stream, StreamExt};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::WaitForCancellationFuture;

pub use self::messages::{ConsumeAnswer, ConsumeCall, ConsumeMessage, ConsumeOpen, Ended, Outlet, Tokens, Unread};
use self::{
    asked::{Asked, Request},
    drain::Drain,
    held::Held,
    lanes::Lanes,
    leases::abandon,
    open::Opened,
};
use super::{Error, Queues, Unsent, limits::MAX_BATCH, uncancelled::panicked};
use crate::store::{Consumer, Outcome, Pop, RECLAIM_STEP, Release, Stem, StoreError, Token, Withdrawal};

/// The most tasks that a client may be sent before it acks some.
pub const MAX_OUTSTANDING: u32 = 10_000;

/// How long a stream may take to say what it wants.
const OPEN_WITHIN: Duration = Duration::from_secs(10);
/// The envelopes in one message have about this size at most, in bytes, unless a single one has more: it is what may be
/// leased beyond what the stream has room for.
const MESSAGE_BYTES: usize = 64 << 10;
/// Answers that wait for room on the stream; beyond it, nothing more is asked of the store.
const ANSWERS_WAITING: usize = 1_024;
/// How long an old stream goes on after it was told that it will end.
const DRAIN_FOR: Duration = Duration::from_secs(30);

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
}
