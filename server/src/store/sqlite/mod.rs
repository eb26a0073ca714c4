//! The embedded store: one SQLite file, nothing to install.
//!
//! Calls from all threads go to one writing thread (`writer`), which runs those that wait in one transaction and answers
//! them when it is committed. Where every task is, is known in memory (`queue`), read from the file at the start
//! (`load`); values stay in the file. `server/migrations` has the tables. This module and those below are the only ones
//! that name the engine.

mod admin;
mod engine;
mod file;
mod leases;
mod life;
mod load;
mod memories;
mod producers;
mod queue;
mod ready;
mod requests;
mod sessions;
mod tables;
#[cfg(test)]
mod tests;
mod turn;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64, mpsc::RecvTimeoutError},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use clap::ValueEnum;

use self::{
    engine::{Engine, Setup},
    leases::PopStep,
    turn::{Step, Unreadable},
    writer::{Desk, Inbox, Job, Kind, Writer},
};
use super::{
    Beaten, Clock, Consumer, Insert, Inserted, Kept, Millis, OnWake, Outcome, Pop, Popped, Produce, Produced,
    QueueName, RECLAIM_STEP, ReapCursor, Reaped, Release, Released, Rules, Sight, Store, StoreError, Survives,
    SystemClock, Token, Withdrawal,
    lanes::{Lane, Load},
};

/// How many transactions that take leases back, end tasks and make them ready a pop or a count waits for, before it goes on though
/// the time has come for more.
const RECLAIM_ROUNDS: usize = 64;

/// What OK survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Durability {
    /// A power cut: the file is synced before the answer. A pop or heartbeat is not waited for: after a power cut its
    /// lease may be gone and the task ready again.
    Full,
    /// A kill of the server. The file is synced now and then: a power cut may take the last inserts and acks with it, and
    /// leaves the file whole.
    Normal,
    /// A kill of the server. The file is never synced: a power cut may damage it.
    Memory,
}

impl Durability {
    fn synchronous(self) -> &'static str {
        match self {
            Self::Full => "FULL",
            Self::Normal => "NORMAL",
            Self::Memory => "OFF",
        }
    }

    fn survives(self) -> (Survives, &'static str) {
        match self {
            Self::Full => (
                Survives::PowerCut,
                "a power cut, if the disk keeps what it says it synced (--durability full); a lease may be gone then, and its task ready again",
            ),
            Self::Normal => (
                Survives::ServerKill,
                "a kill of the server; a power cut can take the last of it (--durability normal)",
            ),
            Self::Memory => {
                (Survives::ServerKill, "a kill of the server; a power cut can take all of it (--durability memory)")
            }
        }
    }
}

/// Where the file is, and how the store behaves.
#[derive(Clone, Debug)]
pub struct SqliteConfig {
    /// The file; beside it lie its write-ahead log and a lock.
    pub path: PathBuf,
    /// What OK survives.
    pub durability: Durability,
    /// Inserts are refused when the file system has less room than this, in bytes.
    pub reserve: u64,
    /// The rules of its queues.
    pub rules: Rules,
    /// Bounds a call.
    pub timeout: Duration,
}

/// The store, as one thread reaches it.
pub struct SqliteStore {
    open: Arc<OpenStore>,
    desk: Desk,
}

/// What all threads share. Closed with the last of them.
struct OpenStore {
    inbox: Arc<Inbox>,
    /// Closed when the writing thread has ended.
    ended: Mutex<std::sync::mpsc::Receiver<()>>,
    setup: Arc<Setup>,
    timeout: Duration,
}

