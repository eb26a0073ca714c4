//! The opened file and what is known of it: one transaction at a time, many steps in it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::{Connection, wal::CheckpointMode};

use super::{
    Durability,
    file::{self, Identity, OpenError},
    load::{self, Index},
    queue::Queue,
    tables::{Sql, Tables},
    turn::{Step, Turn, Unreadable},
};
use crate::store::{
    Clock, Insert, Inserted, Millis, NewTask, Produce, Produced, QueueName, Rules, Setting, Settings, StoreError,
};

/// What a task may take in the file and in the log beside its envelope, in bytes.
const TASK_OVERHEAD: u64 = 256;
/// SQLite's default, with which files are made.
const PAGE_BYTES: u64 = 4_096;
/// When the log has so many pages, they are brought into the file.
const CHECKPOINT_PAGES: i32 = 1_000;
/// Inserts that are refused again within this time are not logged again.
const LOG_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How many leases one transaction takes back, tasks that are due or whose time is over included, so that none takes long: when a
/// server was restarted, all leases of a length run out at once.
const RECLAIMS: usize = 2_000;

/// Where the store is and how it behaves.
pub(super) struct Setup {
    pub(super) path: PathBuf,
    pub(super) durability: Durability,
    /// So many bytes of the file system are not for inserts.
    pub(super) reserve: Arc<AtomicU64>,
    pub(super) rules: Rules,
    /// When this server began to serve it.
    pub(super) opened: Millis,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) unreadable: Unreadable,
}

/// The opened file and what is known of it.
pub(super) struct Engine {
    connection: Connection,
    identity: Identity,
    index: Index,
    setup: Arc<Setup>,
    /// Queues with something to write at the end of the transaction.
    touched: Vec<QueueName>,
    /// What inserts of this transaction may still take.
    room: Option<u64>,
    /// How many leases, and tasks that have waited for their time, this transaction may still see to.
    reclaims: usize,
    /// When an insert was last refused for want of room. The log has a line when that begins.
    refused_at: Option<Instant>,
    syncs: bool,
    /// How many pages the log has, as SQLite told after the last commit, and with how many it is brought into the file.
    log_pages: Arc<AtomicI32>,
    checkpoint_at: i32,
}

impl Engine {
    /// Before the start of this server, whoever holds leases could not be heard for a while.
    pub(super) fn open(setup: &Arc<Setup>, mut connection: Connection) -> Result<Self, OpenError> {
        let index = load::index(&connection, setup.rules, Some(setup.opened))?;
        let log_pages = Arc::new(AtomicI32::new(0));
        let told = Arc::clone(&log_pages);
        // In place of SQLite's own, which tells nobody when it fails.
        connection.wal_hook(Some(move |_: &mut _, pages| {
            told.store(pages, Ordering::Relaxed);
            Ok(())
        }))?;
        let identity = Identity::of(&setup.path)?;
        Ok(Self {
            connection,
            identity,
            index,
            setup: Arc::clone(setup),
            touched: Vec::new(),
            room: None,
            reclaims: 0,
            refused_at: None,
            syncs: true,
            log_pages,
            checkpoint_at: CHECKPOINT_PAGES,
        })
    }

    /// What was read of the file is sound: after a failure it may be written when the log is in the file.
    pub(super) fn accept_file(&self) -> Result<(), OpenError> {
        file::accept(&self.connection)
    }

    /// The same at the start of a server, when somebody may be reading the file for a copy.
    pub(super) fn accept_file_at_start(&self) -> Result<(), OpenError> {
        file::accept_at_start(&self.connection, &self.setup.path)
    }

    pub(super) fn names(&self) -> &BTreeMap<QueueName, Queue> {
        &self.index.queues
    }

    /// Whether the file still has its name.
    pub(super) fn is_in_place(&self) -> bool {
        Identity::of(&self.setup.path).is_ok_and(|found| found == self.identity)
    }

