//! The steps of a history and what stores answer to them, in short words: `t3.0` is the first token of pop 3, `#12` the
//! twelfth task.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use super::super::*;
use crate::store::{Beaten, Popped, ReapCursor, Sight};

/// The queues of a history. Nothing is ever inserted in the last one.
pub(super) const QUEUES: [&str; 4] = ["q", "q::a", "Q", "nobody"];

/// One of [`QUEUES`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Queue(pub(super) u8);

impl Queue {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..QUEUES.len() as u8).map(Self)
    }

    pub(super) fn name(self) -> QueueName {
        queue(QUEUES[usize::from(self.0)])
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(QUEUES[usize::from(self.0)])
    }
}

/// Bytes that look random, and are the same each time: those of ids and stems, which stores must take whatever they are.
fn scatter<const N: usize>(number: u32) -> [u8; N] {
    let mut state = u64::from(number);
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

fn spelled<const N: usize>(number: u32) -> [u8; N] {
    let mut bytes = scatter(number);
    bytes[0] = 0;
    bytes[1..5].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn read(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[1..5].try_into().unwrap())
}

/// Names a token: which pop, and the position in it. Known before any store ran the pop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket {
    pub(super) pop: u32,
    pub(super) position: u16,
}

impl Ticket {
    pub(super) fn stem(pop: u32) -> Stem {
        Stem(spelled(pop))
    }

    fn token(self) -> Token {
        Self::stem(self.pop).token(self.position)
    }

    fn of(token: Token) -> Self {
        let ticket = Self { pop: read(&token.0), position: u16::from_be_bytes(token.0[14..].try_into().unwrap()) };
        assert!(ticket.token() == token, "a token that nobody minted: {token}");
        ticket
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}.{}", self.pop, self.position)
    }
}

fn tokens_of(tickets: &[Ticket]) -> Vec<Token> {
    tickets.iter().map(|ticket| ticket.token()).collect()
}

fn id_of(number: TaskNumber) -> TaskId {
    TaskId(spelled(number.0)).with_plan(false)
}

/// Names a task.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct TaskNumber(pub(super) u32);

impl TaskNumber {
    pub(super) fn of(id: TaskId) -> Self {
        let number = Self(read(&id.0));
        assert_eq!(id_of(number), id, "an id that nobody minted");
        number
    }
}

impl fmt::Debug for TaskNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A caller's request id, and a number for what the request is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) id: u8,
    pub(super) content: u8,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}{}", self.id, if self.content == 0 { "" } else { " about something else" })
    }
}

impl Request {
    fn key(self) -> RequestKey {
        key(&self.id.to_string(), self.content)
    }
}

/// A repeatable pop, and which try of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Try {
    pub(super) request: Request,
    pub(super) attempt: u8,
}

impl fmt::Debug for Try {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "try {} of {:?}", self.attempt, self.request)
    }
}

impl Try {
    fn pop_request(self) -> PopRequest {
        PopRequest { key: self.request.key(), attempt: name_of_attempt(self.attempt) }
    }
}

/// A stream of deliveries: which session it names, and which of the session's streams it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) session: u8,
    pub(super) number: u8,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {} of session {}", self.number, self.session)
    }
}

impl Stream {
    fn consumer(self) -> Consumer {
        consumer(self.session, self.number)
    }
}

/// Tasks with consecutive numbers. Their envelopes are their numbers, then so many bytes of a kind.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) padding: (usize, u8),
}

impl Batch {
    fn numbers(self) -> impl Iterator<Item = TaskNumber> {
        (self.first..self.first + self.count).map(TaskNumber)
    }

    pub(super) fn tasks(self) -> impl Iterator<Item = (TaskNumber, NewTask)> {
        self.numbers().map(move |number| {
            let mut envelope = format!("{}:", number.0).into_bytes();
            envelope.resize(envelope.len() + self.padding.0, self.padding.1);
            (number, NewTask::new(id_of(number), envelope.into(), None))
        })
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}+{} of {} x {:#04x}", self.first, self.count, self.padding.0, self.padding.1)
    }
}

