//! A queue as it stands in memory, an index of what is in the file. Every change is made here and written to the tables in
//! the same transaction; if that fails, the whole index is thrown away and read again.
//!
//! The store in memory says what each step means. What differs is only where things are: values stay in the file.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use md5::{Digest, Md5};
use rusqlite::ffi::ErrorCode;

use super::{
    memories::{Kind, Memory, Sweeper},
    producers::Producers,
    tables::{Hold, Sql, StoredRequest, StoredTask, Tables, Tries},
};
use crate::store::{
    Attempt, Beaten, Consumer, Counts, Insert, Inserted, Leased, Millis, MintedMap, MintedState, NewTask,
    NumberedInsert, Outcome, Pop, Popped, Produce, Produced, RECLAIM_STEP, Release, Released, RequestKey, Rules,
    SESSION_KEPT, SessionId, Sight, Stem, StoreError, TaskId, Token, WITHDRAWN_FOR, Withdrawal, holders::Holders,
};

/// Acked tokens in a row of the file: 960 bytes, which SQLite keeps in the row's page.
const TOKENS_PER_ROW: usize = 60;

/// A step that was refused and changed nothing is no failure of the file.
pub(super) type Step<T> = Sql<Result<T, StoreError>>;

/// What the steps of one transaction have in common.
pub(super) struct Turn<'e> {
    pub(super) tables: Tables<'e>,
    pub(super) now: Millis,
    pub(super) next_task: &'e mut i64,
    pub(super) next_producer: &'e mut i64,
    pub(super) sweeper: &'e mut Sweeper,
    pub(super) withdrawn: &'e mut Withdrawn,
    /// How many leases this transaction may still take back.
    pub(super) reclaims: &'e mut usize,
    pub(super) unreadable: &'e Unreadable,
}

/// Tasks whose values lie on damaged pages. They must not stand in the way of the others: they stay where they are, and are
/// passed over until the next start. One that is found ends the transaction, as SQLite writes nothing more in it; so what
/// is known of them outlives the index.
#[derive(Default)]
pub(super) struct Unreadable(Mutex<BTreeSet<i64>>);

impl Unreadable {
    fn tasks(&self) -> MutexGuard<'_, BTreeSet<i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    /// Nothing for a task that cannot be read.
    fn read(&self, task: i64) -> Sql<Option<StoredTask>> {
        Ok(self.read_run(task, task, 1)?.pop())
    }

    /// Of tasks whose keys follow each other the first ones, up to so many bytes; none if the first cannot be read.
    fn read_run(&self, first: i64, mut last: i64, max_bytes: usize) -> Sql<Vec<StoredTask>> {
        let mut unreadable = self.unreadable.tasks();
        match unreadable.range(first..=last).next() {
            Some(task) if *task == first => return Ok(Vec::new()),
            Some(task) => last = task - 1,
            None => {}
        }
        let mut found = Vec::new();
        match self.tables.tasks(first, last, max_bytes, &mut found) {
            Ok(()) => Ok(found),
            Err(error) => {
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) {
                    let task = first + found.len() as i64;
                    tracing::error!(task, %error, "a task cannot be read and is passed over; `data-queue-server check` tells more");
                    unreadable.insert(task);
                }
                Err(error)
            }
        }
    }
}

/// What one transaction did of a pop.
pub(super) struct PopStep {
    pub(super) popped: Popped,
    /// More leases ran out than one transaction takes back, and nothing was popped for that.
    pub(super) more: bool,
}

/// Until when a pop must not lease any more under its stem, be its queue known already or not.
pub(super) type Withdrawn = HashMap<Stem, Millis>;

/// The hold on a task.
pub(super) struct Lease {
    pub(super) id: TaskId,
    pub(super) task: i64,
    pub(super) order: u64,
    pub(super) renewed_at: Millis,
    pub(super) deadline: Millis,
    /// What was left when it was renewed.
    pub(super) length: Millis,
    pub(super) holders: Holders,
    pub(super) session: Option<SessionId>,
}