    /// Whether this transaction has taken back as much as one should.
    pub(super) fn has_reclaimed_enough(&self) -> bool {
        self.reclaims == 0
    }

    /// A step on a queue; on an empty one that is thrown away if the queue is unknown.
    pub(super) fn step<T>(
        &mut self,
        name: &QueueName,
        step: impl FnOnce(&mut Queue, &mut Turn<'_>) -> Sql<T>,
    ) -> Sql<T> {
        let Index { queues, next_task, next_producer, sweeper, withdrawn } = &mut self.index;
        let (tables, now, reclaims) = (Tables(&self.connection), self.setup.clock.now(), &mut self.reclaims);
        let unreadable = &self.setup.unreadable;
        let mut turn = Turn { tables, now, next_task, next_producer, sweeper, withdrawn, reclaims, unreadable };
        match queues.get_mut(name) {
            Some(queue) => {
                if queue.touch() {
                    self.touched.push(name.clone());
                }
                let (dead, inserted) = (queue.dead.len(), queue.ever.inserted);
                let done = step(queue, &mut turn);
                // Those that were imported were given up elsewhere.
                if queue.dead.len() > dead && queue.ever.inserted == inserted {
                    let count = queue.dead.len() - dead;
                    tracing::warn!(queue = name.as_str(), count, "tasks were given up: they are dead letters now");
                }
                done
            }
            None => step(&mut Queue::new(self.setup.rules), &mut turn),
        }
    }

    pub(super) fn insert(&mut self, name: &QueueName, insert: &Insert) -> Step<Inserted> {
        let known = self.index.queues.get(name);
        if known.is_none_or(|queue| queue.is_new(insert, self.setup.clock.now()))
            && let Err(refused) = self.take_room(&insert.tasks)?
        {
            return Ok(Err(refused));
        }
        self.make_queue(name);
        self.step(name, |queue, turn| queue.insert(name.as_str(), insert, turn))
    }

    fn make_queue(&mut self, name: &QueueName) {
        if !self.index.queues.contains_key(name) {
            self.index.queues.insert(name.clone(), Queue::new(self.setup.rules));
        }
    }

    /// Numbers ascend, so those that the producer has used before come first.
    pub(super) fn produce(&mut self, name: &QueueName, produce: &Produce) -> Sql<Produced> {
        let mut produced = self.step(name, |queue, turn| queue.recall_numbered(produce, turn))?;
        if produced.refused.is_some() {
            return Ok(produced);
        }
        let mut new = &produce.inserts[produced.inserted.len()..];
        for (at, insert) in new.iter().enumerate() {
            if let Err(refused) = self.take_room(&insert.tasks)? {
                produced.refused = Some(refused);
                new = &new[..at];
                break;
            }
        }
        if !new.is_empty() {
            self.make_queue(name);
            let done =
                self.step(name, |queue, turn| queue.insert_numbered(name.as_str(), &produce.producer, new, turn))?;
            produced.inserted.extend(done.inserted);
            // What was refused for want of room stands behind.
            produced.refused = done.refused.or(produced.refused);
        }
        Ok(produced)
    }

    /// Nothing if the time has come for more than one transaction does, and it has to be known what is left then.
    pub(super) fn change(&mut self, name: &QueueName, changes: &[(Setting, Option<u64>)]) -> Step<Option<Settings>> {
        self.make_queue(name);
        self.step(name, |queue, turn| {
            if queue.settings.would_spread(changes) {
                queue.reclaim(turn)?;
                if queue.is_behind(turn) {
                    return Ok(Ok(None));
                } else if !queue.ids.is_empty() {
                    return Ok(Err(StoreError::NotEmpty));
                }
            }
            queue.change(name.as_str(), changes, turn).map(|settings| Ok(Some(settings)))
        })
    }

    /// Nothing if the time has come for more than one transaction does: what is left then is not known.
    pub(super) fn drop_queue(&mut self, name: &QueueName, force: bool) -> Step<Option<bool>> {
        if !self.index.queues.contains_key(name) {
            return Ok(Ok(Some(false)));
        }
        if !force {
            let look = |queue: &mut Queue, turn: &mut Turn<'_>| {
                queue.reclaim(turn)?;
                Ok((queue.is_behind(turn), queue.ids.is_empty()))
            };
            match self.step(name, look)? {
                (true, _) => return Ok(Ok(None)),
                (false, false) => return Ok(Err(StoreError::NotEmpty)),
                (false, true) => {}
            }
        }
        if let Some(queue) = self.index.queues.remove(name) {
            queue.drop_all(Tables(&self.connection), &mut self.index.sweeper)?;
        }
        Ok(Ok(Some(true)))
    }

