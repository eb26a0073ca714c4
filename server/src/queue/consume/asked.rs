//! What the client asked for: heard, checked, and waiting for its turn.

use std::collections::VecDeque;

use super::{ConsumeCall, Ended, Error, Session, Tokens, Unread, open};
use crate::{
    queue::limits::{self, MAX_BATCH},
    store::{Millis, PutBack, Release, Token},
};

/// What a client may have asked for that was not done: after so many requests or tokens, its stream is not read.
pub(super) const ASKED_REQUESTS: usize = 256;
const ASKED_TOKENS: usize = 2 * MAX_BATCH;

/// What the client asked for, in its order.
#[derive(Default)]
pub(super) struct Asked {
    pub(super) requests: VecDeque<Request>,
    tokens: usize,
}

pub(super) enum Request {
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
    pub(super) fn push(&mut self, request: Request) {
        self.tokens += request.tokens();
        self.requests.push_back(request);
    }

    pub(super) fn pop(&mut self) -> Option<Request> {
        let request = self.requests.pop_front()?;
        self.tokens -= request.tokens();
        Some(request)
    }

    fn is_full(&self) -> bool {
        self.requests.len() >= ASKED_REQUESTS || self.tokens >= ASKED_TOKENS
    }

    /// The acks in front that one step can take: of one queue, as one list, with how many are in each.
    pub(super) fn pop_acks(&mut self, lane: usize, first: Vec<Token>) -> (Vec<Token>, Vec<usize>) {
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

impl<O> Session<O> {
    pub(super) fn hears(&self) -> bool {
        !self.is_heard && !self.refuses && !self.asked.is_full()
    }

    /// Notes what the client said. What is not right ends the stream when all before it is answered.
    pub(super) fn hear<E>(
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
    pub(super) fn refuse(&mut self, error: Error) {
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

    /// The client is gone, and what it said last is done all the same; nobody hears the answers.
    pub(super) async fn do_what_was_heard(&mut self) {
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
}