impl SqliteStore {
    /// Opens the file, or makes one where there is none. Says in a line what is wrong with it. `clock` is the machine's
    /// unless it is given.
    pub fn open(config: SqliteConfig, clock: Option<Arc<dyn Clock>>) -> Result<Self, String> {
        let SqliteConfig { path, durability, reserve, rules, timeout } = config;
        let lock = file::Lock::take(&path)?;
        let about = |error: file::OpenError| format!("{} {error}", path.display());
        let connection = file::open_or_make(&path, durability).map_err(about)?;
        let clock = match clock {
            Some(clock) => clock,
            None => {
                let latest = load::latest_time(&connection).map_err(|error| about(error.into()))?;
                Arc::new(SystemClock::not_before(latest))
            }
        };
        let reserve = Arc::new(AtomicU64::new(reserve));
        let opened = clock.now();
        let (path, unreadable) = (path.clone(), Unreadable::default());
        let setup = Arc::new(Setup { path, durability, reserve, rules, opened, clock, unreadable });
        let engine = Engine::open(&setup, connection).map_err(about)?;
        engine.accept_file_at_start().map_err(about)?;
        let inbox = Arc::new(Inbox::new());
        let writer = Writer::new(Arc::clone(&setup), Arc::clone(&inbox), engine, lock);
        let (ends, ended) = std::sync::mpsc::channel::<()>();
        thread::Builder::new()
            .name("sqlite".to_owned())
            .spawn(move || {
                // Dropped last, when the file is closed and its lock given up.
                let _ends = ends;
                writer.run();
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        let open = Arc::new(OpenStore { inbox, ended: Mutex::new(ended), setup, timeout });
        Ok(Self { open, desk: Desk::default() })
    }

    /// The same store for another thread.
    pub fn for_this_thread(&self) -> Self {
        Self { open: Arc::clone(&self.open), desk: Desk::default() }
    }

    /// Keeps so many bytes of the file system from inserts, from now on.
    #[cfg(test)]
    pub(super) fn reserve(&self, bytes: u64) {
        self.open.setup.reserve.store(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    async fn call<T: Send + 'static>(
        &self,
        kind: Kind,
        lane: Lane,
        load: Load,
        run: impl FnMut(&mut Engine) -> Step<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let OpenStore { inbox, setup, timeout, .. } = &*self.open;
        let (job, answer) = Job::new(kind, &self.desk, run);
        let ended = || StoreError::Unavailable {
            message: "the thread that writes the file has ended; the log has the cause".to_owned(),
            did_not_run: false,
        };
        inbox.push(lane, load, job)?;
        match tokio::time::timeout(*timeout, answer).await {
            Ok(answer) => answer.map_err(|_| ended())?,
            Err(_) => {
                let message = format!("{} did not answer within {timeout:?}", setup.path.display());
                Err(StoreError::Unavailable { message, did_not_run: false })
            }
        }
    }
}

impl Drop for OpenStore {
    fn drop(&mut self) {
        // What was called is done; then the thread ends and closes the file. A disk that stands still must not keep the
        // process from ending: what was answered is safe without that.
        self.inbox.close();
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(self.timeout) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(path = %self.setup.path.display(), "the file could not be closed in time");
        }
    }
}

/// Copies the store as it is at one moment into a new file, while a server may be using it. Says what is in it.
pub fn backup(path: &Path, to: &Path, rules: Rules) -> Result<String, String> {
    file::backup(path, to, rules).map_err(|error| format!("{} {error}", path.display()))
}

/// Puts a backup where there is no store. Says what is in it.
pub fn restore(from: &Path, path: &Path, rules: Rules) -> Result<String, String> {
    let _lock = file::Lock::take(path)?;
    file::restore(from, path, rules).map_err(|error| format!("{} {error}", from.display()))
}

/// Reads all of a store, and says what is in it. A server may be using it.
pub fn check(path: &Path, rules: Rules) -> Result<String, String> {
    file::check(path, rules).map_err(|error| format!("{} {error}", path.display()))
}

/// Tasks or tokens without values.
fn items(count: usize) -> Load {
    Load::new(count, 0)
}

impl SqliteStore {
    async fn pop_unless_more_ran_out(&self, queue: &QueueName, pop: Pop, anyway: bool) -> Result<PopStep, StoreError> {
        let kind = if pop.acks.is_empty() { Kind::Lease } else { Kind::Change };
        let (lane, load) = (Lane::Ordinary(Some(queue.clone())), items(pop.acks.len() + pop.max_tasks));
        let queue = queue.clone();
        self.call(kind, lane, load, move |engine| engine.step(&queue, |queue, turn| queue.pop(&pop, anyway, turn)))
            .await
    }
}

impl SqliteStore {
    /// What an insert has reached when it is answered that is to reach this: the answer comes after the sync, if there is one.
    fn reached(&self, wanted: super::Durability) -> Result<super::Durability, StoreError> {
        use super::Durability::{Accepted, Fsynced, Replicated};
        match (wanted, self.open.setup.durability) {
            (Accepted, _) | (Fsynced, Durability::Full) => Ok(wanted),
            (Fsynced, _) => Err(StoreError::DurabilityUnsupported(
                "this server does not sync its file before it answers: DURABILITY_FSYNCED wants --durability full"
                    .to_owned(),
            )),
            (Replicated, _) => Err(StoreError::DurabilityUnsupported(
                "this server keeps tasks in a file of its own, which has no replicas: DURABILITY_REPLICATED wants --store redis://…"
                    .to_owned(),
            )),
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        let durability = self.reached(insert.durability)?;
        let bytes: usize = insert.tasks.iter().map(|task| task.envelope.len()).sum();
        let (lane, load) = (Lane::Ordinary(Some(queue.clone())), Load::new(insert.tasks.len(), bytes));
        let queue = queue.clone();
        let inserted = self.call(Kind::Insert, lane, load, move |engine| engine.insert(&queue, &insert)).await?;
        Ok(Inserted { durability, ..inserted })
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        let durability = self.reached(produce.durability)?;
        let tasks = || produce.inserts.iter().flat_map(|insert| &insert.tasks);
        let load = Load::new(tasks().count(), tasks().map(|task| task.envelope.len()).sum());
        let (lane, queue) = (Lane::Ordinary(Some(queue.clone())), queue.clone());
        let produced = self.call(Kind::Insert, lane, load, move |engine| engine.produce(&queue, &produce).map(Ok));
        let mut produced = produced.await?;
        produced.inserted.iter_mut().for_each(|inserted| inserted.durability = durability);
        Ok(produced)
    }

    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError> {
        let first = self.pop_unless_more_ran_out(queue, pop.clone(), false).await?;
        if !first.more {
            return Ok(first.popped);
        }
        // Of many leases that ran out, those held longest belong at the head, and are taken back last.
        let mut reclaimed = first.popped.reclaimed;
        for _ in 0..RECLAIM_ROUNDS {
            let name = queue.clone();
            let step = self.call(Kind::Lease, Lane::Ordinary(None), items(1), move |engine| {
                engine.step(&name, |queue, turn| Ok((queue.reclaim(turn)?, queue.is_behind(turn)))).map(Ok)
            });
            let (count, more) = step.await.map_err(StoreError::after_others)?;
            reclaimed += count;
            if !more {
                break;
            }
        }
        let last = self
            .pop_unless_more_ran_out(queue, Pop { acks: Vec::new(), ..pop }, true)
            .await
            .map_err(StoreError::after_others)?
            .popped;
        Ok(Popped { acks: first.popped.acks, reclaimed: reclaimed + last.reclaimed, ..last })
    }

    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError> {
        let (queue, tokens) = (queue.clone(), tokens.to_vec());
        self.call(Kind::Change, Lane::Urgent, items(tokens.len()), move |engine| {
            engine.step(&queue, |queue, turn| queue.ack(&tokens, turn)).map(Ok)
        })
        .await
    }

    async fn heartbeat(
        &self,
        queue: &QueueName,
        tokens: &[Token],
        lease: Option<Millis>,
    ) -> Result<Beaten, StoreError> {
        let (queue, tokens) = (queue.clone(), tokens.to_vec());
        self.call(Kind::Lease, Lane::Urgent, items(tokens.len()), move |engine| {
            engine.step(&queue, |queue, turn| queue.heartbeat(&tokens, lease, turn)).map(Ok)
        })
        .await
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError> {
        let queue = queue.clone();
        let weight = match &release {
            Release::PutBack(put_back) => put_back.tokens.len(),
            Release::Unsent(tokens, _) => tokens.len(),
        };
        self.call(Kind::Change, Lane::Urgent, items(weight), move |engine| {
            engine.step(&queue, |queue, turn| queue.release(&release, turn)).map(Ok)
        })
        .await
    }

    async fn resume(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
    ) -> Result<Vec<(Token, Millis)>, StoreError> {
        let queue = queue.clone();
        self.call(Kind::Lease, Lane::Urgent, items(RECLAIM_STEP), move |engine| {
            engine.step(&queue, |queue, turn| queue.resume(consumer, lease, max_hold, turn)).map(Ok)
        })
        .await
    }

    async fn keep(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
    ) -> Result<Option<Kept>, StoreError> {
        let (queue, tokens) = (queue.clone(), tokens.to_vec());
        self.call(Kind::Lease, Lane::Urgent, items(tokens.len()), move |engine| {
            engine.step(&queue, |queue, turn| queue.keep(consumer, &tokens, lease, turn)).map(Ok)
        })
        .await
    }

    async fn abandon(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
    ) -> Result<(), StoreError> {
        let (queue, tokens) = (queue.clone(), tokens.to_vec());
        self.call(Kind::Lease, Lane::Urgent, items(tokens.len()), move |engine| {
            engine.step(&queue, |queue, turn| queue.abandon(consumer, &tokens, grace, turn)).map(Ok)
        })
        .await
    }

    async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError> {
        let queue = queue.clone();
        self.call(Kind::Change, Lane::Urgent, items(withdrawal.max_tasks), move |engine| {
            engine.step(&queue, |queue, turn| queue.withdraw(&withdrawal, turn)).map(Ok)
        })
        .await
    }

    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError> {
        // Step by step, so that other calls get their turn. Those delivered last go first: each step puts its tasks in front
        // of those of the step before.
        let name = queue.clone();
        let listed = self.call(Kind::Lease, Lane::Urgent, items(1), move |engine| {
            let list = |queue: &mut queue::Queue, turn: &mut turn::Turn<'_>| {
                let since = turn.now.checked_sub(held_for);
                Ok(since.map(|since| (since, queue.held_since(since))))
            };
            engine.step(&name, list).map(Ok)
        });
        let Some((since, tokens)) = listed.await? else { return Ok(Released::default()) };
        let mut released = Released::default();
        for tokens in tokens.chunks(RECLAIM_STEP) {
            let (name, tokens) = (queue.clone(), tokens.to_vec());
            let step = self.call(Kind::Change, Lane::Urgent, items(tokens.len()), move |engine| {
                engine.step(&name, |queue, turn| queue.release_held(&tokens, since, turn)).map(Ok)
            });
            let step = step.await.map_err(StoreError::after_others)?;
            released.put_back += step.put_back;
            released.ready += step.ready;
            released.dead_lettered += step.dead_lettered;
        }
        Ok(released)
    }

    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError> {
        let queues = queues.to_vec();
        self.call(Kind::Lease, Lane::Ordinary(None), items(queues.len()), move |engine| {
            queues
                .iter()
                .map(|queue| engine.step(queue, |queue, turn| queue.sight(turn)))
                .collect::<Result<_, _>>()
                .map(Ok)
        })
        .await
    }

    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError> {
        self.call(Kind::Lease, Lane::Ordinary(None), items(budget), move |engine| {
            let mut reaped = Reaped::default();
            let start = usize::try_from(cursor.position).unwrap_or(usize::MAX);
            let names: Vec<QueueName> = engine.names().keys().skip(start).take(budget).cloned().collect();
            reaped.visited = names.len();
            for (at, name) in names.into_iter().enumerate() {
                match engine.step(&name, |queue, turn| queue.reclaim(turn))? {
                    0 => {}
                    count => reaped.reclaimed.push((name, count)),
                }
                if engine.has_reclaimed_enough() {
                    // There may be more in this very queue.
                    reaped.visited = at + 1;
                    reaped.next.position = cursor.position.saturating_add(at as u64);
                    // The beginning is where a round ends.
                    reaped.next.part = u32::from(reaped.next.position == 0);
                    return Ok(Ok(reaped));
                }
            }
            if reaped.visited == budget {
                reaped.next.position = cursor.position.saturating_add(budget as u64);
            }
            Ok(Ok(reaped))
        })
        .await
    }

    async fn listen(&self, _: OnWake) -> Result<(), StoreError> {
        // There are no other servers.
        std::future::pending().await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.call(Kind::Lease, Lane::Own, items(1), |_| Ok(Ok(()))).await
    }
}
