//! The store in memory: the specification. One struct, one lock, plain maps, no batching.
//!
//! The other stores are compared with this one. It keeps nothing when the process ends, and is for tests and demos.

mod admin;
mod remembered;
mod sessions;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;

use self::{remembered::Memory, sessions::Session};
use super::{
    Beaten, Cause, Clock, Consumer, Fingerprint, Insert, Inserted, Kept, Leased, MAX_PRIORITY, Millis, NewTask,
    NumberedInsert, OnWake, Outcome, PRODUCER_ANSWERS, Plan, Pop, Popped, Produce, Produced, PutBack, QueueName,
    RECLAIM_STEP, ReapCursor, Reaped, Release, Released, Remember, RequestKey, Rules, SessionId, Setting, Settings,
    Sight, Stem, Store, StoreError, TaskId, Token, WITHDRAWN_FOR, Withdrawal, holders::Holders,
};

/// The store.
pub struct MemoryStore {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    rules: Rules,
    capacity: u64,
    used: Arc<AtomicU64>,
}

#[derive(Default)]
struct State {
    queues: BTreeMap<QueueName, Queue>,
    withdrawn: Withdrawn,
}

/// Until when a pop must not lease any more under its stem, be its queue known already or not.
type Withdrawn = HashMap<Stem, Millis>;

/// What a task is reckoned to take beside its envelope, in bytes.
const TASK_OVERHEAD: u64 = 128;

impl MemoryStore {
    /// An empty store that refuses inserts when its tasks would take more than `capacity` bytes.
    pub fn new(clock: Arc<dyn Clock>, rules: Rules, capacity: u64) -> Self {
        Self { state: Mutex::default(), clock, rules, capacity, used: Arc::default() }
    }

