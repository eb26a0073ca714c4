//! The thread that writes. It takes the calls that wait now, never lingers for more, runs them in one transaction and
//! answers them all when that is committed.
//!
//! A transaction that fails is answered as failed to each of its calls; what is known in memory is thrown away, and the
//! file opened and read again before the next one.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{
    Durability,
    file::{self, OpenError},
    load::{self, Index},
    queue::{Queue, Step, Turn},
    tables::{Sql, Tables},
};
use crate::store::{Clock, Insert, Inserted, QueueName, Rules, StoreError};

/// A transaction carries so much at most, in items; some kilobytes of values count as one.
const BATCH_WEIGHT: usize = 1_024;
/// How many bytes count as an item.
pub(super) const BYTES_PER_ITEM: usize = 4_096;
/// Before a file that failed is opened again.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Between two lines in the log about failures.
const LOG_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What a task may take in the file and in the log beside its envelope, in bytes.
const TASK_OVERHEAD: u64 = 256;

/// What a call does to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing, or leases. After a power cut those may be gone, and their tasks ready again: no sync is needed.
    Lease,
    /// What must not be lost once it is answered.
    Change,
    /// The same, and it is what has to stop when there is no room.
    Insert,
}

/// Where the store is and how it behaves.
pub(super) struct Setup {
    pub(super) path: PathBuf,
    pub(super) durability: Durability,
    /// So many bytes of the file system are not for inserts.
    pub(super) reserve: Arc<AtomicU64>,
    pub(super) rules: Rules,
    pub(super) clock: Arc<dyn Clock>,
}

/// The opened file and what is known of it.
pub(super) struct Engine {
    connection: Connection,
    index: Index,
    setup: Arc<Setup>,
    /// Queues with something to write at the end of the transaction.
    touched: Vec<QueueName>,
    /// What inserts of this transaction may still take.
    room: Option<u64>,
    syncs: bool,
}

impl Engine {
    /// At the start of a server, whoever holds leases could not be heard for a while. A file that vanishes while the server
    /// runs is not made anew.
    pub(super) fn open(setup: &Arc<Setup>, connection: Connection, restarted: bool) -> Result<Self, OpenError> {
        let renewed = restarted.then(|| setup.clock.now());
        let index = load::index(&connection, setup.rules, renewed)?;
        let (setup, touched) = (Arc::clone(setup), Vec::new());
        Ok(Self { connection, index, setup, touched, room: None, syncs: true })
    }

    pub(super) fn names(&self) -> &BTreeMap<QueueName, Queue> {
        &self.index.queues
    }

    /// A step on a queue; on an empty one that is thrown away if the queue is unknown.
    pub(super) fn step<T>(
        &mut self,
        name: &QueueName,
        step: impl FnOnce(&mut Queue, &mut Turn<'_>) -> Sql<T>,
    ) -> Sql<T> {
        let Index { queues, next_task, sweeper } = &mut self.index;
        let mut turn = Turn { tables: Tables(&self.connection), now: self.setup.clock.now(), next_task, sweeper };
        match queues.get_mut(name) {
            Some(queue) => {
                if queue.touch() {
                    self.touched.push(name.clone());
                }
                step(queue, &mut turn)
            }
            None => step(&mut Queue::new(self.setup.rules), &mut turn),
        }
    }

    pub(super) fn insert(&mut self, name: &QueueName, insert: &Insert) -> Step<Inserted> {
        let new = Queue::new(self.setup.rules);
        let is_new = self.index.queues.get(name).unwrap_or(&new).is_new(insert, self.setup.clock.now());
        if is_new && let Err(refused) = self.take_room(insert)? {
            return Ok(Err(refused));
        }
        if self.index.queues.contains_key(name) {
            return self.step(name, |queue, turn| queue.insert(name.as_str(), insert, turn));
        }
        self.index.queues.insert(name.clone(), new);
        self.step(name, |queue, turn| queue.insert(name.as_str(), insert, turn))
    }

    /// What the file system has, and what the file has within itself; less a reserve for all that is no insert. When tasks
    /// have gone, their room is within the file, and the log may use half of the reserve.
    fn take_room(&mut self, insert: &Insert) -> Step<()> {
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
        let wanted: u64 = insert.tasks.iter().map(|task| task.envelope.len() as u64 + TASK_OVERHEAD).sum();
        self.room = Some(room.saturating_sub(wanted));
        if wanted <= room {
            return Ok(Ok(()));
        }
        let folder = self.setup.path.parent().unwrap_or(&self.setup.path).display();
        let message = format!("the file system of {folder} has no room beside the reserve for acks (--disk-reserve)");
        Ok(Err(StoreError::Full(message)))
    }

    fn begin(&mut self, syncs: bool) -> Sql<()> {
        if self.setup.durability == Durability::Full && syncs != self.syncs {
            self.connection.pragma_update(None, "synchronous", if syncs { "FULL" } else { "NORMAL" })?;
            self.syncs = syncs;
        }
        self.room = None;
        Tables(&self.connection).begin()
    }

    fn commit(&mut self) -> Sql<()> {
        let tables = Tables(&self.connection);
        for name in self.touched.drain(..) {
            if let Some(queue) = self.index.queues.get_mut(&name) {
                queue.finish(tables)?;
            }
        }
        self.index.sweeper.sweep(tables)?;
        tables.commit()
    }
}

const PAGE_BYTES: u64 = 4_096;

/// Why a transaction failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    message: String,
    full: bool,
    did_not_run: bool,
}

