//! A worker whose tasks come over a `Consume` stream, with habits: it leaves its streams in every way and comes back, with
//! the same session or a new one. It writes down what it asks for and what it is told.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use data_queue_proto::{
    reason,
    v1::{
        ConsumeAck, ConsumeAnswer, ConsumeHeartbeat, ConsumeOpen, ConsumePutback, ConsumeRequest, ConsumeResponse,
        Outcome, Task, consume_request::Request,
    },
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    load::Load,
    random::Random,
    recorder::{Answer, Intent},
    worker::{Held, PAST_THE_LEASE, REFUSALS, WAIT, Worker},
};
use crate::support::{
    call::{duration, outcomes, proto},
    consume::{open, request},
    status::Details,
};

const MOST_OUTSTANDING: u64 = 20;
/// Of this many times the plan's lease, some streams have theirs: then it is the grace that ends what they leave behind.
const LONG: u32 = 4;

/// What happens between two messages of a stream, of a thousand times.
const DROP: u64 = 30;
const HALF_CLOSE: u64 = 20;
const FENCE: u64 = 200;
/// How often acks go beside the stream.
const ACK_BESIDE: u64 = 200;
/// How often a further stream has a session of its own.
const NEW_SESSION: u64 = 300;

/// The worker, between two streams.
pub struct StreamWorker {
    load: Arc<Load>,
    /// For what it asks beside its stream, and for the connections.
    beside: Worker,
    random: Random,
    session: u64,
    /// Acks that are due, or were not answered.
    done: Vec<Held>,
}

/// How a stream came to its end.
enum End {
    /// The worker let go of it at this moment.
    Left(Duration),
    /// Somebody else ended it: that starts no grace.
    Ended,
}

/// A stream, and what it was asked.
struct Stream {
    outbox: Option<mpsc::Sender<ConsumeRequest>>,
    inbox: Streaming<ConsumeResponse>,
    session: u64,
    max_outstanding: u32,
    lease: Duration,
    opened: Duration,
    /// What comes from now on was leased after this.
    fence: Duration,
    asked: VecDeque<Asked>,
    /// Every token that may count as sent on it.
    tokens: BTreeSet<String>,
    tasks: Vec<Task>,
    resumed: Vec<String>,
    drained: bool,
    /// When the worker said that it will say no more.
    closed: Option<Duration>,
}

struct Asked {
    intent: Intent,
    held: Vec<Held>,
    sent: Duration,
}

impl StreamWorker {
    pub fn new(load: Arc<Load>, beside: Worker, mut random: Random) -> Self {
        let session = random.below(u64::MAX);
        Self { load, beside, random, session, done: Vec::new() }
    }

    pub async fn work(mut self) {
        while !self.load.done() {
            if self.random.chance(NEW_SESSION) {
                self.session = self.random.below(u64::MAX);
            }
            let Some(mut stream) = self.open().await else {
                self.beside.turn();
                continue;
            };
            let end = self.follow(&mut stream).await;
            self.leave(stream, end);
            if self.random.chance(500) {
                self.beside.turn();
            }
        }
        self.beside.ack(&std::mem::take(&mut self.done)).await;
    }

    async fn open(&mut self) -> Option<Stream> {
        let lease = self.load.plan.lease * if self.random.chance(500) { LONG } else { 1 };
        let max_outstanding = 1 + u32::try_from(self.random.below(MOST_OUTSTANDING)).unwrap();
        let session = self.session.to_be_bytes().repeat(2).into();
        let open = ConsumeOpen { lease: Some(proto(lease)), session, ..open(&self.load.queue, max_outstanding) };
        let (outbox, outgoing) = mpsc::channel(1_024);
        outbox.try_send(request(Request::Open(open))).expect("room");
        let fence = self.load.recorder.now();
        let (inbox, _) = self.load.answer(self.beside.client().consume(ReceiverStream::new(outgoing))).await?;
        self.load.met(|met| met.streams += 1);
        let (asked, tokens, tasks, resumed) = Default::default();
        Some(Stream {
            outbox: Some(outbox),
            inbox,
            session: self.session,
            max_outstanding,
            lease,
            opened: fence,
            fence,
            asked,
            tokens,
            tasks,
            resumed,
            drained: false,
            closed: None,
        })
    }