    /// What the file system has, and what the file has within itself; less a reserve for all that is no insert. When tasks
    /// have gone, their room is within the file, and the log may use half of the reserve.
    fn take_room(&mut self, tasks: &[NewTask]) -> Step<()> {
        let room = match self.room {
            Some(room) => room,
            None => {
                let Ok(free) = file::free_bytes(&self.setup.path) else { return Ok(Ok(())) };
                let reserve = self.setup.reserve.load(Ordering::Relaxed);
                let within = Tables(&self.connection).free_pages()? * PAGE_BYTES;
                // The log takes what is inserted a second time.
                match free < reserve / 2 {
                    true => 0,
                    false => (free + within).saturating_sub(reserve) / 2,
                }
            }
        };
        let wanted: u64 = tasks.iter().map(|task| task.envelope.len() as u64 + TASK_OVERHEAD).sum();
        self.room = Some(room.checked_sub(wanted).unwrap_or(room));
        if wanted <= room {
            return Ok(Ok(()));
        }
        let folder = self.setup.path.parent().unwrap_or(&self.setup.path).display();
        if self.refused_at.is_none_or(|at| at.elapsed() >= LOG_AGAIN_AFTER) {
            tracing::warn!(%folder, "inserts are refused: the file system has no room beside the reserve (--disk-reserve)");
        }
        self.refused_at = Some(Instant::now());
        let message = format!("the file system of {folder} has no room beside the reserve for acks (--disk-reserve)");
        Ok(Err(StoreError::Full(message)))
    }

    pub(super) fn begin(&mut self, syncs: bool) -> Sql<()> {
        let tables = Tables(&self.connection);
        if self.setup.durability == Durability::Full && syncs != self.syncs {
            tables.sync_commits(syncs)?;
            self.syncs = syncs;
        }
        self.room = None;
        self.reclaims = RECLAIMS;
        tables.begin()
    }

    pub(super) fn commit(&mut self) -> Sql<()> {
        let tables = Tables(&self.connection);
        for name in self.touched.drain(..) {
            if let Some(queue) = self.index.queues.get_mut(&name) {
                queue.finish(tables, &self.setup.unreadable)?;
            }
        }
        self.index.sweeper.sweep(tables, &self.setup.unreadable)?;
        tables.commit()
    }

    /// Brings the log into the file when it is long. What was committed is safe without that, so this is done when its
    /// callers have their answers; but if it fails, the file cannot be written.
    pub(super) fn checkpoint_if_due(&mut self) -> Sql<()> {
        if self.log_pages.load(Ordering::Relaxed) < self.checkpoint_at {
            return Ok(());
        }
        let (logged, done) = self.connection.wal_checkpoint_v2(Some("main"), CheckpointMode::PASSIVE)?;
        // Whoever reads a copy of the moment keeps the log from starting anew: then it grows for a while.
        self.checkpoint_at = if logged == done { CHECKPOINT_PAGES } else { logged.saturating_add(CHECKPOINT_PAGES) };
        self.log_pages.store(0, Ordering::Relaxed);
        Ok(())
    }
}