    /// What becomes of a store that keeps its tasks when its process ends and another one opens it: leases run their full
    /// length again, no pop is under way any more, and no stream has a session.
    #[cfg(test)]
    pub(super) fn open_again(&self) {
        let now = self.clock.now();
        let mut state = self.state();
        state.withdrawn.clear();
        for queue in state.queues.values_mut() {
            queue.deadlines.clear();
            queue.sessions.clear();
            for (token, lease) in &mut queue.leases {
                lease.deadline = now + lease.length;
                queue.deadlines.insert((lease.deadline, lease.order, *token));
                if let Some(session) = lease.session {
                    let session = queue.sessions.entry(session).or_default();
                    session.used_at = now;
                    session.leases.insert((lease.order, *token));
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every step below checks before it changes, so a panic elsewhere leaves no step half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a step on a queue; on an empty one that is thrown away if the queue is unknown.
    fn step<T>(&self, name: &QueueName, step: impl FnOnce(&mut Queue, &mut Withdrawn, Millis) -> T) -> T {
        let now = self.clock.now();
        let State { queues, withdrawn } = &mut *self.state();
        match queues.get_mut(name) {
            Some(queue) => step(queue, withdrawn, now),
            None => step(&mut Queue::new(self), withdrawn, now),
        }
    }
}

struct Queue {
    tasks: HashMap<TaskId, Task>,
    /// By priority.
    ready: [Line; 1 + MAX_PRIORITY as usize],
    /// By when they fall due; of those that do so at the same time, the one that was put here first is first.
    scheduled: BTreeSet<(Millis, u64, TaskId)>,
    scheduled_count: u64,
    /// When the time of tasks that are ready or scheduled is over.
    ends: BTreeSet<(Millis, TaskId)>,
    unique: HashMap<String, TaskId>,
    /// By when they died.
    dead: BTreeSet<(Millis, TaskId)>,
    leases: HashMap<Token, Lease>,
    /// Of equal deadlines, the first delivered is first.
    deadlines: BTreeSet<(Millis, u64, Token)>,
    acked: Memory<Token, ()>,
    requests: Memory<(Call, String), Request>,
    sessions: HashMap<SessionId, Session>,
    producers: BTreeMap<String, Producer>,
    remember: Remember,
    delivered: u64,
    inserted_count: u64,
    acked_count: u64,
    expired_count: u64,
    deleted_count: u64,
    purged_count: u64,
    settings: Settings,
    rules: Rules,
    capacity: u64,
    used: Arc<AtomicU64>,
}

/// Where a task is.
#[derive(Clone, Copy)]
enum Spot {
    /// At this place of the line of its priority.
    Ready(i64),
    /// When it falls due, and how many were scheduled before.
    Scheduled(Millis, u64),
    Leased(Token),
    /// When it died.
    Dead(Millis),
}

/// The tasks of one priority that are ready, by their places: those put at the tail ascend, those put at the head descend.
#[derive(Default)]
struct Line(BTreeMap<i64, TaskId>);

impl Line {
    fn next_at_tail(&self) -> i64 {
        self.0.last_key_value().map_or(0, |(place, _)| place + 1)
    }

    fn next_at_head(&self) -> i64 {
        self.0.first_key_value().map_or(0, |(place, _)| place - 1)
    }

    fn pop_front(&mut self) -> Option<TaskId> {
        self.0.pop_first().map(|(_, id)| id)
    }
}

/// How a lease ended, other than by an ack.
enum Back {
    Put(PutBack),
    /// As if the task had not been delivered.
    Unsent,
    /// It ran out, or was taken back for its age.
    RanOut,
}

fn tokens_answered(answered: &Answered) -> &[Token] {
    match answered {
        Answered::Popped(tokens) => tokens,
        Answered::Inserted(_) => &[],
    }
}

/// Whose request ids: those of inserts and of pops are apart, and count as one kind.
#[derive(PartialEq, Eq, Hash)]
enum Call {
    Insert,
    Pop,
}

struct Request {
    fingerprint: Fingerprint,
    answered: Answered,
}

enum Answered {
    Inserted(Inserted),
    Popped(Vec<Token>),
}

/// What is remembered of a producer.
#[derive(Default)]
struct Producer {
    /// Something new.
    inserted_at: Millis,
    /// In the order of their numbers.
    answers: VecDeque<Answer>,
}

struct Answer {
    number: u64,
    fingerprint: Fingerprint,
    inserted: Inserted,
}

struct Task {
    task: NewTask,
    inserted_at: Millis,
    deliveries: u32,
    failures: u32,
    expiries: u32,
    last_error: String,
    cause: Option<Cause>,
    spot: Spot,
    /// It goes when it would go back.
    cancelled: bool,
}

impl Task {
    fn plan(&self) -> Plan {
        self.task.plan.as_deref().cloned().unwrap_or_default()
    }

    fn ends_at(&self) -> Option<Millis> {
        self.plan().ttl.map(|ttl| self.inserted_at + ttl)
    }
}

struct Lease {
    id: TaskId,
    order: u64,
    renewed_at: Millis,
    deadline: Millis,
    /// What was left when it was renewed.
    length: Millis,
    holders: Holders,
    session: Option<SessionId>,
}

fn size_of_task(task: &NewTask) -> u64 {
    task.envelope.len() as u64 + TASK_OVERHEAD
}

impl Queue {
    fn new(store: &MemoryStore) -> Self {
        let remember = store.rules.remember;
        Self {
            used: Arc::clone(&store.used),
            capacity: store.capacity,
            rules: store.rules,
            settings: Settings::default(),
            dead: BTreeSet::new(),
            tasks: HashMap::new(),
            ready: Default::default(),
            scheduled: BTreeSet::new(),
            scheduled_count: 0,
            ends: BTreeSet::new(),
            unique: HashMap::new(),
            leases: HashMap::new(),
            deadlines: BTreeSet::new(),
            acked: Memory::new(remember),
            requests: Memory::new(remember),
            sessions: HashMap::new(),
            producers: BTreeMap::new(),
            remember,
            delivered: 0,
            inserted_count: 0,
            acked_count: 0,
            expired_count: 0,
            deleted_count: 0,
            purged_count: 0,
        }
    }

    fn rules(&self) -> Rules {
        self.settings.over(self.rules)
    }

    fn insert(&mut self, insert: Insert, now: Millis) -> Result<Inserted, StoreError> {
        if let Some(RequestKey { id, fingerprint }) = &insert.request
            && let Some(first) = self.requests.get(&(Call::Insert, id.clone()), now)
            && let Answered::Inserted(inserted) = &first.answered
        {
            if first.fingerprint != *fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            return Ok(Inserted { replayed: true, ..inserted.clone() });
        }
        let (second_run, inserted) = self.put_in(insert.tasks, now)?;
        if let Some(RequestKey { id, fingerprint }) = insert.request.filter(|_| !second_run) {
            let answered = Answered::Inserted(inserted.clone());
            self.requests.put((Call::Insert, id), Request { fingerprint, answered }, now);
        }
        Ok(inserted)
    }

    /// Puts in all tasks but duplicates. True if it is a second run of the same call, which puts nothing in, even if some of its
    /// tasks are gone by now.
    fn put_in(&mut self, tasks: Vec<NewTask>, now: Millis) -> Result<(bool, Inserted), StoreError> {
        let second_run = tasks.iter().any(|task| self.tasks.contains_key(&task.id));
        let mut inserted = Inserted { ids: Vec::new(), duplicates: Vec::new(), replayed: false };
        let mut new: Vec<NewTask> = Vec::new();
        let mut keys: HashMap<String, TaskId> = HashMap::new();
        for (at, task) in tasks.into_iter().enumerate() {
            let key = task.plan.as_ref().and_then(|plan| plan.unique_key.clone());
            let first = key.as_ref().and_then(|key| keys.get(key).copied().or_else(|| self.holder_of_key(key, now)));
            match first.filter(|first| *first != task.id) {
                Some(first) => {
                    inserted.ids.push(first);
                    inserted.duplicates.push(at);
                }
                None => {
                    inserted.ids.push(task.id);
                    keys.extend(key.map(|key| (key, task.id)));
                    new.push(task);
                }
            }
        }
        if second_run {
            return Ok((true, inserted));
        }
        self.check_limits(&new)?;
        let size = new.iter().map(size_of_task).sum::<u64>();
        if self.used.load(Ordering::Relaxed) + size > self.capacity {
            return Err(StoreError::Full(format!("the store in memory holds at most {} bytes", self.capacity)));
        }
        self.used.fetch_add(size, Ordering::Relaxed);
        self.inserted_count += new.len() as u64;
        for task in new {
            self.add(task, now);
        }
        Ok((false, inserted))
    }

    fn check_limits(&self, new: &[NewTask]) -> Result<(), StoreError> {
        let live = self.tasks.values().filter(|task| task.cause.is_none()).map(|task| &task.task);
        let (count, bytes) =
            live.chain(new).fold((0, 0), |(count, bytes), task| (count + 1, bytes + task.envelope.len()));
        for (setting, would_be) in [(Setting::MaxTasks, count), (Setting::MaxBytes, bytes as u64)] {
            if let Some(max) = self.settings.get(setting).filter(|max| would_be > *max && !new.is_empty()) {
                return Err(StoreError::QueueFull(setting, max));
            }
        }
        Ok(())
    }

    fn add(&mut self, task: NewTask, now: Millis) {
        let id = task.id;
        let due = task.due.map_or(now, |due| due.at(now));
        let task = Task {
            task,
            inserted_at: now,
            deliveries: 0,
            failures: 0,
            expiries: 0,
            last_error: String::new(),
            cause: None,
            spot: Spot::Ready(0),
            cancelled: false,
        };
        if let Some(key) = task.plan().unique_key {
            self.unique.insert(key, id);
        }
        self.tasks.insert(id, task);
        if due <= now { self.to_tail(id) } else { self.schedule(id, due) }
    }

    /// It is ready now.
    fn to_tail(&mut self, id: TaskId) {
        self.make_ready(id, Line::next_at_tail);
    }

    fn to_head(&mut self, id: TaskId) {
        self.make_ready(id, Line::next_at_head);
    }

    fn make_ready(&mut self, id: TaskId, next: fn(&Line) -> i64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let line = &mut self.ready[usize::from(task.plan().priority)];
        let place = next(line);
        line.0.insert(place, id);
        task.spot = Spot::Ready(place);
        self.ends.extend(task.ends_at().map(|at| (at, id)));
    }

    fn schedule(&mut self, id: TaskId, due: Millis) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        self.scheduled_count += 1;
        self.scheduled.insert((due, self.scheduled_count, id));
        task.spot = Spot::Scheduled(due, self.scheduled_count);
        self.ends.extend(task.ends_at().map(|at| (at, id)));
    }

    /// It is where it was no more.
    fn take_out(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        if let Some(at) = task.ends_at() {
            self.ends.remove(&(at, id));
        }
        match task.spot {
            Spot::Ready(place) => drop(self.ready[usize::from(task.plan().priority)].0.remove(&place)),
            Spot::Scheduled(due, order) => drop(self.scheduled.remove(&(due, order, id))),
            Spot::Dead(died_at) => drop(self.dead.remove(&(died_at, id))),
            Spot::Leased(token) => drop(self.end_lease(&token)),
        }
    }

    /// It is gone.
    fn remove(&mut self, id: TaskId) {
        self.take_out(id);
        self.free_key(id);
        if let Some(task) = self.tasks.remove(&id) {
            self.used.fetch_sub(size_of_task(&task.task), Ordering::Relaxed);
        }
    }

    /// The task that has a unique key. One that will never be delivered, because its time is over, goes and has none.
    fn holder_of_key(&mut self, key: &str, now: Millis) -> Option<TaskId> {
        let id = *self.unique.get(key)?;
        let ends_at = self.tasks.get(&id)?.ends_at();
        if ends_at.is_some_and(|at| at <= now && self.ends.contains(&(at, id))) {
            self.expire(id);
            return None;
        }
        Some(id)
    }

    fn free_key(&mut self, id: TaskId) {
        if let Some(key) = self.tasks.get(&id).and_then(|task| task.plan().unique_key)
            && self.unique.get(&key) == Some(&id)
        {
            self.unique.remove(&key);
        }
    }

    fn ready_count(&self) -> u64 {
        self.ready.iter().map(|ready| ready.0.len() as u64).sum()
    }

    /// As callers see it, who could pop so many.
    fn can_be_popped(&self) -> u64 {
        if self.settings.paused() { 0 } else { self.ready_count() }
    }

    fn produce(&mut self, produce: Produce, now: Millis) -> Produced {
        let remember = self.remember;
        self.producers.retain(|_, producer| !remember.has_forgotten_producer(producer.inserted_at, now));
        let mut produced = Produced::default();
        for insert in produce.inserts {
            let last = self.producers.get(&produce.producer).and_then(|producer| producer.answers.back());
            let inserted = match last {
                Some(last) if insert.number <= last.number => self.answer_again(&produce.producer, &insert),
                _ => self.insert_numbered(&produce.producer, insert, now),
            };
            match inserted {
                Ok(inserted) => produced.inserted.push(inserted),
                Err(refused) => return Produced { refused: Some(refused), ..produced },
            }
        }
        produced
    }

    fn answer_again(&self, producer: &str, insert: &NumberedInsert) -> Result<Inserted, StoreError> {
        let mut answers = self.producers.get(producer).into_iter().flat_map(|producer| &producer.answers);
        let answer = answers.find(|answer| answer.number == insert.number).ok_or(StoreError::NumberForgotten)?;
        if answer.fingerprint != insert.fingerprint {
            return Err(StoreError::RequestIdReused);
        }
        // The tasks of this very call: it runs a second time.
        let replayed = !answer.inserted.ids.iter().zip(&insert.tasks).any(|(id, task)| *id == task.id);
        Ok(Inserted { replayed, ..answer.inserted.clone() })
    }

    fn insert_numbered(&mut self, producer: &str, insert: NumberedInsert, now: Millis) -> Result<Inserted, StoreError> {
        let NumberedInsert { number, fingerprint, tasks } = insert;
        // It may be a second run of the same call, so late that the producer was forgotten meanwhile.
        let (_, inserted) = self.put_in(tasks, now)?;
        if !self.producers.contains_key(producer) {
            while self.producers.len() as u64 >= self.remember.producers()
                && let Some((oldest, _)) = self.producers.iter().min_by_key(|(id, one)| (one.inserted_at, *id))
            {
                let oldest = oldest.clone();
                self.producers.remove(&oldest);
            }
        }
        let producer = self.producers.entry(producer.to_owned()).or_default();
        producer.inserted_at = now;
        producer.answers.push_back(Answer { number, fingerprint, inserted: inserted.clone() });
        if producer.answers.len() > PRODUCER_ANSWERS {
            producer.answers.pop_front();
        }
        Ok(inserted)
    }

    fn pop(&mut self, pop: Pop, withdrawn: &Withdrawn, now: Millis) -> Result<Popped, StoreError> {
        let mut known = Vec::new();
        if let Some(request) = &pop.request
            && let Some(first) = self.requests.get(&(Call::Pop, request.key.id.clone()), now)
            && let Answered::Popped(tokens) = &first.answered
        {
            if first.fingerprint != request.key.fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            known.clone_from(tokens);
        }
        let is_known = !known.is_empty();
        let acks = self.ack(&pop.acks, now);
        let reclaimed = self.reclaim(now);
        if pop.consumer.is_some_and(|consumer| !self.has_session(consumer, now)) {
            let ready = self.can_be_popped();
            return Ok(Popped {
                acks,
                tasks: Vec::new(),
                ready,
                reclaimed,
                due_in: None,
                taken_over: true,
                known: false,
            });
        }
        if withdrawn.get(&pop.stem).is_some_and(|until| now < *until) {
            let (ready, due_in) = (self.can_be_popped(), self.due_in(now));
            return Ok(Popped {
                acks,
                tasks: Vec::new(),
                ready,
                reclaimed,
                due_in,
                taken_over: false,
                known: is_known,
            });
        }

        let holder = pop.request.as_ref().map(|request| request.attempt);
        let is_held = |token: &Token| self.leases.contains_key(token);
        let mut held: Vec<Token> = known.into_iter().filter(is_held).collect();
        if held.is_empty() {
            held = (0..pop.max_tasks).map(|position| pop.stem.token(position as u16)).filter(is_held).collect();
        }
        if held.is_empty() {
            held = self.lease_from_head(&pop, now);
            if let Some(request) = pop.request.filter(|_| !held.is_empty()) {
                let RequestKey { id, fingerprint } = request.key;
                let answered = Answered::Popped(held.clone());
                self.requests.put((Call::Pop, id), Request { fingerprint, answered }, now);
            }
        }
        for token in &held {
            if let Some(lease) = self.leases.get_mut(token) {
                lease.holders.add(holder);
            }
        }
        let tasks: Vec<Leased> = held.iter().filter_map(|token| self.leased(*token, now)).collect();
        let due_in = if tasks.is_empty() { self.due_in(now) } else { None };
        Ok(Popped { acks, tasks, ready: self.can_be_popped(), reclaimed, due_in, taken_over: false, known: is_known })
    }

    fn lease_from_head(&mut self, pop: &Pop, now: Millis) -> Vec<Token> {
        let (mut held, mut bytes) = (Vec::new(), 0);
        let span = pop.lease.unwrap_or(self.rules().lease);
        while held.len() < pop.max_tasks
            && bytes < pop.max_bytes.max(1)
            && !self.settings.paused()
            && let Some(id) = self.ready.iter_mut().rev().find_map(Line::pop_front)
        {
            let token = pop.stem.token(held.len() as u16);
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            if let Some(at) = task.ends_at() {
                self.ends.remove(&(at, id));
            }
            task.spot = Spot::Leased(token);
            bytes += task.task.envelope.len();
            self.delivered += 1;
            let lease = Lease {
                id,
                order: self.delivered,
                renewed_at: now,
                deadline: now + span,
                length: span,
                holders: Holders::default(),
                session: pop.consumer.map(|consumer| consumer.session),
            };
            self.deadlines.insert((lease.deadline, lease.order, token));
            self.leases.insert(token, lease);
            held.push(token);
        }
        if let Some(consumer) = pop.consumer.filter(|_| !held.is_empty()) {
            let first = self.delivered - held.len() as u64;
            self.session(consumer, now).leases.extend((first + 1..).zip(held.iter().copied()));
        }
        held
    }

    /// Moves a deadline to now + `lease`, and never to an earlier time. Answers the lease.
    fn extend(&mut self, token: &Token, lease: Millis, now: Millis) -> Option<&mut Lease> {
        let held = self.leases.get_mut(token)?;
        self.deadlines.remove(&(held.deadline, held.order, *token));
        held.deadline = held.deadline.max(now + lease);
        held.length = held.deadline.saturating_sub(now);
        self.deadlines.insert((held.deadline, held.order, *token));
        Some(held)
    }

    /// A delivery as its holder sees it. The lease itself is the delivery that is not counted yet.
    fn leased(&self, token: Token, now: Millis) -> Option<Leased> {
        let lease = self.leases.get(&token)?;
        let task = self.tasks.get(&lease.id)?;
        Some(Leased {
            token,
            id: lease.id,
            envelope: task.task.envelope.clone(),
            inserted_at: task.inserted_at,
            deliveries: task.deliveries + 1,
            failures: task.failures,
            expiries: task.expiries,
            left: lease.deadline.saturating_sub(now),
            expires_at: lease.deadline,
        })
    }

    fn ack(&mut self, tokens: &[Token], now: Millis) -> Vec<Outcome> {
        let ack_one = |token: &Token| match self.end_lease(token) {
            Some(lease) => {
                self.remove(lease.id);
                self.acked_count += 1;
                self.acked.put(*token, (), now);
                Outcome::Applied
            }
            None => self.not_held(token, now),
        };
        tokens.iter().map(ack_one).collect()
    }

    fn not_held(&self, token: &Token, now: Millis) -> Outcome {
        if self.acked.get(token, now).is_some() { Outcome::AlreadyAcked } else { Outcome::LeaseLost }
    }

    fn heartbeat(&mut self, tokens: &[Token], lease: Option<Millis>, now: Millis) -> Beaten {
        let lease = lease.unwrap_or(self.rules().lease);
        let mut earliest: Option<Millis> = None;
        let beat = |token: &Token| {
            let Some(held) = self.extend(token, lease, now) else { return self.not_held(token, now) };
            held.renewed_at = now;
            earliest = Some(earliest.map_or(held.deadline, |other| other.min(held.deadline)));
            Outcome::Applied
        };
        let outcomes = tokens.iter().map(beat).collect();
        let earliest = earliest.map(|deadline| (deadline.saturating_sub(now), deadline));
        Beaten { outcomes, earliest, cancelled: self.cancelled(tokens) }
    }

    /// Of these tokens, those whose tasks are to be deleted.
    fn cancelled(&self, tokens: &[Token]) -> Vec<Token> {
        let mut cancelled = Vec::new();
        for token in tokens {
            let task = self.leases.get(token).and_then(|lease| self.tasks.get(&lease.id));
            if task.is_some_and(|task| task.cancelled) && !cancelled.contains(token) {
                cancelled.push(*token);
            }
        }
        cancelled
    }

    fn release(&mut self, release: Release, now: Millis) -> (Vec<Outcome>, Released) {
        let (tokens, unsent, back) = match release {
            Release::PutBack(put_back) => (put_back.tokens.clone(), None, Back::Put(put_back)),
            Release::Unsent(tokens, holder) => (tokens, Some(holder), Back::Unsent),
        };
        let mut ended = Vec::new();
        let mut outcomes = Vec::new();
        for token in &tokens {
            let mine = |lease: &mut Lease| unsent.is_none_or(|attempt| lease.holders.disown(attempt));
            outcomes.push(match self.leases.get_mut(token).map(mine) {
                Some(true) => Outcome::Applied,
                Some(false) => Outcome::LeaseLost,
                None => self.not_held(token, now),
            });
            if outcomes.last() == Some(&Outcome::Applied) {
                ended.extend(self.end_lease(token));
            }
        }
        (outcomes, self.give_back(ended, &back, now))
    }

    fn withdraw(&mut self, withdrawal: Withdrawal, withdrawn: &mut Withdrawn, now: Millis) -> u64 {
        withdrawn.retain(|_, until| now < *until);
        withdrawn.insert(withdrawal.stem, now + WITHDRAWN_FOR);
        let mut tokens: Vec<Token> =
            (0..withdrawal.max_tasks).map(|position| withdrawal.stem.token(position as u16)).collect();
        let attempt = withdrawal.request.as_ref().map(|request| request.attempt);
        if let Some(request) = withdrawal.request
            && let Some(first) = self.requests.get(&(Call::Pop, request.key.id), now)
        {
            // It may have been answered with what an earlier try had leased.
            tokens.extend(tokens_answered(&first.answered).iter().copied());
        }
        self.release(Release::Unsent(tokens, attempt), now).1.put_back
    }

    fn release_held(&mut self, held_for: Millis, now: Millis) -> Released {
        let old = |lease: &Lease| now.saturating_sub(lease.renewed_at) >= held_for;
        let tokens: Vec<Token> = self.leases.iter().filter(|(_, lease)| old(lease)).map(|(token, _)| *token).collect();
        let ended: Vec<Lease> = tokens.iter().filter_map(|token| self.end_lease(token)).collect();
        self.give_back(ended, &Back::RanOut, now)
    }

    /// Does what its time has come for: tasks whose time is over go, leases that ran out are taken back, and what is due is
    /// put at the tail. Answers how many tasks became ready.
    fn reclaim(&mut self, now: Millis) -> u64 {
        self.acked.forget(now);
        self.requests.forget(now);
        while let Some((_, id)) = self.ends.first().copied().filter(|(at, _)| *at <= now) {
            self.expire(id);
        }
        if let Some(kept) = self.settings.get(Setting::DeadLetterRetention) {
            while let Some((_, id)) = self.dead.first().copied().filter(|(died_at, _)| died_at + kept <= now) {
                self.expire(id);
            }
        }
        self.take_back(now) + self.make_due_ready(now)
    }

    fn expire(&mut self, id: TaskId) {
        self.expired_count += 1;
        self.remove(id);
    }

    fn make_due_ready(&mut self, now: Millis) -> u64 {
        let mut count = 0;
        while let Some((due, order, id)) = self.scheduled.first().copied().filter(|(due, ..)| *due <= now) {
            self.scheduled.remove(&(due, order, id));
            self.to_tail(id);
            count += 1;
        }
        count
    }

    fn take_back(&mut self, now: Millis) -> u64 {
        let mut count = 0;
        let last_expired = (now, u64::MAX, Token([u8::MAX; 16]));
        loop {
            let expired = self.deadlines.range(..=last_expired).rev();
            let step: Vec<Token> = expired.take(RECLAIM_STEP).map(|(.., token)| *token).collect();
            if step.is_empty() {
                return count;
            }
            let ended: Vec<Lease> = step.iter().filter_map(|token| self.end_lease(token)).collect();
            count += self.give_back(ended, &Back::RanOut, now).ready;
        }
    }

    fn end_lease(&mut self, token: &Token) -> Option<Lease> {
        let lease = self.leases.remove(token)?;
        self.deadlines.remove(&(lease.deadline, lease.order, *token));
        if let Some(session) = lease.session.and_then(|session| self.sessions.get_mut(&session)) {
            session.leases.remove(&(lease.order, *token));
        }
        Some(lease)
    }

    /// Where a task goes whose lease has ended, one after the other in the order of delivery; those for the head come in the
    /// opposite order, as each is put in front.
    fn give_back(&mut self, mut ended: Vec<Lease>, back: &Back, now: Millis) -> Released {
        ended.sort_by_key(|lease| lease.order);
        let rules = self.rules();
        let (mut released, mut to_head) = (Released::default(), Vec::new());
        for (nth, Lease { id, .. }) in ended.into_iter().enumerate() {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            task.deliveries += u32::from(!matches!(back, Back::Unsent));
            task.expiries += u32::from(matches!(back, Back::RanOut));
            let mut delay = None;
            let is_last = matches!(back, Back::RanOut) && task.expiries >= rules.max_expiries;
            task.cause = is_last.then_some(Cause::Expiries);
            if let Back::Put(put_back) = back {
                task.failures += u32::from(put_back.failed);
                let backoff = || rules.backoff.after(task.failures, put_back.chance, nth);
                delay = put_back.delay.or_else(|| put_back.failed.then(backoff));
                let is_last = put_back.failed && task.failures >= rules.max_failures;
                task.cause = is_last.then_some(Cause::Failures).or(put_back.dead_letter.then_some(Cause::Rejected));
                if put_back.failed || put_back.dead_letter {
                    task.last_error.clone_from(&put_back.reason);
                }
            }
            if task.cancelled {
                self.deleted_count += 1;
                self.remove(id);
            } else if task.cause.is_some() {
                released.dead_lettered += 1;
                self.bury(id, now);
            } else if task.ends_at().is_some_and(|at| at <= now) {
                self.expire(id);
            } else if let Some(delay) = delay.filter(|delay| *delay > 0) {
                released.put_back += 1;
                self.schedule(id, now + delay);
            } else {
                to_head.push(id);
            }
        }
        released.put_back += to_head.len() as u64;
        released.ready = to_head.len() as u64;
        to_head.into_iter().rev().for_each(|id| self.to_head(id));
        released
    }

    /// It is a dead letter, and its key is free.
    fn bury(&mut self, id: TaskId, now: Millis) {
        self.free_key(id);
        self.dead.insert((now, id));
        if let Some(task) = self.tasks.get_mut(&id) {
            task.spot = Spot::Dead(now);
        }
    }

    fn due_in(&self, now: Millis) -> Option<Millis> {
        let first_lease = self.deadlines.first().map(|(deadline, ..)| *deadline);
        let first_due = self.scheduled.first().map(|(due, ..)| *due);
        let next = first_lease.into_iter().chain(first_due).min().filter(|_| !self.settings.paused());
        next.map(|at| at.saturating_sub(now))
    }

    fn sight(&mut self, now: Millis) -> Sight {
        let reclaimed = self.reclaim(now);
        Sight { ready: self.can_be_popped(), due_in: self.due_in(now), reclaimed }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        let now = self.clock.now();
        let queues = &mut self.state().queues;
        if let Some(known) = queues.get_mut(queue) {
            return known.insert(insert, now);
        }
        let mut made = Queue::new(self);
        let inserted = made.insert(insert, now)?;
        queues.insert(queue.clone(), made);
        Ok(inserted)
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        let now = self.clock.now();
        let queues = &mut self.state().queues;
        if let Some(known) = queues.get_mut(queue) {
            return Ok(known.produce(produce, now));
        }
        let mut made = Queue::new(self);
        let produced = made.produce(produce, now);
        if !produced.inserted.is_empty() {
            queues.insert(queue.clone(), made);
        }
        Ok(produced)
    }

    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError> {
        self.step(queue, |queue, withdrawn, now| queue.pop(pop, withdrawn, now))
    }

    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.ack(tokens, now)))
    }

