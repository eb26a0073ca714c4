//! The store in memory: the specification. One struct, one lock, plain maps, no batching.
//!
//! The other stores are compared with this one. It keeps nothing when the process ends, and is for tests and demos.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;

use super::{
    Admin, Attempt, Beaten, Clock, Consumer, Counts, Description, Fingerprint, Insert, Inserted, Leased, Millis,
    NewTask, NumberedInsert, OnWake, Outcome, PRODUCER_ANSWERS, Pop, Popped, Produce, Produced, QueueName,
    RECLAIM_STEP, ReapCursor, Reaped, Release, Released, Remember, RequestKey, Rules, SESSION_KEPT, SessionId, Sight,
    Stem, Store, StoreError, Survives, TaskId, Token, WITHDRAWN_FOR, Withdrawal, holders::Holders,
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
    ready: VecDeque<TaskId>,
    /// The last given up is last.
    dead: Vec<TaskId>,
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
    max_expiries: u32,
    used: Arc<AtomicU64>,
}

/// Whose request ids: those of inserts and of pops are apart, and count as one kind.
#[derive(PartialEq, Eq, Hash)]
enum Call {
    Insert,
    Pop,
}

struct Request {
    fingerprint: Fingerprint,
    /// Ids or tokens.
    answered: Vec<[u8; 16]>,
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
    ids: Vec<TaskId>,
}

struct Task {
    task: NewTask,
    inserted_at: Millis,
    deliveries: u32,
    expiries: u32,
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

#[derive(Default)]
struct Session {
    /// The one that has it; nobody when the store was opened since.
    stream: Option<Attempt>,
    /// When it last took a step.
    used_at: Millis,
    leases: BTreeSet<(u64, Token)>,
}

fn size_of_task(task: &NewTask) -> u64 {
    task.envelope.len() as u64 + TASK_OVERHEAD
}

impl Queue {
    fn new(store: &MemoryStore) -> Self {
        let Rules { remember, max_expiries } = store.rules;
        Self {
            used: Arc::clone(&store.used),
            max_expiries,
            dead: Vec::new(),
            tasks: HashMap::new(),
            ready: VecDeque::new(),
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
        }
    }

    fn insert(&mut self, insert: Insert, capacity: u64, now: Millis) -> Result<Inserted, StoreError> {
        if let Some(RequestKey { id, fingerprint }) = &insert.request
            && let Some(first) = self.requests.get(&(Call::Insert, id.clone()), now)
        {
            if first.fingerprint != *fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            return Ok(Inserted { ids: first.answered.iter().copied().map(TaskId).collect(), replayed: true });
        }
        let ids: Vec<TaskId> = insert.tasks.iter().map(|task| task.id).collect();
        // A second run of the same call, even if some of its tasks are gone by now.
        if ids.iter().any(|id| self.tasks.contains_key(id)) {
            return Ok(Inserted { ids, replayed: false });
        }
        self.put_at_tail(insert.tasks, capacity, now)?;
        if let Some(RequestKey { id, fingerprint }) = insert.request {
            let answered = ids.iter().map(|id| id.0).collect();
            self.requests.put((Call::Insert, id), Request { fingerprint, answered }, now);
        }
        Ok(Inserted { ids, replayed: false })
    }

    fn put_at_tail(&mut self, tasks: Vec<NewTask>, capacity: u64, now: Millis) -> Result<(), StoreError> {
        let size = tasks.iter().map(size_of_task).sum::<u64>();
        if self.used.load(Ordering::Relaxed) + size > capacity {
            return Err(StoreError::Full(format!("the store in memory holds at most {capacity} bytes")));
        }
        self.used.fetch_add(size, Ordering::Relaxed);
        self.inserted_count += tasks.len() as u64;
        for task in tasks {
            self.ready.push_back(task.id);
            self.tasks.insert(task.id, Task { task, inserted_at: now, deliveries: 0, expiries: 0 });
        }
        Ok(())
    }