    /// Works on what comes until the stream ends or is left.
    async fn follow(&mut self, stream: &mut Stream) -> End {
        // What is due from the stream before comes first here, or beside.
        self.ack(stream).await;
        let mut abandoned = false;
        loop {
            match self.read(stream).await {
                Ok(true) => {}
                Err(()) => return stream.ended(),
                Ok(false) if self.load.done() || abandoned || stream.drained || self.random.chance(300) => {
                    return self.finish(stream).await;
                }
                Ok(false) => {}
            }
            self.put_unknown_back(stream);
            abandoned |= self.treat(stream).await;
            if self.random.chance(DROP) {
                return End::Left(self.load.recorder.now());
            }
            self.ack(stream).await;
            if self.random.chance(HALF_CLOSE) {
                return self.finish(stream).await;
            }
            if self.random.chance(FENCE) && self.fence(stream).await.is_err() {
                return stream.ended();
            }
        }
    }

    /// Reads one message; false if none came for a while.
    async fn read(&mut self, stream: &mut Stream) -> Result<bool, ()> {
        let message = match timeout(WAIT, stream.inbox.message()).await {
            Err(_) => return Ok(false),
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return Err(()),
            Ok(Err(status)) => {
                if status.reason().as_deref() == Some(reason::SESSION_TAKEN_OVER) {
                    // By one that the worker had left, whose open was done late.
                    stream.closed = Some(stream.opened);
                } else {
                    self.load.failed(&status);
                }
                return Err(());
            }
        };
        let at = self.load.recorder.now();
        stream.drained |= message.drain;
        for token in message.resumed.into_iter().flat_map(|queue| queue.lease_tokens) {
            let answer = Answer { at, outcome: Outcome::Applied, left: Some(stream.lease) };
            self.load.recorder.tried(&token, Intent::Resume(stream.session), stream.opened, Some(answer));
            self.load.met(|met| met.resumed += 1);
            stream.tokens.insert(token.clone());
            stream.resumed.push(token);
        }
        for task in message.tasks {
            self.load.recorder.streamed(stream.session, &task, stream.fence, at);
            self.load.met(|met| met.streamed += 1);
            stream.tokens.insert(task.lease_token.clone());
            stream.tasks.push(task);
        }
        for answer in &message.answers {
            self.answered(stream, answer, at);
        }
        Ok(true)
    }

    fn answered(&mut self, stream: &mut Stream, answer: &ConsumeAnswer, at: Duration) {
        let Asked { intent, held, sent } = stream.asked.pop_front().expect("an answer to what was asked");
        if intent != Intent::Heartbeat {
            return self.beside.tried(&held, intent, sent, Some((at, &answer.outcomes)));
        }
        for (held, outcome) in held.iter().zip(outcomes(&answer.outcomes)) {
            let left = (outcome == Outcome::Applied).then(|| duration(answer.lease));
            self.load.recorder.tried(&held.token, intent, sent, Some(Answer { at, outcome, left }));
        }
    }

    /// What was taken over and is not to be acked was never read, or was given up: the contract says to put it back.
    fn put_unknown_back(&mut self, stream: &mut Stream) {
        let asked = stream.asked.iter().filter(|asked| asked.intent == Intent::Ack).flat_map(|asked| &asked.held);
        let known = asked.chain(&self.done).map(|held| held.token.clone()).collect::<BTreeSet<_>>();
        let unknown = std::mem::take(&mut stream.resumed).into_iter().filter(|token| !known.contains(token));
        let held = unknown.map(|token| Held { id: String::new(), token }).collect::<Vec<_>>();
        self.load.met(|met| met.unknown += held.len());
        self.ask(stream, Intent::PutBack, held);
    }

