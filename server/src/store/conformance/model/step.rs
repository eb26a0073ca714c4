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

fn tickets_of(tokens: Vec<Token>) -> Vec<Ticket> {
    tokens.into_iter().map(Ticket::of).collect()
}

fn tokens_of(tickets: &[Ticket]) -> Vec<Token> {
    tickets.iter().map(|ticket| ticket.token()).collect()
}

/// The numbers of tasks that have plans have this bit, so that their ids tell it wherever they are named.
const PLANNED: u32 = 1 << 31;

/// Names a task: `#12`, and one that has a plan `#12p`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct TaskNumber(pub(super) u32);

impl TaskNumber {
    pub(super) fn of(id: TaskId) -> Self {
        let number = Self(read(&id.0));
        assert_eq!(number.id(), id, "an id that nobody minted");
        number
    }

    pub(super) fn id(self) -> TaskId {
        TaskId(spelled(self.0)).with_plan(self.0 & PLANNED > 0)
    }
}

impl fmt::Debug for TaskNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}{}", self.0 & !PLANNED, if self.0 & PLANNED > 0 { "p" } else { "" })
    }
}

fn ids_of(numbers: &[TaskNumber]) -> Vec<TaskId> {
    numbers.iter().map(|number| number.id()).collect()
}

fn numbers_of(ids: Vec<TaskId>) -> Vec<TaskNumber> {
    ids.into_iter().map(TaskNumber::of).collect()
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
    pub(super) life: Life,
}

/// What tasks of a batch are to have beside their envelopes. They have not all the same: see [`Batch::plan_of`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) due: Option<Due>,
    pub(super) priority: u8,
    pub(super) ttl: Option<Millis>,
    /// So few that they often meet.
    pub(super) key: Option<u8>,
}

impl Batch {
    pub(super) fn numbers(self) -> impl Iterator<Item = TaskNumber> {
        let number = move |number| if self.plan_of(number) == Plan::default() { number } else { number | PLANNED };
        (self.first..self.first + self.count).map(move |at| TaskNumber(number(at)))
    }

    /// Every fourth has none of it, and the others have not all the same.
    fn plan_of(self, number: u32) -> Plan {
        let Life { priority, ttl, key, .. } = self.life;
        let (ttl, key) = (ttl.map(|ttl| ttl + u64::from(number % 3) * 40), key.map(|key| u32::from(key) + number % 2));
        match number % 4 {
            3 => Plan::default(),
            some => {
                let priority = if some == 2 { priority / 2 } else { priority };
                Plan { priority, ttl, unique_key: key.map(|key| format!("k{key}")) }
            }
        }
    }

    fn due_of(self, number: u32) -> Option<Due> {
        self.life.due.map(|due| match due {
            Due::In(span) => Due::In(span + u64::from(number % 5) * 20),
            Due::At(time) => Due::At(START + time),
        })
    }

    pub(super) fn tasks(self) -> impl Iterator<Item = (TaskNumber, NewTask)> {
        self.numbers().map(move |number| {
            let count = number.0 & !PLANNED;
            let mut envelope = format!("{count}:").into_bytes();
            envelope.resize(envelope.len() + self.padding.0, self.padding.1);
            let new = NewTask::new(number.id(), envelope.into(), Some(self.plan_of(count)));
            (number, NewTask { due: self.due_of(count), ..new })
        })
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}+{} of {} x {:#04x}", self.first, self.count, self.padding.0, self.padding.1)?;
        if self.life == Life::default() { Ok(()) } else { write!(f, ", {:?}", self.life) }
    }
}

/// How tasks are given back by their holder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct How {
    pub(super) delay: Option<Millis>,
    pub(super) failed: bool,
    pub(super) dead_letter: bool,
    pub(super) chance: u16,
}

impl How {
    fn put_back(self, tickets: &[Ticket]) -> PutBack {
        let Self { delay, failed, dead_letter, chance } = self;
        let tokens = tokens_of(tickets);
        PutBack { tokens, delay, failed, dead_letter, reason: format!("because of {chance}"), chance }
    }
}

#[derive(Clone, PartialEq)]
pub(super) struct PopStep {
    /// Of its tokens.
    pub(super) number: u32,
    pub(super) max_tasks: usize,
    pub(super) max_bytes: usize,
    pub(super) lease: Option<Millis>,
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
        write!(f, "t{number}: at most {max_tasks} of {max_bytes} bytes for {lease:?} ms")?;
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
            lease: self.lease,
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

/// Which tasks administration is about.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Which {
    Named(Vec<TaskNumber>),
    /// Of a state, the first so many of its list then.
    First(State, usize),
}