    fn produce(&mut self, produce: Produce, capacity: u64, now: Millis) -> Produced {
        let remember = self.remember;
        self.producers.retain(|_, producer| !remember.has_forgotten_producer(producer.inserted_at, now));
        let mut produced = Produced::default();
        for insert in produce.inserts {
            let last = self.producers.get(&produce.producer).and_then(|producer| producer.answers.back());
            let inserted = match last {
                Some(last) if insert.number <= last.number => self.answer_again(&produce.producer, &insert),
                _ => self.insert_numbered(&produce.producer, insert, capacity, now),
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
        let replayed = answer.ids.first() != insert.tasks.first().map(|task| &task.id);
        Ok(Inserted { ids: answer.ids.clone(), replayed })
    }

    fn insert_numbered(
        &mut self,
        producer: &str,
        insert: NumberedInsert,
        capacity: u64,
        now: Millis,
    ) -> Result<Inserted, StoreError> {
        let NumberedInsert { number, fingerprint, tasks } = insert;
        let ids: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
        // A second run of the same call, so late that the producer was forgotten meanwhile.
        if !ids.iter().any(|id| self.tasks.contains_key(id)) {
            self.put_at_tail(tasks, capacity, now)?;
        }
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
        producer.answers.push_back(Answer { number, fingerprint, ids: ids.clone() });
        if producer.answers.len() > PRODUCER_ANSWERS {
            producer.answers.pop_front();
        }
        Ok(Inserted { ids, replayed: false })
    }

    fn pop(&mut self, pop: Pop, withdrawn: &Withdrawn, now: Millis) -> Result<Popped, StoreError> {
        let mut known = Vec::new();
        if let Some(request) = &pop.request
            && let Some(first) = self.requests.get(&(Call::Pop, request.key.id.clone()), now)
        {
            if first.fingerprint != request.key.fingerprint {
                return Err(StoreError::RequestIdReused);
            }
            known.clone_from(&first.answered);
        }
        let is_known = !known.is_empty();
        let acks = self.ack(&pop.acks, now);
        let reclaimed = self.reclaim(now);
        if pop.consumer.is_some_and(|consumer| !self.has_session(consumer, now)) {
            let ready = self.ready.len() as u64;
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
            let (ready, due_in) = (self.ready.len() as u64, self.due_in(now));
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
        let mut held: Vec<Token> = known.into_iter().map(Token).filter(is_held).collect();
        if held.is_empty() {
            held = (0..pop.max_tasks).map(|position| pop.stem.token(position as u16)).filter(is_held).collect();
        }
        if held.is_empty() {
            held = self.lease_from_head(&pop, now);
            if let Some(request) = pop.request.filter(|_| !held.is_empty()) {
                let RequestKey { id, fingerprint } = request.key;
                let answered = held.iter().map(|token| token.0).collect();
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
        Ok(Popped {
            acks,
            tasks,
            ready: self.ready.len() as u64,
            reclaimed,
            due_in,
            taken_over: false,
            known: is_known,
        })
    }

    fn lease_from_head(&mut self, pop: &Pop, now: Millis) -> Vec<Token> {
        let (mut held, mut bytes) = (Vec::new(), 0);
        while held.len() < pop.max_tasks
            && bytes < pop.max_bytes.max(1)
            && let Some(id) = self.ready.pop_front()
        {
            let Some(task) = self.tasks.get(&id) else { continue };
            bytes += task.task.envelope.len();
            let token = pop.stem.token(held.len() as u16);
            self.delivered += 1;
            let lease = Lease {
                id,
                order: self.delivered,
                renewed_at: now,
                deadline: now + pop.lease,
                length: pop.lease,
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

    /// True if no other stream has it.
    fn has_session(&self, consumer: Consumer, now: Millis) -> bool {
        let session = self.sessions.get(&consumer.session).filter(|session| now < session.used_at + SESSION_KEPT);
        session.and_then(|session| session.stream).is_none_or(|stream| stream == consumer.stream)
    }

    /// The session, which this stream has from now on.
    fn session(&mut self, consumer: Consumer, now: Millis) -> &mut Session {
        if self.sessions.get(&consumer.session).is_none_or(|session| now >= session.used_at + SESSION_KEPT) {
            self.sessions.retain(|_, session| now < session.used_at + SESSION_KEPT);
        }
        let session = self.sessions.entry(consumer.session).or_default();
        (session.stream, session.used_at) = (Some(consumer.stream), now);
        session
    }

    fn resume(&mut self, consumer: Consumer, lease: Millis, max_hold: Millis, now: Millis) -> Vec<(Token, Millis)> {
        let tokens: Vec<Token> = self.session(consumer, now).leases.iter().map(|(_, token)| *token).collect();
        let resume = |token| {
            let age = now.saturating_sub(self.leases.get(&token)?.renewed_at);
            if age < max_hold {
                self.extend(&token, lease, now);
            }
            Some((token, age))
        };
        tokens.into_iter().filter_map(resume).collect()
    }

    fn keep(&mut self, consumer: Consumer, tokens: &[Token], lease: Millis, now: Millis) -> Option<Vec<Outcome>> {
        if !self.has_session(consumer, now) {
            return None;
        }
        self.session(consumer, now);
        let keep = |token| match self.extend(token, lease, now) {
            Some(_) => Outcome::Applied,
            None => self.not_held(token, now),
        };
        Some(tokens.iter().map(keep).collect())
    }

    fn abandon(&mut self, consumer: Consumer, tokens: &[Token], grace: Millis, now: Millis) {
        if !self.has_session(consumer, now) {
            return;
        }
        for token in tokens {
            let Some(lease) = self.leases.get_mut(token).filter(|lease| lease.deadline > now + grace) else { continue };
            self.deadlines.remove(&(lease.deadline, lease.order, *token));
            lease.deadline = now + grace;
            self.deadlines.insert((lease.deadline, lease.order, *token));
        }
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
            expiries: task.expiries,
            left: lease.deadline.saturating_sub(now),
            expires_at: lease.deadline,
        })
    }

    fn ack(&mut self, tokens: &[Token], now: Millis) -> Vec<Outcome> {
        let ack_one = |token: &Token| match self.end_lease(token) {
            Some(lease) => {
                if let Some(gone) = self.tasks.remove(&lease.id) {
                    self.used.fetch_sub(size_of_task(&gone.task), Ordering::Relaxed);
                }
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

    fn heartbeat(&mut self, tokens: &[Token], lease: Millis, now: Millis) -> Beaten {
        let mut earliest: Option<Millis> = None;
        let beat = |token: &Token| {
            let Some(held) = self.extend(token, lease, now) else { return self.not_held(token, now) };
            held.renewed_at = now;
            earliest = Some(earliest.map_or(held.deadline, |other| other.min(held.deadline)));
            Outcome::Applied
        };
        let outcomes = tokens.iter().map(beat).collect();
        Beaten { outcomes, earliest: earliest.map(|deadline| (deadline.saturating_sub(now), deadline)) }
    }

    fn release(&mut self, release: Release, now: Millis) -> Vec<Outcome> {
        let (tokens, unsent) = match release {
            Release::PutBack(tokens) => (tokens, None),
            Release::Unsent(tokens, holder) => (tokens, Some(holder)),
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
        self.give_to_head(ended, u32::from(unsent.is_none()), 0);
        outcomes
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
            tokens.extend(first.answered.iter().copied().map(Token));
        }
        let outcomes = self.release(Release::Unsent(tokens, attempt), now);
        outcomes.iter().filter(|outcome| **outcome == Outcome::Applied).count() as u64
    }

    fn release_held(&mut self, held_for: Millis, now: Millis) -> Released {
        let old = |lease: &Lease| now.saturating_sub(lease.renewed_at) >= held_for;
        let tokens: Vec<Token> = self.leases.iter().filter(|(_, lease)| old(lease)).map(|(token, _)| *token).collect();
        let ended: Vec<Lease> = tokens.iter().filter_map(|token| self.end_lease(token)).collect();
        let count = ended.len() as u64;
        let put_back = self.give_to_head(ended, 1, 1);
        Released { put_back, dead_lettered: count - put_back }
    }

    /// Takes back the leases that ran out. Answers how many tasks went back to the head.
    fn reclaim(&mut self, now: Millis) -> u64 {
        self.acked.forget(now);
        self.requests.forget(now);
        let mut count = 0;
        let last_expired = (now, u64::MAX, Token([u8::MAX; 16]));
        loop {
            let expired = self.deadlines.range(..=last_expired).rev();
            let step: Vec<Token> = expired.take(RECLAIM_STEP).map(|(.., token)| *token).collect();
            if step.is_empty() {
                return count;
            }
            let ended: Vec<Lease> = step.iter().filter_map(|token| self.end_lease(token)).collect();
            count += self.give_to_head(ended, 1, 1);
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

    /// Answers how many; the others expired once too often.
    fn give_to_head(&mut self, mut ended: Vec<Lease>, deliveries: u32, expiries: u32) -> u64 {
        ended.sort_by_key(|lease| std::cmp::Reverse(lease.order));
        let ready_before = self.ready.len();
        for Lease { id, .. } in ended {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            task.deliveries += deliveries;
            task.expiries += expiries;
            if expiries > 0 && task.expiries >= self.max_expiries {
                self.dead.push(id);
            } else {
                self.ready.push_front(id);
            }
        }
        (self.ready.len() - ready_before) as u64
    }

    fn due_in(&self, now: Millis) -> Option<Millis> {
        self.deadlines.first().map(|(deadline, ..)| deadline.saturating_sub(now))
    }

    fn sight(&mut self, now: Millis) -> Sight {
        let reclaimed = self.reclaim(now);
        Sight { ready: self.ready.len() as u64, due_in: self.due_in(now), reclaimed }
    }
}

/// What is remembered, in two generations. A generation takes entries for the window, or until it has half of all; then
/// the older one is dropped and a new one begins. It is seen until twice the window after its beginning: so an entry is
/// remembered for at least the window and at most twice as long.
struct Memory<K, V> {
    remember: Remember,
    current: (Millis, HashMap<K, V>),
    older: (Millis, HashMap<K, V>),
}

impl<K: std::hash::Hash + Eq, V> Memory<K, V> {
    fn new(remember: Remember) -> Self {
        Self { remember, current: (0, HashMap::new()), older: (0, HashMap::new()) }
    }

    fn get(&self, key: &K, now: Millis) -> Option<&V> {
        let seen = |generation: &&(Millis, HashMap<K, V>)| now < generation.0 + 2 * self.remember.window;
        [&self.current, &self.older].into_iter().filter(seen).find_map(|generation| generation.1.get(key))
    }

    /// Drops what is not seen any more.
    fn forget(&mut self, now: Millis) {
        for (began, entries) in [&mut self.current, &mut self.older] {
            if now >= *began + 2 * self.remember.window && !entries.is_empty() {
                *entries = HashMap::new();
            }
        }
    }

    fn put(&mut self, key: K, value: V, now: Millis) {
        let (began, entries) = &self.current;
        if now >= began + self.remember.window || entries.len() as u64 >= self.remember.entries / 2 {
            self.older = std::mem::replace(&mut self.current, (now, HashMap::new()));
        }
        self.current.1.insert(key, value);
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        let now = self.clock.now();
        let queues = &mut self.state().queues;
        if let Some(known) = queues.get_mut(queue) {
            return known.insert(insert, self.capacity, now);
        }
        let mut made = Queue::new(self);
        let inserted = made.insert(insert, self.capacity, now)?;
        queues.insert(queue.clone(), made);
        Ok(inserted)
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        let now = self.clock.now();
        let queues = &mut self.state().queues;
        if let Some(known) = queues.get_mut(queue) {
            return Ok(known.produce(produce, self.capacity, now));
        }
        let mut made = Queue::new(self);
        let produced = made.produce(produce, self.capacity, now);
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

    async fn heartbeat(&self, queue: &QueueName, tokens: &[Token], lease: Millis) -> Result<Beaten, StoreError> {
        Ok(self.step(queue, |queue, _, now| queue.heartbeat(tokens, lease, now)))
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<Vec<Outcome>, StoreError> {
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
    ) -> Result<Option<Vec<Outcome>>, StoreError> {
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

#[async_trait]
impl Admin for MemoryStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        let now = self.clock.now();
        let known = &mut self.state().queues;
        let mut count = |name| {
            let queue = known.get_mut(name)?;
            queue.reclaim(now);
            let head = queue.ready.front().and_then(|id| queue.tasks.get(id));
            Some(Counts {
                ready: queue.ready.len() as u64,
                leased: queue.leases.len() as u64,
                dead: queue.dead.len() as u64,
                inserted: queue.inserted_count,
                acked: queue.acked_count,
                oldest_ready: head.map(|task| now.saturating_sub(task.inserted_at)),
            })
        };
        Ok(queues.iter().map(&mut count).collect())
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        let behind = |name: &&QueueName| after.is_none_or(|after| *name > after);
        Ok(self.state().queues.keys().filter(behind).take(max).cloned().collect())
    }

    fn describe(&self) -> Description {
        Description {
            engine: "memory".to_owned(),
            survives: Survives::Nothing,
            note: "nothing: tasks are kept in the memory of the server and are gone when it ends".to_owned(),
        }
    }
}