#[derive(Clone, PartialEq)]
pub(super) struct PopStep {
    /// Of its tokens.
    pub(super) number: u32,
    pub(super) max_tasks: usize,
    pub(super) max_bytes: usize,
    pub(super) lease: Millis,
    pub(super) request: Option<Try>,
    pub(super) acks: Vec<Ticket>,
    pub(super) will_wait: bool,
    pub(super) stream: Option<Stream>,
    /// Pops that have no leases any more, and get none.
    pub(super) spent: Vec<u32>,
}

impl fmt::Debug for PopStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, max_tasks, max_bytes, lease, request, acks, will_wait, stream, spent } = self;
        write!(f, "t{number}: at most {max_tasks} of {max_bytes} bytes for {lease} ms")?;
        if let Some(one) = request {
            write!(f, ", {one:?}")?;
        }
        if !acks.is_empty() {
            write!(f, ", acks {acks:?}")?;
        }
        if let Some(stream) = stream {
            write!(f, ", for {stream:?}")?;
        }
        if !spent.is_empty() {
            write!(f, ", spent {spent:?}")?;
        }
        f.write_str(if *will_wait { ", will wait" } else { "" })
    }
}

impl PopStep {
    fn pop(&self) -> Pop {
        Pop {
            acks: tokens_of(&self.acks),
            max_tasks: self.max_tasks,
            max_bytes: self.max_bytes,
            lease: Some(self.lease),
            stem: Ticket::stem(self.number),
            request: self.request.map(Try::pop_request),
            will_wait: self.will_wait,
            consumer: self.stream.map(Stream::consumer),
            spent: self.spent.iter().map(|pop| Ticket::stem(*pop)).collect(),
        }
    }

    fn withdrawal(&self) -> Withdrawal {
        let Pop { stem, max_tasks, request, .. } = self.pop();
        Withdrawal { stem, max_tasks, request }
    }
}

/// Inserts of a producer: of each, its number, its tasks, and a number for what it is about.
#[derive(Clone, PartialEq)]
pub(super) struct ProduceStep {
    pub(super) producer: u8,
    pub(super) inserts: Vec<(u64, Batch, u8)>,
}

impl fmt::Debug for ProduceStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}:", self.producer)?;
        for (number, batch, content) in &self.inserts {
            let about = if *content == 0 { "" } else { " about something else" };
            write!(f, " {number} is {batch:?}{about},")?;
        }
        Ok(())
    }
}

impl ProduceStep {
    fn produce(&self) -> Produce {
        let insert = |(number, batch, content): &(u64, Batch, u8)| NumberedInsert {
            number: *number,
            fingerprint: Fingerprint([*content; 16]),
            tasks: batch.tasks().map(|(_, task)| task).collect(),
        };
        Produce {
            producer: format!("p{}", self.producer),
            inserts: self.inserts.iter().map(insert).collect(),
            waiting_here: 0,
        }
    }
}

/// For how long leases are held in histories, about as long as several leases.
pub(super) const MAX_HOLD: Millis = 2_000;

/// One step of a history. It is complete in itself: whatever other steps are left out, it can be taken.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    Pass(Millis),
    Counts(Vec<Queue>),
    Look(Vec<Queue>),
    Queues {
        after: Option<Queue>,
        max: usize,
    },
    Reap {
        budget: usize,
    },
    Insert(Queue, Batch, Option<Request>),
    Produce(Queue, Arc<ProduceStep>),
    Pop(Queue, Arc<PopStep>),
    Ack(Queue, Vec<Ticket>),
    Heartbeat(Queue, Vec<Ticket>, Millis),
    PutBack(Queue, Vec<Ticket>),
    Unsent(Queue, Vec<Ticket>, Option<u8>),
    Withdraw(Queue, Arc<PopStep>),
    ReleaseHeld(Queue, Millis),
    Resume(Queue, Stream, Millis),
    Keep(Queue, Stream, Vec<Ticket>, Millis),
    Abandon(Queue, Stream, Vec<Ticket>, Millis),
    Disturb(Disturbance),
    /// A step that the way to the store takes a second time, or late: an insert, a producer's inserts or a pop.
    Again(Arc<Step>),
}