/// The work of a consumer.
#[derive(Default)]
struct Session {
    /// The stream that has it; nobody's when the file was opened since.
    stream: Option<Attempt>,
    /// When it last took a step.
    used_at: Millis,
    leases: BTreeSet<(u64, Token)>,
}

/// Whose request ids: those of inserts and of pops are apart.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Call {
    Insert = 0,
    Pop = 1,
}

/// The key under which a request is found; who it was is in the file.
pub(super) fn request_digest(call: u8, id: &str) -> [u8; 16] {
    Md5::new().chain_update([call]).chain_update(id).finalize().into()
}

/// The queue.
pub(super) struct Queue {
    /// In the table of queues; 0 as long as it is not there.
    pub(super) key: i64,
    pub(super) ids: MintedMap<TaskId, i64>,
    pub(super) ready: VecDeque<i64>,
    /// Where the last task that came back stands: before the tail, and before all that came back earlier.
    pub(super) front: i64,
    /// Tasks that are ready, and were passed over because they cannot be read.
    passed_over: u64,
    pub(super) tries: MintedMap<i64, Tries>,
    pub(super) leases: MintedMap<Token, Lease>,
    /// Of equal deadlines, the first delivered is first.
    deadlines: BTreeSet<(Millis, u64, Token)>,
    pub(super) acked: Memory<Token, (), MintedState>,
    /// Acked in this transaction, and not written yet: the tokens, and the tasks.
    acked_now: Vec<Token>,
    gone_now: Vec<i64>,
    pub(super) requests: Memory<[u8; 16], i64>,
    sessions: HashMap<SessionId, Session>,
    pub(super) producers: Producers,
    pub(super) delivered: u64,
    pub(super) dead: u64,
    pub(super) inserted_count: u64,
    pub(super) acked_count: u64,
    max_expiries: u32,
    /// Whether the counts are to be written with this transaction.
    changed: bool,
    /// Whether this transaction has come to it.
    touched: bool,
}

