//! A queue as it stands in memory, an index of what is in the file. Every change is made here and written to the tables in
//! the same transaction; if that fails, the whole index is thrown away and read again.
//!
//! The store in memory says what each step means. What differs is only where things are: values stay in the file, and so does
//! whatever is seldom asked for. What the steps do is said where they are: inserts here, deliveries and their ends in `leases`,
//! what becomes of a task with time in `life`, what administration does in `admin`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    memories::{Kind, Memory, Sweeper},
    producers::Producers,
    ready::Ready,
    requests::{Call, ids_from_bytes, ids_to_bytes, request_digest},
    tables::{Sql, Tables, Tries},
    turn::{Step, Turn, Unreadable},
};
use crate::store::{
    Counts, Insert, Inserted, Millis, MintedMap, MintedState, NewTask, NumberedInsert, Produce, Produced, Rules,
    SessionId, Setting, Settings, Sight, StoreError, TaskId, Token, holders::Holders, sessions::Sessions,
};

/// Acked tokens in a row of the file: 960 bytes, which SQLite keeps in the row's page.
const TOKENS_PER_ROW: usize = 60;

/// The hold on a task.
pub(super) struct Lease {
    pub(super) id: TaskId,
    pub(super) task: i64,
    /// Of the envelope, in bytes.
    pub(super) size: u64,
    pub(super) order: u64,
    pub(super) renewed_at: Millis,
    pub(super) deadline: Millis,
    /// What was left when it was renewed.
    pub(super) length: Millis,
    pub(super) holders: Holders,
    pub(super) session: Option<SessionId>,
}

/// What sets a task apart, as far as it matters while it lives.
#[derive(Default)]
pub(super) struct Planned {
    pub(super) priority: u8,
    /// When its time is over.
    pub(super) ends_at: Option<Millis>,
    pub(super) unique_key: Option<Arc<str>>,
}

/// The queue.
pub(super) struct Queue {
    /// In the table of queues; 0 as long as it is not there.
    pub(super) key: i64,
    pub(super) ids: MintedMap<TaskId, i64>,
    pub(super) ready: Ready,
    /// Where the last task that came back stands: before the tail, and before all that came back earlier.
    pub(super) front: i64,
    /// Tasks that are ready, and were passed over because they cannot be read.
    pub(super) passed_over: u64,
    pub(super) tries: MintedMap<i64, Tries>,
    /// Of the tasks whose ids say that they have one.
    pub(super) plans: MintedMap<i64, Planned>,
    /// By when they fall due; of those that do so at the same time, the one with the lowest place is first.
    pub(super) scheduled: BTreeSet<(Millis, i64, i64)>,
    /// When the time of tasks that are ready or scheduled is over.
    pub(super) ends: BTreeSet<(Millis, i64)>,
    pub(super) unique: HashMap<Arc<str>, TaskId>,
    /// By when they died.
    pub(super) dead: BTreeSet<(Millis, TaskId)>,
    /// Tasks that are held, and go when they would go back.
    pub(super) cancelled: HashSet<i64, MintedState>,
    pub(super) leases: MintedMap<Token, Lease>,
    /// Of equal deadlines, the first delivered is first.
    pub(super) deadlines: BTreeSet<(Millis, u64, Token)>,
    pub(super) acked: Memory<Token, (), MintedState>,
    /// Acked in this transaction, and not written yet.
    acked_now: Vec<Token>,
    /// Tasks that went in this transaction, and are still in the file.
    pub(super) gone_now: Vec<i64>,
    pub(super) requests: Memory<[u8; 16], i64>,
    pub(super) sessions: Sessions,
    pub(super) producers: Producers,
    pub(super) delivered: u64,
    /// What the envelopes of all tasks but dead ones have in all.
    pub(super) bytes: u64,
    pub(super) ever: Ever,
    pub(super) settings: Settings,
    /// Where nothing is set.
    base: Rules,
    /// Of this queue.
    pub(super) rules: Rules,
    /// Whether the counts are to be written with this transaction.
    pub(super) changed: bool,
    /// Whether this transaction has come to it.
    touched: bool,
}