impl Step {
    /// The step that runs, be it the first or the second time.
    pub(super) fn once(&self) -> &Self {
        match self {
            Self::Again(step) => step.once(),
            step => step,
        }
    }
}

/// A delivery, in short words.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Delivery {
    pub(super) ticket: Ticket,
    pub(super) task: TaskNumber,
    pub(super) envelope: Bytes,
    inserted_at: Millis,
    pub(super) deliveries: u32,
    pub(super) expiries: u32,
    left: Millis,
    pub(super) expires_at: Millis,
}

impl Delivery {
    fn of(leased: &Leased) -> Self {
        Self {
            ticket: Ticket::of(leased.token),
            task: TaskNumber::of(leased.id),
            envelope: leased.envelope.clone(),
            inserted_at: leased.inserted_at.wrapping_sub(START),
            deliveries: leased.deliveries,
            expiries: leased.expiries,
            left: leased.left,
            expires_at: leased.expires_at.wrapping_sub(START),
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ticket, task, envelope, inserted_at, deliveries, expiries, left, expires_at } = self;
        write!(f, "{ticket:?} {task:?} {envelope:?} of {inserted_at}, delivered {deliveries}, expired {expiries}, ")?;
        write!(f, "{left} left until {expires_at}")
    }
}

/// What a store answered.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Done,
    Refused(String),
    Inserted {
        tasks: Vec<TaskNumber>,
        replayed: bool,
    },
    Produced(Vec<(Vec<TaskNumber>, bool)>, Option<String>),
    Popped {
        acks: Vec<Outcome>,
        tasks: Vec<Delivery>,
        ready: u64,
        reclaimed: u64,
        due_in: Option<Millis>,
        taken_over: bool,
        known: bool,
    },
    Outcomes(Vec<Outcome>),
    Beaten(Vec<Outcome>, Option<(Millis, Millis)>),
    Withdrawn(u64),
    Released(Released),
    Resumed(Vec<Ticket>, Vec<Millis>),
    /// Nothing if another stream has the session.
    Kept(Option<Vec<Outcome>>),
    Seen(Vec<Sight>),
    Counted(Vec<Option<Counts>>),
    Named(Vec<QueueName>),
    Reaped(BTreeMap<QueueName, u64>),
}

/// Takes a step. Looks and the reaper take back one step's worth of expired leases a call, so they are called `rounds`
/// times: once for each [`RECLAIM_STEP`](crate::store::RECLAIM_STEP) tasks that may be leased. What they took back is
/// compared in all, and what they saw, of the last.
pub(super) async fn take(rig: &mut Rig, step: &Step, rounds: usize) -> Answer {
    let answer = match step {
        Step::Again(step) => return Box::pin(take(rig, step, rounds)).await,
        Step::Pass(span) => {
            rig.pass(*span);
            Ok(Answer::Done)
        }
        Step::Disturb(disturbance) => {
            rig.engine.disturb(*disturbance).await;
            Ok(Answer::Done)
        }
        Step::Look(queues) => look(rig, queues, rounds).await,
        Step::Reap { budget } => reap(rig, *budget, rounds).await,
        Step::Counts(queues) => rig.counts(&names(queues)).await.map(Answer::Counted),
        Step::Queues { after, max } => rig.queues(after.map(Queue::name).as_ref(), *max).await.map(Answer::Named),
        step => call(rig, step).await,
    };
    answer.unwrap_or_else(|error| Answer::Refused(error.to_string()))
}