impl Which {
    async fn numbers(&self, rig: &Rig, q: Queue) -> Result<Vec<TaskNumber>, StoreError> {
        match self {
            Self::Named(numbers) => Ok(numbers.clone()),
            Self::First(state, count) => {
                let listed = list(rig, &q.name(), *state, *count).await?.unwrap_or_default();
                Ok(listed.iter().take(*count).map(View::number).collect())
            }
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
    Heartbeat(Queue, Vec<Ticket>, Option<Millis>),
    PutBack(Queue, Vec<Ticket>, How),
    Unsent(Queue, Vec<Ticket>, Option<u8>),
    Withdraw(Queue, Arc<PopStep>),
    ReleaseHeld(Queue, Millis),
    Resume(Queue, Stream, Millis),
    Keep(Queue, Stream, Vec<Ticket>, Millis),
    Abandon(Queue, Stream, Vec<Ticket>, Millis),
    Change(Queue, Vec<(Setting, Option<u64>)>),
    Settings(Queue),
    /// All pages, of so many tasks.
    List(Queue, State, usize),
    Tasks(Queue, Which),
    Delete(Queue, Which),
    Redrive(Queue, Which),
    /// Until there are no more.
    Purge(Queue, State),
    DropQueue(Queue, bool),
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
    pub(super) failures: u32,
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
            failures: leased.failures,
            expiries: leased.expiries,
            left: leased.left,
            expires_at: leased.expires_at.wrapping_sub(START),
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ticket, task, envelope, inserted_at, deliveries, failures, expiries, left, expires_at } = self;
        write!(f, "{ticket:?} {task:?} {envelope:?} of {inserted_at}, delivered {deliveries}, failed {failures}, ")?;
        write!(f, "expired {expiries}, ")?;
        write!(f, "{left} left until {expires_at}")
    }
}

/// A task as administration sees it, with times from the beginning.
#[derive(Clone, PartialEq)]
pub(super) struct View(pub(super) Seen);

impl View {
    fn of(seen: Seen) -> Self {
        let from_start = |at: Millis| at.wrapping_sub(START);
        let (at, inserted_at) = (seen.at.map(from_start), from_start(seen.inserted_at));
        Self(Seen { at, inserted_at, ends_at: seen.ends_at.map(from_start), ..seen })
    }

    pub(super) fn number(&self) -> TaskNumber {
        TaskNumber::of(self.0.id)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.number(), self.0)
    }
}

/// What a store answered.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Done,
    Refused(String),
    Inserted {
        tasks: Vec<TaskNumber>,
        duplicates: Vec<usize>,
        replayed: bool,
    },
    /// Of each insert: the tasks, which of them are duplicates, and whether they are those of an earlier call.
    Produced(Vec<(Vec<TaskNumber>, Vec<usize>, bool)>, Option<String>),
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
    Beaten(Vec<Outcome>, Option<(Millis, Millis)>, Vec<Ticket>),
    GivenBack(Vec<Outcome>, Released),
    Withdrawn(u64),
    Released(Released),
    Resumed(Vec<Ticket>, Vec<Millis>),
    /// Nothing if another stream has the session.
    Kept(Option<(Vec<Outcome>, Vec<Ticket>)>),
    Seen(Vec<Sight>),
    Counted(Vec<Option<Counts>>),
    Named(Vec<QueueName>),
    Reaped(BTreeMap<QueueName, u64>),
    Set(Option<Settings>),
    Listed(Option<Vec<View>>),
    Told(Vec<Option<View>>),
    Deleted(Vec<(TaskNumber, Deleted)>),
    Redriven(Vec<(TaskNumber, Redriven)>),
    Purged(u64),
    Dropped(bool),
}

/// Takes a step. Looks and the reaper do one step's worth of what its time has come for a call, so they are called `rounds`
/// times: once for each [`RECLAIM_STEP`](crate::store::RECLAIM_STEP) leases, tasks that wait, tasks that end and dead letters
/// that there may be. What became ready is compared in all, and what they saw, of the last.
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
        Step::Change(..)
        | Step::Settings(_)
        | Step::List(..)
        | Step::Tasks(..)
        | Step::Delete(..)
        | Step::Redrive(..)
        | Step::Purge(..)
        | Step::DropQueue(..) => administer(rig, step).await,
        step => call(rig, step).await,
    };
    answer.unwrap_or_else(|error| Answer::Refused(error.to_string()))
}