impl Failure {
    fn new(error: &OpenError, setup: &Setup) -> Self {
        let full = matches!(error, OpenError::Sql(error) if file::is_full(error));
        Self { message: format!("{} {error}", setup.path.display()), full, did_not_run: full }
    }

    fn into_error(self, kind: Kind) -> StoreError {
        let Self { message, full, did_not_run } = self;
        match kind {
            Kind::Insert if full => StoreError::Full(message),
            _ => StoreError::Unavailable { message, did_not_run },
        }
    }
}

/// A call on its way to the file.
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) weight: usize,
    work: Box<dyn Work>,
}

trait Work: Send {
    /// Within the transaction.
    fn run(&mut self, engine: &mut Engine) -> Sql<()>;

    /// After it.
    fn answer(self: Box<Self>, failed: Option<StoreError>);
}

struct Call<F, T> {
    run: F,
    done: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T: Send, F: FnMut(&mut Engine) -> Step<T> + Send> Work for Call<F, T> {
    fn run(&mut self, engine: &mut Engine) -> Sql<()> {
        // Who made the call may have given it up before its turn came; it was told that it may have run.
        if !self.reply.is_closed() {
            self.done = Some((self.run)(engine)?);
        }
        Ok(())
    }

    fn answer(self: Box<Self>, failed: Option<StoreError>) {
        if let Some(answer) = failed.map(Err).or(self.done) {
            // Nobody may be listening any more.
            let _ = self.reply.send(answer);
        }
    }
}

impl Job {
    pub(super) fn new<T: Send + 'static>(
        kind: Kind,
        weight: usize,
        run: impl FnMut(&mut Engine) -> Step<T> + Send + 'static,
    ) -> (Self, oneshot::Receiver<Result<T, StoreError>>) {
        let (reply, answer) = oneshot::channel();
        (Self { kind, weight: weight.max(1), work: Box::new(Call { run, done: None, reply }) }, answer)
    }
}

/// The writing thread's state.
pub(super) struct Writer {
    setup: Arc<Setup>,
    inbox: mpsc::Receiver<Job>,
    engine: Option<Engine>,
    failure: Option<(Failure, Instant)>,
    /// When a failure was last logged. One that comes back again and again must not flood the log.
    logged: Option<Instant>,
}

impl Writer {
    pub(super) fn new(setup: Arc<Setup>, inbox: mpsc::Receiver<Job>, engine: Engine) -> Self {
        Self { setup, inbox, engine: Some(engine), failure: None, logged: None }
    }

    /// Writes until nobody can call any more.
    pub(super) fn run(mut self) {
        while let Some(first) = self.inbox.blocking_recv() {
            let mut weight = first.weight;
            let mut batch = vec![first];
            while weight < BATCH_WEIGHT
                && let Ok(next) = self.inbox.try_recv()
            {
                weight += next.weight;
                batch.push(next);
            }
            self.run_batch(batch);
        }
    }

    fn run_batch(&mut self, mut batch: Vec<Job>) {
        let outcome = match self.engine() {
            Ok(engine) => transact(engine, &mut batch).map_err(|error| self.fail(&error.into())),
            Err(failure) => Err(failure),
        };
        let failure = outcome.err();
        for Job { kind, work, .. } in batch {
            work.answer(failure.clone().map(|failure| failure.into_error(kind)));
        }
    }

    /// Opens the file again if it had failed.
    fn engine(&mut self) -> Result<&mut Engine, Failure> {
        if self.engine.is_none() {
            if let Some((failure, at)) = &self.failure
                && at.elapsed() < OPEN_AGAIN_AFTER
            {
                return Err(Failure { did_not_run: true, ..failure.clone() });
            }
            let opened = file::open(&self.setup.path, self.setup.durability);
            match opened.and_then(|connection| Engine::open(&self.setup, connection, false)) {
                Ok(engine) => {
                    tracing::debug!(path = %self.setup.path.display(), "the file is open again");
                    self.failure = None;
                    self.engine = Some(engine);
                }
                Err(error) => return Err(Failure { did_not_run: true, ..self.fail(&error) }),
            }
        }
        self.engine.as_mut().ok_or_else(|| Failure {
            message: "the file is not open".to_owned(),
            full: false,
            did_not_run: true,
        })
    }

    /// Nothing that was known can be relied on: the index may be ahead of the file.
    fn fail(&mut self, error: &OpenError) -> Failure {
        let failure = Failure::new(error, &self.setup);
        if self.logged.is_none_or(|at| at.elapsed() >= LOG_AGAIN_AFTER) {
            tracing::error!(error = failure.message, "the store failed; its file is opened again until that works");
            self.logged = Some(Instant::now());
        }
        self.engine = None;
        self.failure = Some((failure.clone(), Instant::now()));
        failure
    }
}

fn transact(engine: &mut Engine, batch: &mut [Job]) -> Sql<()> {
    engine.begin(batch.iter().any(|job| job.kind != Kind::Lease))?;
    for job in batch {
        job.work.run(engine)?;
    }
    engine.commit()
}
