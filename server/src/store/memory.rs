//! The store in memory: the specification. One struct, one lock, plain maps, no batching.
//!
//! The other stores are compared with this one. It keeps nothing when the process ends, and is for tests and demos.

mod admin;
mod inserts;
mod leases;
mod remembered;
mod sessions;
mod tasks;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
};

use async_trait::async_trait;

use self::remembered::Memory;
use super::{
    Beaten, Cause, Clock, Consumer, Durability, Fingerprint, Insert, Inserted, Kept, MAX_PRIORITY, Millis, NewTask,
    OnWake, Outcome, Plan, Pop, Popped, Produce, Produced, PutBack, QueueName, ReapCursor, Reaped, Release, Released,
    Remember, Rules, SessionId, Settings, Sight, Stem, Store, StoreError, TaskId, Token, Withdrawal, holders::Holders,
    sessions::Sessions,
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
    queues: Queues,
    withdrawn: Withdrawn,
}

type Queues = BTreeMap<QueueName, Queue>;

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
            queue.sessions = Sessions::default();
            for (token, lease) in &mut queue.leases {
                lease.deadline = now + lease.length;
                queue.deadlines.insert((lease.deadline, lease.order, *token));
                if let Some(session) = lease.session {
                    queue.sessions.load(session, (lease.order, *token), now);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every step below checks before it changes, so a panic elsewhere leaves no step half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an unknown queue, unless the insert is refused.
    fn insert_into(&self, queues: &mut Queues, name: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        let now = self.clock.now();
        if let Some(known) = queues.get_mut(name) {
            return known.insert(insert, now);
        }
        let mut made = Queue::new(self);
        let inserted = made.insert(insert, now)?;
        queues.insert(name.clone(), made);
        Ok(inserted)
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
    sessions: Sessions,
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
            sessions: Sessions::default(),
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
}

fn refuse_more(durability: Durability) -> Result<(), StoreError> {
    match durability {
        Durability::Accepted => Ok(()),
        Durability::Fsynced | Durability::Replicated => Err(StoreError::DurabilityUnsupported(
            "tasks are in the memory of the server alone (--store memory): only DURABILITY_ACCEPTED can be reached"
                .to_owned(),
        )),
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        refuse_more(insert.durability)?;
        self.insert_into(&mut self.state().queues, queue, insert)
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        refuse_more(produce.durability)?;
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