async fn call(rig: &Rig, step: &Step) -> Result<Answer, StoreError> {
    match step {
        Step::Insert(q, batch, request) => {
            let tasks = batch.tasks().map(|(_, task)| task).collect();
            let insert = Insert { tasks, request: request.map(Request::key), waiting_here: 0 };
            let Inserted { ids, replayed, .. } = rig.insert(&q.name(), insert).await?;
            Ok(Answer::Inserted { tasks: ids.into_iter().map(TaskNumber::of).collect(), replayed })
        }
        Step::Produce(q, step) => {
            let Produced { inserted, refused } = rig.produce(&q.name(), step.produce()).await?;
            let tasks = |inserted: Inserted| inserted.ids.into_iter().map(TaskNumber::of).collect();
            let answers = inserted.into_iter().map(|inserted| (inserted.replayed, tasks(inserted)));
            let answers = answers.map(|(replayed, tasks)| (tasks, replayed)).collect();
            Ok(Answer::Produced(answers, refused.map(|error| error.to_string())))
        }
        Step::Pop(q, pop) => {
            let popped = rig.pop(&q.name(), pop.pop()).await?;
            let tasks = popped.tasks.iter().map(Delivery::of).collect();
            let Popped { acks, ready, reclaimed, due_in, taken_over, known, .. } = popped;
            Ok(Answer::Popped { acks, tasks, ready, reclaimed, due_in, taken_over, known })
        }
        Step::Ack(q, tickets) => rig.ack(&q.name(), &tokens_of(tickets)).await.map(Answer::Outcomes),
        Step::Heartbeat(q, tickets, lease) => {
            let Beaten { outcomes, earliest, .. } = rig.heartbeat(&q.name(), &tokens_of(tickets), Some(*lease)).await?;
            Ok(Answer::Beaten(outcomes, earliest.map(|(left, at)| (left, at.wrapping_sub(START)))))
        }
        Step::PutBack(q, tickets) => {
            let put_back = Release::PutBack(back(&tokens_of(tickets)));
            rig.release(&q.name(), put_back).await.map(|(outcomes, _)| Answer::Outcomes(outcomes))
        }
        Step::Unsent(q, tickets, attempt) => {
            let unsent = Release::Unsent(tokens_of(tickets), attempt.map(name_of_attempt));
            rig.release(&q.name(), unsent).await.map(|(outcomes, _)| Answer::Outcomes(outcomes))
        }
        Step::Withdraw(q, pop) => rig.withdraw(&q.name(), pop.withdrawal()).await.map(Answer::Withdrawn),
        Step::ReleaseHeld(q, held_for) => rig.release_held(&q.name(), *held_for).await.map(Answer::Released),
        Step::Resume(q, stream, lease) => {
            let held = rig.resume(&q.name(), stream.consumer(), *lease, MAX_HOLD).await?;
            let (tokens, ages): (Vec<_>, Vec<_>) = held.into_iter().unzip();
            Ok(Answer::Resumed(tokens.into_iter().map(Ticket::of).collect(), ages))
        }
        Step::Keep(q, stream, tickets, lease) => rig
            .keep(&q.name(), stream.consumer(), &tokens_of(tickets), *lease)
            .await
            .map(|kept| Answer::Kept(kept.map(|kept| kept.outcomes))),
        Step::Abandon(q, stream, tickets, grace) => {
            rig.abandon(&q.name(), stream.consumer(), &tokens_of(tickets), *grace).await.map(|()| Answer::Done)
        }
        step => panic!("not a call on one queue: {step:?}"),
    }
}

fn names(queues: &[Queue]) -> Vec<QueueName> {
    queues.iter().map(|queue| queue.name()).collect()
}

async fn look(rig: &Rig, queues: &[Queue], rounds: usize) -> Result<Answer, StoreError> {
    let mut all = vec![Sight::default(); queues.len()];
    for _ in 0..rounds {
        for (all, sight) in all.iter_mut().zip(rig.look(&names(queues)).await?) {
            *all = Sight { reclaimed: all.reclaimed + sight.reclaimed, ..sight };
        }
    }
    Ok(Answer::Seen(all))
}

async fn reap(rig: &Rig, budget: usize, rounds: usize) -> Result<Answer, StoreError> {
    let mut all: HashMap<QueueName, u64> = HashMap::new();
    for _ in 0..rounds {
        let mut cursor = ReapCursor::default();
        loop {
            let reaped = rig.reap(cursor, budget).await?;
            for (queue, count) in reaped.reclaimed {
                *all.entry(queue).or_default() += count;
            }
            cursor = reaped.next;
            if cursor == ReapCursor::default() {
                break;
            }
        }
    }
    Ok(Answer::Reaped(all.into_iter().collect()))
}
