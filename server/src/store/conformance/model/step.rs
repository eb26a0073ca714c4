//! The steps of a history, and how a store takes them.

use std::{collections::HashMap, fmt, sync::Arc};

use super::{
    super::*,
    name::{PLANNED, ids_of, numbers_of, tickets_of, tokens_of},
};
pub(super) use super::{
    answer::{Answer, Delivery, View},
    name::{QUEUES, Queue, Request, Stream, TaskNumber, Ticket, Try},
};
use crate::store::{Beaten, ReapCursor};

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

/// As those of another queue, which all were put in there before the history began.
impl Batch {
    fn past_of(number: u32) -> Past {
        let (failures, expiries, cause) = match number % 5 {
            0 => (0, 0, None),
            1 => (1, 0, None),
            2 => (2, 1, Some(Cause::Failures)),
            3 => (0, 1, None),
            _ => (0, 3, Some([Cause::Expiries, Cause::Rejected][number as usize / 5 % 2])),
        };
        Past {
            inserted_at: START - u64::from(number % 7) * 50,
            deliveries: failures + expiries + number % 2,
            failures,
            expiries,
            last_error: if number.is_multiple_of(3) { String::new() } else { format!("there, {number}") },
            death: cause.map(|cause| (START - u64::from(number % 4) * 100, cause)),
        }
    }

    pub(super) fn imported(self) -> impl Iterator<Item = (TaskNumber, NewTask)> {
        self.tasks().map(|(number, task)| {
            let past = Self::past_of(number.0 & !PLANNED);
            let due = task.due.filter(|_| past.death.is_none());
            (number, NewTask { due, past: Some(Box::new(past)), ..task })
        })
    }

    fn imports(self) -> Vec<Insert> {
        let one = |(number, task)| {
            let request = Some(key(&format!("import {number:?}"), 0));
            Insert { tasks: vec![task], request, waiting_here: 0, ..Default::default() }
        };
        self.imported().map(one).collect()
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
            ..Default::default()
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
    /// At most a step's worth.
    Import(Queue, Batch),
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
    /// A step that the way to the store takes a second time, or late: an insert, an import, a producer's inserts or a pop.
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
            let insert = Insert { tasks, request: request.map(Request::key), waiting_here: 0, ..Default::default() };
            let Inserted { ids, duplicates, replayed, .. } = rig.insert(&q.name(), insert).await?;
            Ok(Answer::Inserted { tasks: numbers_of(ids), duplicates, replayed })
        }
        Step::Import(q, batch) => {
            let answer = |done: Result<Inserted, StoreError>| match done {
                Ok(Inserted { ids, duplicates, replayed, .. }) => Ok((numbers_of(ids), duplicates, replayed)),
                Err(error) => Err(error.to_string()),
            };
            Ok(Answer::Imported(rig.import(&q.name(), batch.imports()).await?.into_iter().map(answer).collect()))
        }
        Step::Produce(q, step) => {
            let Produced { inserted, refused } = rig.produce(&q.name(), step.produce()).await?;
            let answer = |Inserted { ids, duplicates, replayed, .. }| (numbers_of(ids), duplicates, replayed);
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