/// How many tasks there ever were, and what became of those that are gone.
#[derive(Clone, Copy, Default)]
pub(super) struct Ever {
    pub(super) inserted: u64,
    pub(super) acked: u64,
    pub(super) expired: u64,
    pub(super) deleted: u64,
    pub(super) purged: u64,
}

impl Queue {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            key: 0,
            ids: MintedMap::default(),
            ready: Ready::default(),
            front: 0,
            passed_over: 0,
            tries: MintedMap::default(),
            plans: MintedMap::default(),
            scheduled: BTreeSet::new(),
            ends: BTreeSet::new(),
            unique: HashMap::new(),
            dead: BTreeSet::new(),
            cancelled: HashSet::default(),
            leases: MintedMap::default(),
            deadlines: BTreeSet::new(),
            acked: Memory::new(Kind::Acked, rules.remember),
            acked_now: Vec::new(),
            gone_now: Vec::new(),
            requests: Memory::new(Kind::Requests, rules.remember),
            sessions: Sessions::default(),
            producers: Producers::new(rules.remember),
            delivered: 0,
            bytes: 0,
            ever: Ever::default(),
            settings: Settings::default(),
            base: rules,
            rules,
            changed: false,
            touched: false,
        }
    }

    /// True for the first step of a transaction: it has to be finished.
    pub(super) fn touch(&mut self) -> bool {
        !std::mem::replace(&mut self.touched, true)
    }

    pub(super) fn set(&mut self, setting: Setting, value: Option<u64>) {
        self.settings.set(setting, value);
        self.rules = self.settings.over(self.base);
    }

    /// Puts a lease of an opened file in the index; its session is known from then on.
    pub(super) fn load_lease(&mut self, token: Token, lease: Lease, opened: Millis) {
        if let Some(session) = lease.session {
            self.sessions.load(session, (lease.order, token), opened);
        }
        self.index_lease(token, lease);
    }

    /// Puts a lease in the index.
    pub(super) fn index_lease(&mut self, token: Token, lease: Lease) {
        self.deadlines.insert((lease.deadline, lease.order, token));
        self.leases.insert(token, lease);
    }

    /// Tasks that are ready, scheduled or leased.
    fn live(&self) -> u64 {
        (self.ready.len() + self.scheduled.len() + self.leases.len()) as u64 + self.passed_over
    }

    /// Whether the tasks that are there are those that were inserted and are not gone: the check of an opened file.
    pub(super) fn balances(&self) -> bool {
        let Ever { inserted, acked, expired, deleted, purged } = self.ever;
        let gone = acked.saturating_add(expired).saturating_add(deleted).saturating_add(purged);
        inserted == (self.live() + self.dead.len() as u64).saturating_add(gone)
    }

    /// `name` is written with the first insert; until then nobody else knows the queue.
    pub(super) fn insert(&mut self, name: &str, insert: &Insert, turn: &mut Turn<'_>) -> Step<Inserted> {
        let known = match &insert.request {
            Some(request) => self.recall(Call::Insert, request, turn)?,
            None => Ok(None),
        };
        match known {
            Err(refused) => return Ok(Err(refused)),
            Ok(Some(first)) => return Ok(Ok(ids_from_bytes(first, true))),
            Ok(None) => {}
        }
        let (second_run, inserted) = match self.put_in(name, &insert.tasks, turn)? {
            Ok(done) => done,
            Err(refused) => return Ok(Err(refused)),
        };
        if let Some(request) = insert.request.as_ref().filter(|_| !second_run) {
            self.remember_request(Call::Insert, request, ids_to_bytes(&inserted), turn)?;
        }
        Ok(Ok(inserted))
    }

    /// Puts in all tasks but duplicates. True if it is a second run of the same call, which puts nothing in, even if some of its
    /// tasks are gone by now.
    fn put_in(&mut self, name: &str, tasks: &[NewTask], turn: &mut Turn<'_>) -> Step<(bool, Inserted)> {
        let second_run = tasks.iter().any(|task| self.ids.contains_key(&task.id));
        if second_run && tasks.iter().any(|task| task.past.is_some()) {
            let ids = tasks.iter().map(|task| task.id).collect();
            return Ok(Ok((true, Inserted { ids, replayed: true, ..Inserted::default() })));
        }
        let duplicates = self.duplicates(tasks, turn)?;
        if !second_run {
            if let Err(full) = self.check_limits(tasks, &duplicates) {
                return Ok(Err(full));
            }
            self.put_at_tail(name, tasks, &duplicates, turn)?;
        }
        let mut inserted = Inserted { ids: tasks.iter().map(|task| task.id).collect(), ..Inserted::default() };
        for (at, first) in duplicates {
            inserted.ids[at] = first;
            inserted.duplicates.push(at);
        }
        Ok(Ok((second_run, inserted)))
    }

    /// The positions of tasks whose unique keys others have, and those others.
    fn duplicates(&mut self, tasks: &[NewTask], turn: &Turn<'_>) -> Sql<Vec<(usize, TaskId)>> {
        let (mut new, mut duplicates) = (HashMap::new(), Vec::new());
        for (at, task) in tasks.iter().enumerate() {
            let Some(key) = task.plan.as_ref().and_then(|plan| plan.unique_key.as_deref()) else { continue };
            if task.is_dead() {
                continue;
            }
            let first = match new.get(key) {
                Some(first) => Some(*first),
                None => self.holder_of_key(key, turn)?,
            };
            match first.filter(|first| *first != task.id) {
                Some(first) => duplicates.push((at, first)),
                None => drop(new.insert(key, task.id)),
            }
        }
        Ok(duplicates)
    }

    /// Neither duplicates nor dead letters count.
    fn check_limits(&self, tasks: &[NewTask], duplicates: &[(usize, TaskId)]) -> Result<(), StoreError> {
        let limits = [Setting::MaxTasks, Setting::MaxBytes].map(|setting| self.settings.get(setting));
        let dead = || tasks.iter().filter(|task| task.is_dead());
        if limits == [None, None] || tasks.len() == duplicates.len() + dead().count() {
            return Ok(());
        }
        let size = |task: &NewTask| task.envelope.len() as u64;
        let left_out = duplicates.iter().map(|(at, _)| size(&tasks[*at])).sum::<u64>() + dead().map(size).sum::<u64>();
        let bytes = self.bytes + tasks.iter().map(size).sum::<u64>() - left_out;
        let count = self.live() + (tasks.len() - duplicates.len() - dead().count()) as u64;
        for (setting, max, would_be) in [(Setting::MaxTasks, limits[0], count), (Setting::MaxBytes, limits[1], bytes)] {
            if let Some(max) = max.filter(|max| would_be > *max) {
                return Err(StoreError::QueueFull(setting, max));
            }
        }
        Ok(())
    }

    fn put_at_tail(
        &mut self,
        name: &str,
        tasks: &[NewTask],
        duplicates: &[(usize, TaskId)],
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        if self.key == 0 {
            self.key = turn.tables.add_queue(name)?;
        }
        let mut adding = turn.tables.add_tasks(self.key, turn.now)?;
        let mut duplicates = duplicates.iter().peekable();
        for (at, task) in tasks.iter().enumerate() {
            if duplicates.next_if(|(duplicate, _)| *duplicate == at).is_some() {
                continue;
            }
            let key = turn.next_number();
            if let Some(past) = &task.past {
                adding.inserted_at(past.inserted_at)?;
            }
            adding.add(key, task.id, &task.envelope)?;
            self.ids.insert(task.id, key);
            self.bytes += task.envelope.len() as u64;
            self.ever.inserted += 1;
            match (task.due, &task.plan, &task.past) {
                (None, None, None) => self.ready.push_back(0, key),
                _ => self.put_in_its_place(key, task, turn)?,
            }
        }
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
    ) -> Sql<Produced> {
        let mut produced = Produced::default();
        for insert in inserts {
            // It may be a second run of the same call, so late that the producer was forgotten meanwhile.
            match self.put_in(name, &insert.tasks, turn)? {
                Ok((_, inserted)) => produced.inserted.push(inserted),
                Err(refused) => {
                    produced.refused = Some(refused);
                    break;
                }
            }
        }
        let done = &inserts[..produced.inserted.len()];
        self.producers.remember(self.key, producer, done, &produced.inserted, turn)?;
        Ok(produced)
    }

    /// Whether an insert would put tasks in, and not only repeat an answer.
    pub(super) fn is_new(&self, insert: &Insert, now: Millis) -> bool {
        let request = insert.request.as_ref().map(|request| request_digest(Call::Insert as u8, &request.id));
        request.is_none_or(|digest| self.requests.get(&digest, now).is_none())
            && !insert.tasks.iter().any(|task| self.ids.contains_key(&task.id))
    }

    /// As callers see it, who could pop so many.
    pub(super) fn can_be_popped(&self) -> u64 {
        if self.settings.paused() { 0 } else { self.ready.len() as u64 }
    }

    pub(super) fn due_in(&self, now: Millis) -> Option<Millis> {
        let first_lease = self.deadlines.first().map(|(deadline, ..)| *deadline);
        let first_due = self.scheduled.first().map(|(due, ..)| *due);
        let next = first_lease.into_iter().chain(first_due).min().filter(|_| !self.settings.paused());
        next.map(|at| at.saturating_sub(now))
    }

    pub(super) fn sight(&mut self, turn: &mut Turn<'_>) -> Sql<Sight> {
        let reclaimed = self.reclaim(turn)?;
        Ok(Sight { ready: self.can_be_popped(), due_in: self.due_in(turn.now), reclaimed })
    }

    pub(super) fn counts(&mut self, turn: &mut Turn<'_>) -> Sql<Counts> {
        self.reclaim(turn)?;
        let oldest_ready = match self.ready.front() {
            Some(head) => Some(turn.now.saturating_sub(turn.tables.inserted_at(head)?)),
            None => None,
        };
        let Ever { inserted, acked, expired, deleted, purged } = self.ever;
        Ok(Counts {
            ready: self.ready.len() as u64 + self.passed_over,
            scheduled: self.scheduled.len() as u64,
            leased: self.leases.len() as u64,
            dead: self.dead.len() as u64,
            inserted,
            acked,
            expired,
            deleted,
            purged,
            oldest_ready,
            paused: self.settings.paused(),
        })
    }

    pub(super) fn remember_ack(&mut self, token: Token, turn: &mut Turn<'_>) -> Sql<()> {
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

    /// Nobody asks the file for a task that is gone any more, so all of a transaction go together: one statement for those whose
    /// keys follow each other.
    fn write_gone(&mut self, tables: Tables<'_>, unreadable: &Unreadable) -> Sql<()> {
        self.gone_now.sort_unstable();
        for run in self.gone_now.chunk_by(|task, next| task + 1 == *next) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                tables
                    .remove_tasks(*first, *last)
                    .inspect_err(|error| unreadable.look_for(tables, *first, *last, error))?;
            }
        }
        self.gone_now.clear();
        Ok(())
    }

    /// Takes it out of the file: what is large of it goes little by little.
    pub(super) fn drop_all(self, tables: Tables<'_>, sweeper: &mut Sweeper) -> Sql<()> {
        tables.drop_queue(self.key)?;
        self.acked.drop_all(self.key, sweeper);
        self.requests.drop_all(self.key, sweeper);
        self.producers.drop_all(sweeper);
        // What went in this transaction is still there.
        sweeper.drop_queue(self.key, self.ids.into_values().chain(self.gone_now).collect());
        Ok(())
    }

    /// Writes what is written once a transaction.
    pub(super) fn finish(&mut self, tables: Tables<'_>, unreadable: &Unreadable) -> Sql<()> {
        self.touched = false;
        self.write_acked(tables)?;
        self.write_gone(tables, unreadable)?;
        if std::mem::take(&mut self.changed) {
            tables.save_counts(self.key, self.ever)?;
        }
        Ok(())
    }
}