    async fn heartbeat(
        &self,
        queue: &QueueName,
        tokens: &[Token],
        lease: Option<Millis>,
    ) -> Result<Beaten, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.heartbeat(tokens, lease, now)))
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.release(release, now)))
    }

    async fn resume(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
    ) -> Result<Vec<(Token, Millis)>, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.resume(consumer, lease, max_hold, now)))
    }

    async fn keep(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
    ) -> Result<Option<Kept>, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.keep(consumer, tokens, lease, now)))
    }

    async fn abandon(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
    ) -> Result<(), StoreError> {
        self.step(queue, |queue, _, now| queue.abandon(consumer, tokens, grace, now));
        Ok(())
    }

    async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError> {
        Ok(self.step(queue, |queue, withdrawn, now| queue.withdraw(withdrawal, withdrawn, now)))
    }

    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.release_held(held_for, now)))
    }

    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError> {
        Ok(queues.iter().map(|queue| self.step(queue, |queue, _, now| queue.sight(now))).collect())
    }

    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError> {
        let now = self.clock.now();
        let mut reaped = Reaped::default();
        let start = usize::try_from(cursor.position).unwrap_or(usize::MAX);
        for (name, queue) in self.state().queues.iter_mut().skip(start).take(budget) {
            reaped.visited += 1;
            match queue.reclaim(now) {
                0 => {}
                count => reaped.reclaimed.push((name.clone(), count)),
            }
        }
        if reaped.visited == budget {
            reaped.next.position = cursor.position.saturating_add(budget as u64);
        }
        Ok(reaped)
    }

    async fn listen(&self, _: OnWake) -> Result<(), StoreError> {
        // There are no other servers.
        std::future::pending().await
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