impl Queue {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            key: 0,
            ids: MintedMap::default(),
            ready: VecDeque::new(),
            front: 0,
            passed_over: 0,
            tries: MintedMap::default(),
            leases: MintedMap::default(),
            deadlines: BTreeSet::new(),
            acked: Memory::new(Kind::Acked, rules.remember),
            acked_now: Vec::new(),
            gone_now: Vec::new(),
            requests: Memory::new(Kind::Requests, rules.remember),
            sessions: HashMap::new(),
            producers: Producers::new(rules.remember),
            delivered: 0,
            dead: 0,
            inserted_count: 0,
            acked_count: 0,
            max_expiries: rules.max_expiries,
            changed: false,
            touched: false,
        }
    }

    /// True for the first step of a transaction: it has to be finished.
    pub(super) fn touch(&mut self) -> bool {
        !std::mem::replace(&mut self.touched, true)
    }

    /// Puts a lease of an opened file in the index; its session is known from then on.
    pub(super) fn load_lease(&mut self, token: Token, lease: Lease, opened: Millis) {
        if let Some(session) = lease.session {
            let session = self.sessions.entry(session).or_default();
            session.used_at = opened;
            session.leases.insert((lease.order, token));
        }
        self.index_lease(token, lease);
    }

    /// Puts a lease in the index.
    fn index_lease(&mut self, token: Token, lease: Lease) {
        self.deadlines.insert((lease.deadline, lease.order, token));
        self.leases.insert(token, lease);
    }

    /// Whether the tasks that are there are those that were inserted and not acked: the check of an opened file.
    pub(super) fn balances(&self) -> bool {
        let there = (self.ready.len() + self.leases.len()) as u64 + self.dead;
        self.inserted_count == there + self.acked_count
    }

    /// `name` is written with the first insert; until then nobody else knows the queue.
    pub(super) fn insert(&mut self, name: &str, insert: &Insert, turn: &mut Turn<'_>) -> Step<Inserted> {
        let known = match &insert.request {
            Some(request) => self.recall(Call::Insert, request, turn)?,
            None => Ok(None),
        };
        match known {
            Err(refused) => return Ok(Err(refused)),
            Ok(Some(first)) => {
                return Ok(Ok(Inserted {
                    ids: first.into_iter().map(TaskId).collect(),
                    replayed: true,
                    ..Inserted::default()
                }));
            }
            Ok(None) => {}
        }
        let ids: Vec<TaskId> = insert.tasks.iter().map(|task| task.id).collect();
        // A second run of the same call, even if some of its tasks are gone by now.
        if ids.iter().any(|id| self.ids.contains_key(id)) {
            return Ok(Ok(Inserted { ids, ..Inserted::default() }));
        }
        self.put_at_tail(name, &insert.tasks, turn)?;
        if let Some(request) = &insert.request {
            self.remember_request(Call::Insert, request, ids.iter().map(|id| id.0).collect(), turn)?;
        }
        Ok(Ok(Inserted { ids, ..Inserted::default() }))
    }

    fn put_at_tail(&mut self, name: &str, tasks: &[NewTask], turn: &mut Turn<'_>) -> Sql<()> {
        if self.key == 0 {
            self.key = turn.tables.add_queue(name)?;
        }
        let mut adding = turn.tables.add_tasks(self.key, turn.now)?;
        for task in tasks {
            let key = *turn.next_task;
            *turn.next_task += 1;
            adding.add(key, task.id, &task.envelope)?;
            self.ids.insert(task.id, key);
            self.ready.push_back(key);
        }
        self.inserted_count += tasks.len() as u64;
        self.changed = true;
        Ok(())
    }

    /// Of a producer's inserts, the first ones: those that it has numbered before.
    pub(super) fn recall_numbered(&mut self, produce: &Produce, turn: &mut Turn<'_>) -> Sql<Produced> {
        self.producers.forget(turn)?;
        let mut produced = Produced::default();
        for insert in &produce.inserts {
            if self.producers.is_new(&produce.producer, insert.number, turn.now) {
                break;
            }
            match self.producers.recall(&produce.producer, insert, turn.tables)? {
                Ok(inserted) => produced.inserted.push(inserted),
                Err(refused) => return Ok(Produced { refused: Some(refused), ..produced }),
            }
        }
        Ok(produced)
    }

    /// Inserts that the producer has not numbered before.
    pub(super) fn insert_numbered(
        &mut self,
        name: &str,
        producer: &str,
        inserts: &[NumberedInsert],
        turn: &mut Turn<'_>,
    ) -> Sql<Vec<Inserted>> {
        for insert in inserts {
            // A second run of the same call, so late that the producer was forgotten meanwhile.
            if !insert.tasks.iter().any(|task| self.ids.contains_key(&task.id)) {
                self.put_at_tail(name, &insert.tasks, turn)?;
            }
        }
        self.producers.remember(self.key, producer, inserts, turn)?;
        let ids = |insert: &NumberedInsert| insert.tasks.iter().map(|task| task.id).collect();
        Ok(inserts.iter().map(|insert| Inserted { ids: ids(insert), ..Inserted::default() }).collect())
    }

    /// Whether an insert would put tasks in, and not only repeat an answer.
    pub(super) fn is_new(&self, insert: &Insert, now: Millis) -> bool {
        let request = insert.request.as_ref().map(|request| request_digest(Call::Insert as u8, &request.id));
        request.is_none_or(|digest| self.requests.get(&digest, now).is_none())
            && !insert.tasks.iter().any(|task| self.ids.contains_key(&task.id))
    }

    pub(super) fn pop(&mut self, pop: &Pop, anyway: bool, turn: &mut Turn<'_>) -> Step<PopStep> {
        let mut known = Vec::new();
        if let Some(request) = &pop.request {
            match self.recall(Call::Pop, &request.key, turn)? {
                Ok(first) => known = first.unwrap_or_default(),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        let is_known = !known.is_empty();
        let acks = self.ack(&pop.acks, turn)?;
        let reclaimed = self.reclaim(turn)?;
        let more = !anyway && self.due_in(turn.now) == Some(0);
        let taken_over = pop.consumer.is_some_and(|consumer| !self.has_session(consumer, turn.now));
        if taken_over && !more {
            let ready = self.ready.len() as u64;
            let popped = Popped { acks, tasks: Vec::new(), ready, reclaimed, due_in: None, taken_over, known: false };
            return Ok(Ok(PopStep { popped, more }));
        }
        if more || turn.withdrawn.get(&pop.stem).is_some_and(|until| turn.now < *until) {
            let (ready, due_in) = (self.ready.len() as u64, self.due_in(turn.now));
            let popped =
                Popped { acks, tasks: Vec::new(), ready, reclaimed, due_in, taken_over: false, known: is_known };
            return Ok(Ok(PopStep { popped, more }));
        }

        let is_held = |token: &Token| self.leases.contains_key(token);
        let mut held: Vec<Token> = known.into_iter().map(Token).filter(is_held).collect();
        if held.is_empty() {
            held = (0..pop.max_tasks).map(|position| pop.stem.token(position as u16)).filter(is_held).collect();
        }
        let tasks = match held.is_empty() {
            true => self.lease_from_head(pop, turn)?,
            false => self.answer_again(&held, pop, turn)?,
        };
        let due_in = if tasks.is_empty() { self.due_in(turn.now) } else { None };
        let popped = Popped {
            acks,
            tasks,
            ready: self.ready.len() as u64,
            reclaimed,
            due_in,
            taken_over: false,
            known: is_known,
        };
        Ok(Ok(PopStep { popped, more: false }))
    }

    fn lease_from_head(&mut self, pop: &Pop, turn: &mut Turn<'_>) -> Sql<Vec<Leased>> {
        if self.ready.is_empty() {
            return Ok(Vec::new());
        }
        let (mut tasks, mut bytes, max_bytes) = (Vec::new(), 0, pop.max_bytes.max(1));
        let (now, session) = (turn.now, pop.consumer.map(|consumer| consumer.session));
        let holders: Vec<Attempt> = pop.request.as_ref().map(|request| request.attempt).into_iter().collect();
        let hold = Hold {
            renewed_at: now,
            deadline: now + pop.lease.unwrap_or(30_000),
            length: pop.lease.unwrap_or(30_000),
            holders: &holders,
            session,
        };
        let mut adding = turn.tables.add_leases(&hold)?;
        while tasks.len() < pop.max_tasks
            && bytes < max_bytes
            && let Some((first, last)) = self.run_at_head(pop.max_tasks - tasks.len())
        {
            let found = turn.read_run(first, last, max_bytes - bytes)?;
            if found.is_empty() {
                self.ready.pop_front();
                self.passed_over += 1;
            }
            for (task, stored) in (first..).zip(found) {
                self.ready.pop_front();
                bytes += stored.envelope.len();
                let token = pop.stem.token(tasks.len() as u16);
                self.delivered += 1;
                let Hold { renewed_at, deadline, length, .. } = hold;
                let (id, order, holders) = (stored.id, self.delivered, Holders::new(holders.clone()));
                let lease = Lease { id, task, order, renewed_at, deadline, length, holders, session };
                adding.add(task, &token, order)?;
                tasks.push(self.delivery(token, &lease, stored, now));
                self.index_lease(token, lease);
            }
        }
        if let Some(consumer) = pop.consumer.filter(|_| !tasks.is_empty()) {
            let first = self.delivered - tasks.len() as u64;
            self.session(consumer, turn.now).leases.extend((first + 1..).zip(tasks.iter().map(|task| task.token)));
        }
        if let Some(request) = pop.request.as_ref().filter(|_| !tasks.is_empty()) {
            let tokens = tasks.iter().map(|task| task.token.0).collect();
            self.remember_request(Call::Pop, &request.key, tokens, turn)?;
        }
        Ok(tasks)
    }

    /// The first and the last of the tasks at the head whose keys follow each other, at most so many.
    fn run_at_head(&self, max_tasks: usize) -> Option<(i64, i64)> {
        let first = *self.ready.front()?;
        let follows = |(key, task): &(i64, &i64)| key == *task;
        let run = (first..).zip(&self.ready).take(max_tasks).take_while(follows).count();
        Some((first, first + run as i64 - 1))
    }

    /// What was leased before is answered to this try too.
    fn answer_again(&mut self, held: &[Token], pop: &Pop, turn: &mut Turn<'_>) -> Sql<Vec<Leased>> {
        let attempt = pop.request.as_ref().map(|request| request.attempt);
        let mut tasks = Vec::with_capacity(held.len());
        for token in held {
            let Some(lease) = self.leases.get_mut(token) else { continue };
            if lease.holders.add(attempt) {
                turn.tables.save_lease(lease)?;
            }
            let Some(stored) = turn.read(lease.task)? else { continue };
            let Some(lease) = self.leases.get(token) else { continue };
            tasks.push(self.delivery(*token, lease, stored, turn.now));
        }
        Ok(tasks)
    }

    /// A delivery as its holder sees it. The lease itself is the delivery that is not counted yet.
    fn delivery(&self, token: Token, lease: &Lease, stored: StoredTask, now: Millis) -> Leased {
        let tries = self.tries.get(&lease.task).copied().unwrap_or_default();
        Leased {
            token,
            id: stored.id,
            envelope: stored.envelope,
            inserted_at: stored.inserted_at,
            deliveries: tries.deliveries + 1,
            failures: tries.failures,
            expiries: tries.expiries,
            left: lease.deadline.saturating_sub(now),
            expires_at: lease.deadline,
        }
    }

    pub(super) fn ack(&mut self, tokens: &[Token], turn: &mut Turn<'_>) -> Sql<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(lease) = self.forget_lease(token) else {
                outcomes.push(self.not_held(token, turn.now));
                continue;
            };
            if self.tries.remove(&lease.task).is_some() {
                turn.tables.remove_tries(lease.task)?;
            }
            self.gone_now.push(lease.task);
            self.ids.remove(&lease.id);
            self.acked_count += 1;
            self.changed = true;
            self.remember_ack(*token, turn)?;
            outcomes.push(Outcome::Applied);
        }
        Ok(outcomes)
    }

    fn not_held(&self, token: &Token, now: Millis) -> Outcome {
        if self.acked.get(token, now).is_some() { Outcome::AlreadyAcked } else { Outcome::LeaseLost }
    }

    pub(super) fn heartbeat(&mut self, tokens: &[Token], lease: Millis, turn: &mut Turn<'_>) -> Sql<Beaten> {
        let now = turn.now;
        let mut earliest: Option<Millis> = None;
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else {
                outcomes.push(self.not_held(token, now));
                continue;
            };
            held.renewed_at = now;
            let until = held.deadline.max(now + lease);
            move_deadline(&mut self.deadlines, token, held, until, turn)?;
            earliest = Some(earliest.map_or(held.deadline, |other| other.min(held.deadline)));
            outcomes.push(Outcome::Applied);
        }
        Ok(Beaten {
            outcomes,
            cancelled: Vec::new(),
            earliest: earliest.map(|deadline| (deadline.saturating_sub(now), deadline)),
        })
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

    pub(super) fn resume(
        &mut self,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<Vec<(Token, Millis)>> {
        let session = self.session(consumer, turn.now);
        let tokens: Vec<Token> = session.leases.iter().map(|(_, token)| *token).collect();
        let age = |token| self.leases.get(&token).map(|held| (token, turn.now.saturating_sub(held.renewed_at)));
        let held: Vec<(Token, Millis)> = tokens.into_iter().filter_map(age).collect();
        let young = held.iter().filter(|(_, age)| *age < max_hold);
        let young: Vec<Token> = young.map(|(token, _)| *token).collect();
        self.extend(&young, lease, turn)?;
        Ok(held)
    }

    /// Nothing if another stream has the session.
    pub(super) fn keep(
        &mut self,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<Option<Vec<Outcome>>> {
        if !self.has_session(consumer, turn.now) {
            return Ok(None);
        }
        self.session(consumer, turn.now);
        self.extend(tokens, lease, turn).map(Some)
    }

    fn extend(&mut self, tokens: &[Token], lease: Millis, turn: &Turn<'_>) -> Sql<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else {
                outcomes.push(self.not_held(token, turn.now));
                continue;
            };
            let until = held.deadline.max(turn.now + lease);
            move_deadline(&mut self.deadlines, token, held, until, turn)?;
            outcomes.push(Outcome::Applied);
        }
        Ok(outcomes)
    }

    pub(super) fn abandon(
        &mut self,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        if !self.has_session(consumer, turn.now) {
            return Ok(());
        }
        for token in tokens {
            let Some(held) = self.leases.get_mut(token) else { continue };
            let until = held.deadline.min(turn.now + grace);
            self.deadlines.remove(&(held.deadline, held.order, *token));
            held.deadline = until;
            self.deadlines.insert((until, held.order, *token));
        }
        Ok(())
    }

    pub(super) fn release(&mut self, release: &Release, turn: &mut Turn<'_>) -> Sql<Vec<Outcome>> {
        let (tokens, unsent) = match release {
            Release::PutBack(put_back) => (&put_back.tokens, None),
            Release::Unsent(tokens, attempt) => (tokens, Some(*attempt)),
        };
        let mut ended = Vec::new();
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            outcomes.push(match self.leases.get_mut(token) {
                None => self.not_held(token, turn.now),
                Some(lease) => match unsent {
                    None => Outcome::Applied,
                    Some(attempt) => {
                        let holders = lease.holders.attempts().len();
                        let is_free = lease.holders.disown(attempt);
                        if !is_free && lease.holders.attempts().len() != holders {
                            turn.tables.save_lease(lease)?;
                        }
                        if is_free { Outcome::Applied } else { Outcome::LeaseLost }
                    }
                },
            });
            if outcomes.last() == Some(&Outcome::Applied) {
                ended.extend(self.end_lease(token, turn)?);
            }
        }
        self.give_to_head(ended, u32::from(unsent.is_none()), 0, turn)?;
        Ok(outcomes)
    }

    pub(super) fn withdraw(&mut self, withdrawal: &Withdrawal, turn: &mut Turn<'_>) -> Sql<u64> {
        let now = turn.now;
        turn.withdrawn.retain(|_, until| now < *until);
        turn.withdrawn.insert(withdrawal.stem, now + WITHDRAWN_FOR);
        let mut tokens: Vec<Token> =
            (0..withdrawal.max_tasks).map(|position| withdrawal.stem.token(position as u16)).collect();
        let attempt = withdrawal.request.as_ref().map(|request| request.attempt);
        if let Some(request) = &withdrawal.request
            && let Some(first) = self.find_request(Call::Pop, &request.key.id, turn)?
        {
            // It may have been answered with what an earlier try had leased.
            tokens.extend(first.answered.into_iter().map(Token));
        }
        let outcomes = self.release(&Release::Unsent(tokens, attempt), turn)?;
        Ok(outcomes.iter().filter(|outcome| **outcome == Outcome::Applied).count() as u64)
    }

    /// The tokens of leases that were not renewed since, the last delivered first.
    pub(super) fn held_since(&self, since: Millis) -> Vec<Token> {
        let mut held: Vec<(u64, Token)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.renewed_at <= since)
            .map(|(token, lease)| (lease.order, *token))
            .collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.into_iter().map(|(_, token)| token).collect()
    }

    /// Gives those of the tokens back that were not renewed since.
    pub(super) fn release_held(&mut self, tokens: &[Token], since: Millis, turn: &mut Turn<'_>) -> Sql<Released> {
        let mut ended = Vec::new();
        for token in tokens {
            if self.leases.get(token).is_some_and(|lease| lease.renewed_at <= since) {
                ended.extend(self.end_lease(token, turn)?);
            }
        }
        let count = ended.len() as u64;
        let put_back = self.give_to_head(ended, 1, 1, turn)?;
        Ok(Released { put_back, ready: put_back, dead_lettered: count - put_back })
    }

    /// Takes back the leases that ran out. Answers how many tasks went back to the head.
    pub(super) fn reclaim(&mut self, turn: &mut Turn<'_>) -> Sql<u64> {
        self.acked.forget(self.key, turn.now, turn.sweeper);
        self.requests.forget(self.key, turn.now, turn.sweeper);
        self.producers.forget(turn)?;
        let mut count = 0;
        let last_expired = (turn.now, u64::MAX, Token([u8::MAX; 16]));
        while *turn.reclaims > 0 {
            let expired = self.deadlines.range(..=last_expired).rev();
            let step: Vec<Token> = expired.take(RECLAIM_STEP).map(|(.., token)| *token).collect();
            *turn.reclaims = turn.reclaims.saturating_sub(step.len());
            let mut ended = Vec::with_capacity(step.len());
            for token in &step {
                ended.extend(self.end_lease(token, turn)?);
            }
            count += self.give_to_head(ended, 1, 1, turn)?;
            if step.len() < RECLAIM_STEP {
                break;
            }
        }
        Ok(count)
    }

    fn end_lease(&mut self, token: &Token, turn: &Turn<'_>) -> Sql<Option<Lease>> {
        let Some(lease) = self.forget_lease(token) else { return Ok(None) };
        turn.tables.remove_lease(lease.task)?;
        Ok(Some(lease))
    }

    /// Takes a lease out of the index. It is still in the file.
    fn forget_lease(&mut self, token: &Token) -> Option<Lease> {
        let lease = self.leases.remove(token)?;
        self.deadlines.remove(&(lease.deadline, lease.order, *token));
        if let Some(session) = lease.session.and_then(|session| self.sessions.get_mut(&session)) {
            session.leases.remove(&(lease.order, *token));
        }
        Some(lease)
    }

    /// Answers how many; the others expired once too often.
    fn give_to_head(&mut self, mut ended: Vec<Lease>, deliveries: u32, expiries: u32, turn: &Turn<'_>) -> Sql<u64> {
        ended.sort_by_key(|lease| std::cmp::Reverse(lease.order));
        let ready_before = self.ready.len();
        for Lease { task, .. } in ended {
            let tries = self.tries.entry(task).or_default();
            tries.deliveries += deliveries;
            tries.expiries += expiries;
            self.front -= 1;
            turn.tables.save_tries(task, self.front, *tries)?;
            if expiries > 0 && tries.expiries >= self.max_expiries {
                turn.tables.add_dead(task, turn.now)?;
                self.dead += 1;
            } else {
                self.ready.push_front(task);
            }
        }
        Ok((self.ready.len() - ready_before) as u64)
    }

    fn due_in(&self, now: Millis) -> Option<Millis> {
        self.deadlines.first().map(|(deadline, ..)| deadline.saturating_sub(now))
    }

    pub(super) fn sight(&mut self, turn: &mut Turn<'_>) -> Sql<Sight> {
        let reclaimed = self.reclaim(turn)?;
        Ok(Sight { ready: self.ready.len() as u64, due_in: self.due_in(turn.now), reclaimed })
    }

    pub(super) fn counts(&mut self, turn: &mut Turn<'_>) -> Sql<Counts> {
        self.reclaim(turn)?;
        let oldest_ready = match self.ready.front() {
            Some(head) => Some(turn.now.saturating_sub(turn.tables.inserted_at(*head)?)),
            None => None,
        };
        Ok(Counts {
            ready: self.ready.len() as u64 + self.passed_over,
            leased: self.leases.len() as u64,
            dead: self.dead,
            inserted: self.inserted_count,
            acked: self.acked_count,
            oldest_ready,
            ..Counts::default()
        })
    }

    fn find_request(&self, call: Call, id: &str, turn: &Turn<'_>) -> Sql<Option<StoredRequest>> {
        let Some((generation, place)) = self.requests.get(&request_digest(call as u8, id), turn.now) else {
            return Ok(None);
        };
        let found = turn.tables.request(self.key, generation, *place)?;
        // Of two ids with one digest the later one is known, and the other as if it was never seen.
        Ok(found.filter(|found| found.call == call as u8 && found.id == id))
    }

    /// What a request was answered; refused if it had other content.
    fn recall(&self, call: Call, request: &RequestKey, turn: &Turn<'_>) -> Step<Option<Vec<[u8; 16]>>> {
        Ok(match self.find_request(call, &request.id, turn)? {
            Some(first) if first.fingerprint != request.fingerprint => Err(StoreError::RequestIdReused),
            first => Ok(first.map(|first| first.answered)),
        })
    }

    fn remember_request(
        &mut self,
        call: Call,
        request: &RequestKey,
        answered: Vec<[u8; 16]>,
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        if self.requests.is_due(turn.now) {
            self.requests.begin(turn.tables, self.key, turn.now, turn.sweeper)?;
        }
        let generation = &mut self.requests.current;
        let place = generation.rows;
        generation.rows += 1;
        generation.entries.insert(request_digest(call as u8, &request.id), place);
        let RequestKey { id, fingerprint } = request.clone();
        turn.tables.add_request(
            self.key,
            generation.number,
            place,
            StoredRequest { call: call as u8, id, fingerprint, answered },
        )
    }

    fn remember_ack(&mut self, token: Token, turn: &mut Turn<'_>) -> Sql<()> {
        if self.acked.is_due(turn.now) {
            self.write_acked(turn.tables)?;
            self.acked.begin(turn.tables, self.key, turn.now, turn.sweeper)?;
        }
        self.acked.current.entries.insert(token, ());
        self.acked_now.push(token);
        Ok(())
    }

    fn write_acked(&mut self, tables: Tables<'_>) -> Sql<()> {
        for tokens in self.acked_now.chunks(TOKENS_PER_ROW) {
            let generation = &mut self.acked.current;
            tables.add_acked(self.key, generation.number, generation.rows, tokens)?;
            generation.rows += 1;
        }
        self.acked_now.clear();
        Ok(())
    }

    /// Nobody asks the file for an acked task any more, so all of a transaction go together: one statement for those whose
    /// keys follow each other.
    fn write_gone(&mut self, tables: Tables<'_>) -> Sql<()> {
        self.gone_now.sort_unstable();
        for run in self.gone_now.chunk_by(|task, next| task + 1 == *next) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                tables.remove_tasks(*first, *last)?;
            }
        }
        self.gone_now.clear();
        Ok(())
    }

    /// Writes what is written once a transaction.
    pub(super) fn finish(&mut self, tables: Tables<'_>) -> Sql<()> {
        self.touched = false;
        self.write_acked(tables)?;
        self.write_gone(tables)?;
        if std::mem::take(&mut self.changed) {
            tables.save_counts(self.key, self.inserted_count, self.acked_count)?;
        }
        Ok(())
    }
}

/// What is left of the lease then is what it runs for again after a restart.
fn move_deadline(
    deadlines: &mut BTreeSet<(Millis, u64, Token)>,
    token: &Token,
    held: &mut Lease,
    until: Millis,
    turn: &Turn<'_>,
) -> Sql<()> {
    deadlines.remove(&(held.deadline, held.order, *token));
    held.deadline = until;
    held.length = until.saturating_sub(turn.now);
    deadlines.insert((until, held.order, *token));
    turn.tables.save_lease(held)
}