    /// Works on what came, for some time. True if some of it will never be acked.
    async fn treat(&mut self, stream: &mut Stream) -> bool {
        let (habits, lease) = (self.load.plan.habits, self.load.plan.lease);
        let tasks = std::mem::take(&mut stream.tasks);
        if tasks.is_empty() {
            return false;
        }
        if self.random.chance(habits.heartbeat) {
            self.ask(stream, Intent::Heartbeat, tasks.iter().map(Held::of).collect());
        }
        // Longer than a lease: the stream keeps it.
        if self.random.chance(habits.long + habits.late) {
            sleep(lease + PAST_THE_LEASE).await;
        }
        if self.random.chance(habits.reclaim) {
            self.beside.reclaim().await;
        }
        let mut refused = Vec::new();
        let mut abandoned = false;
        for task in &tasks {
            if task.deliveries < REFUSALS && self.random.chance(habits.abandon) {
                abandoned = true;
            } else if task.deliveries < REFUSALS && self.random.chance(habits.put_back) {
                refused.push(Held::of(task));
            } else {
                self.done.push(Held::of(task));
            }
        }
        self.ask(stream, Intent::PutBack, refused);
        abandoned
    }

    /// On the stream mostly.
    async fn ack(&mut self, stream: &mut Stream) {
        let done = std::mem::take(&mut self.done);
        if self.random.chance(ACK_BESIDE) {
            self.beside.ack(&done).await;
        } else {
            self.ask(stream, Intent::Ack, done);
        }
    }

    /// Asks for nothing more until all that was leased before has come: then what comes later was leased later.
    async fn fence(&mut self, stream: &mut Stream) -> Result<(), ()> {
        // The answer to whatever token comes behind all that was sent before.
        let Some(token) = stream.tokens.first().cloned() else { return Ok(()) };
        stream.say(Request::MaxOutstanding(0));
        self.ask(stream, Intent::Heartbeat, vec![Held { id: String::new(), token }]);
        while !stream.asked.is_empty() {
            self.read(stream).await?;
            if self.load.over() {
                return Err(());
            }
        }
        stream.fence = self.load.recorder.now();
        stream.say(Request::MaxOutstanding(stream.max_outstanding));
        self.load.met(|met| met.fences += 1);
        Ok(())
    }

    /// Says no more and reads to the end.
    async fn finish(&mut self, stream: &mut Stream) -> End {
        let left = self.load.recorder.now();
        stream.closed = Some(left);
        stream.outbox = None;
        while !self.load.over() && self.read(stream).await.is_ok() {}
        End::Left(left)
    }

    /// What the stream was asked and did not answer has to be asked again; what was not acked may be lost after the grace.
    fn leave(&mut self, stream: Stream, end: End) {
        if let End::Left(at) = end {
            self.load.met(|met| met.left += 1);
            stream.tokens.iter().for_each(|token| self.load.recorder.left(token, at));
        }
        for Asked { intent, held, sent } in stream.asked {
            held.iter().for_each(|held| self.load.recorder.tried(&held.token, intent, sent, None));
            if intent == Intent::Ack {
                self.done.extend(held);
            }
        }
        // What came and was not looked at before is done now as well as later.
        self.done.extend(stream.tasks.iter().map(Held::of));
    }

    fn ask(&mut self, stream: &mut Stream, intent: Intent, held: Vec<Held>) {
        if held.is_empty() {
            return;
        }
        let (queue, lease_tokens) = (String::new(), held.iter().map(|held| held.token.clone()).collect());
        let sent = self.load.recorder.now();
        stream.say(match intent {
            Intent::Ack => Request::Ack(ConsumeAck { queue, lease_tokens }),
            Intent::PutBack => Request::Putback(ConsumePutback { queue, lease_tokens, ..ConsumePutback::default() }),
            Intent::Heartbeat => {
                let lease = Some(proto(stream.lease));
                Request::Heartbeat(ConsumeHeartbeat { queue, lease_tokens, lease })
            }
            Intent::Resume(_) => unreachable!("asked for by the open"),
        });
        stream.asked.push_back(Asked { intent, held, sent });
    }
}

impl Stream {
    /// How it ended when nothing more comes.
    fn ended(&self) -> End {
        self.closed.map_or(End::Ended, End::Left)
    }

    /// If the stream has ended, nobody will answer.
    fn say(&self, what: Request) {
        if let Some(outbox) = &self.outbox {
            let _ = outbox.try_send(request(what));
        }
    }
}