async fn call(rig: &Rig, step: &Step) -> Result<Answer, StoreError> {
    match step {
        Step::Insert(q, batch, request) => {
            let tasks = batch.tasks().map(|(_, task)| task).collect();
            let insert = Insert { tasks, request: request.map(Request::key), waiting_here: 0 };
            let Inserted { ids, duplicates, replayed } = rig.insert(&q.name(), insert).await?;
            Ok(Answer::Inserted { tasks: numbers_of(ids), duplicates, replayed })
        }
        Step::Produce(q, step) => {
            let Produced { inserted, refused } = rig.produce(&q.name(), step.produce()).await?;
            let answer = |Inserted { ids, duplicates, replayed }| (numbers_of(ids), duplicates, replayed);
            let answers = inserted.into_iter().map(answer).collect();
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
            let Beaten { outcomes, earliest, cancelled } =
                rig.heartbeat(&q.name(), &tokens_of(tickets), *lease).await?;
            let earliest = earliest.map(|(left, at)| (left, at.wrapping_sub(START)));
            Ok(Answer::Beaten(outcomes, earliest, tickets_of(cancelled)))
        }
        Step::PutBack(q, tickets, how) => {
            let put_back = Release::PutBack(how.put_back(tickets));
            rig.release(&q.name(), put_back).await.map(|(outcomes, released)| Answer::GivenBack(outcomes, released))
        }
        Step::Unsent(q, tickets, attempt) => {
            let unsent = Release::Unsent(tokens_of(tickets), attempt.map(name_of_attempt));
            rig.release(&q.name(), unsent).await.map(|(outcomes, released)| Answer::GivenBack(outcomes, released))
        }
        Step::Withdraw(q, pop) => rig.withdraw(&q.name(), pop.withdrawal()).await.map(Answer::Withdrawn),
        Step::ReleaseHeld(q, held_for) => rig.release_held(&q.name(), *held_for).await.map(Answer::Released),
        Step::Resume(q, stream, lease) => {
            let held = rig.resume(&q.name(), stream.consumer(), *lease, MAX_HOLD).await?;
            let (tokens, ages): (Vec<_>, Vec<_>) = held.into_iter().unzip();
            Ok(Answer::Resumed(tickets_of(tokens), ages))
        }
        Step::Keep(q, stream, tickets, lease) => rig
            .keep(&q.name(), stream.consumer(), &tokens_of(tickets), *lease)
            .await
            .map(|kept| Answer::Kept(kept.map(|kept| (kept.outcomes, tickets_of(kept.cancelled))))),
        Step::Abandon(q, stream, tickets, grace) => {
            rig.abandon(&q.name(), stream.consumer(), &tokens_of(tickets), *grace).await.map(|()| Answer::Done)
        }
        step => panic!("not a call on one queue: {step:?}"),
    }
}

async fn administer(rig: &Rig, step: &Step) -> Result<Answer, StoreError> {
    match step {
        Step::Change(q, changes) => rig.change(&q.name(), changes).await.map(|set| Answer::Set(Some(set))),
        Step::Settings(q) => rig.settings(&q.name()).await.map(Answer::Set),
        Step::List(q, state, page) => list(rig, &q.name(), *state, *page).await.map(Answer::Listed),
        Step::Tasks(q, which) => {
            let seen = rig.tasks(&q.name(), &ids_of(&which.numbers(rig, *q).await?)).await?;
            Ok(Answer::Told(seen.into_iter().map(|seen| seen.map(View::of)).collect()))
        }
        Step::Delete(q, which) => {
            let numbers = which.numbers(rig, *q).await?;
            let deleted = rig.delete(&q.name(), &ids_of(&numbers)).await?;
            Ok(Answer::Deleted(numbers.into_iter().zip(deleted).collect()))
        }
        Step::Redrive(q, which) => {
            let numbers = which.numbers(rig, *q).await?;
            let redriven = rig.redrive(&q.name(), &ids_of(&numbers)).await?;
            Ok(Answer::Redriven(numbers.into_iter().zip(redriven).collect()))
        }
        Step::Purge(q, state) => {
            let mut all = 0;
            loop {
                match rig.purge(&q.name(), *state).await? {
                    0 => return Ok(Answer::Purged(all)),
                    count => all += count,
                }
            }
        }
        Step::DropQueue(q, force) => rig.drop_queue(&q.name(), *force).await.map(Answer::Dropped),
        step => panic!("not administration: {step:?}"),
    }
}

async fn list(rig: &Rig, q: &QueueName, state: State, page: usize) -> Result<Option<Vec<View>>, StoreError> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let Some(page) = rig.list(q, state, after.as_ref(), page).await? else { return Ok(None) };
        all.extend(page.tasks.into_iter().map(View::of));
        after = page.next;
        if after.is_none() {
            return Ok(Some(all));
        }
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
