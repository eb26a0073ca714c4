//! The thread that writes. It takes of the calls that wait now what is next, never lingers for more, runs them in one transaction and
//! answers them all when that is committed.
//!
//! A transaction that fails is answered as failed to each of its calls; what is known in memory is thrown away, and the
//! file opened and read again before the next one.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    engine::{Engine, Setup},
    file::{self, Lock, OpenError},
    tables::Sql,
    turn::Step,
};
use crate::store::{
    StoreError,
    lanes::{Lane, Lanes, Load},
};

/// A transaction carries so much at most, in items; some kilobytes of values count as one.
const BATCH_WEIGHT: usize = 1_024;
/// Before a file that failed is opened again.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// For how long inserts are refused after the disk turned out to be full, so that they do not fail the others.
const FULL_FOR: Duration = Duration::from_secs(1);
/// Between two looks whether the file still has its name.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(400);
/// Between two lines in the log about failures.
const LOG_AGAIN_AFTER: Duration = Duration::from_secs(5);

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
    kind: Kind,
    work: Box<dyn Work>,
    desk: Post,
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
        desk: &Desk,
        run: impl FnMut(&mut Engine) -> Step<T> + Send + 'static,
    ) -> (Self, oneshot::Receiver<Result<T, StoreError>>) {
        let (reply, answer) = oneshot::channel();
        (Self { kind, work: Box::new(Call { run, done: None, reply }), desk: desk.post() }, answer)
    }
}

/// Where the callers of a thread get their answers: those of a transaction come in one piece and are handed out by a task in
/// the thread. So the thread is woken once for all of them, and writes what they lead to together; it would be woken for
/// each otherwise, and write each by itself.
#[derive(Default)]
pub(super) struct Desk(OnceLock<Post>);

/// Its length is bounded by the calls that may wait.
type Post = mpsc::UnboundedSender<Vec<Answered>>;
type Answered = (Box<dyn Work>, Option<StoreError>);

impl Desk {
    /// Opened by the first call, in its runtime.
    fn post(&self) -> Post {
        let open = || {
            let (post, mut answers) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                while let Some(answered) = answers.recv().await {
                    hand_out(answered);
                }
            });
            post
        };
        self.0.get_or_init(open).clone()
    }
}

fn hand_out(answered: Vec<Answered>) {
    for (work, failed) in answered {
        work.answer(failed);
    }
}

/// The calls that wait for the writing thread.
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

struct Waiting {
    lanes: Lanes<Job>,
    /// False when nobody will call any more.
    is_open: bool,
    /// False when the thread has ended.
    is_served: bool,
}

impl Inbox {
    pub(super) fn new() -> Self {
        let waiting = Waiting { lanes: Lanes::default(), is_open: true, is_served: true };
        Self { waiting: Mutex::new(waiting), changed: Condvar::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a call wait, or refuses it if too many do. It is dropped if the thread has ended.
    pub(super) fn push(&self, lane: Lane, load: Load, job: Job) -> Result<(), StoreError> {
        let mut waiting = self.waiting();
        // The thread looks for more by itself, and waits only when there is nothing.
        let may_wait = waiting.lanes.is_empty();
        if waiting.is_served {
            waiting.lanes.push(lane, load, job)?;
        }
        drop(waiting);
        if may_wait {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Lets the thread end when it has done what waits.
    pub(super) fn close(&self) {
        self.waiting().is_open = false;
        self.changed.notify_one();
    }

    /// Waits until there is something to do. Nothing if there never will be.
    fn take(&self) -> Option<Vec<Job>> {
        let idle = |waiting: &mut Waiting| waiting.lanes.is_empty() && waiting.is_open;
        let mut waiting = self.waiting();
        if idle(&mut waiting) {
            drop(self.changed.wait_while(waiting, idle));
            // On a core of its own this costs nothing. On a shared one, whoever has woken this thread has more to bring.
            thread::yield_now();
            waiting = self.waiting();
        }
        Some(waiting.lanes.take(BATCH_WEIGHT)).filter(|batch| !batch.is_empty())
    }

    /// Whoever waits hears that there will be no answer.
    fn desert(&self) {
        let mut waiting = self.waiting();
        waiting.is_served = false;
        waiting.lanes = Lanes::default();
    }
}

/// The writing thread's state.
pub(super) struct Writer {
    setup: Arc<Setup>,
    inbox: Arc<Inbox>,
    engine: Option<Engine>,
    failure: Option<(Failure, Instant)>,
    /// When the disk was last found full.
    full: Option<(Failure, Instant)>,
    /// When the file was last looked for.
    looked: Instant,
    /// When a failure was last logged. One that comes back again and again must not flood the log.
    logged: Option<Instant>,
    /// Given up last.
    lock: Lock,
}

impl Writer {
    pub(super) fn new(setup: Arc<Setup>, inbox: Arc<Inbox>, engine: Engine, lock: Lock) -> Self {
        let looked = Instant::now();
        Self { setup, inbox, engine: Some(engine), failure: None, full: None, looked, logged: None, lock }
    }

    /// Writes until nobody can call any more.
    pub(super) fn run(mut self) {
        while let Some(batch) = self.inbox.take() {
            let batch = self.refuse_inserts_if_full(batch);
            self.run_batch(batch);
        }
    }

    /// Answers the rest.
    fn refuse_inserts_if_full(&mut self, batch: Vec<Job>) -> Vec<Job> {
        self.full.take_if(|(_, at)| at.elapsed() >= FULL_FOR);
        let Some((failure, _)) = &self.full else { return batch };
        let (inserts, others) = batch.into_iter().partition(|job| job.kind == Kind::Insert);
        answer(inserts, Some(failure));
        others
    }

    fn run_batch(&mut self, mut batch: Vec<Job>) {
        if batch.is_empty() {
            return;
        }
        let outcome = match self.engine() {
            Ok(engine) => transact(engine, &mut batch).map_err(|error| self.fail(&error.into())),
            Err(failure) => Err(failure),
        };
        answer(batch, outcome.err().as_ref());
        if let Some(Err(error)) = self.engine.as_mut().map(Engine::checkpoint_if_due) {
            self.fail(&error.into());
        }
    }

    /// Opens the file again if it had failed.
    fn engine(&mut self) -> Result<&mut Engine, Failure> {
        if self.looked.elapsed() >= LOOK_AGAIN_AFTER {
            self.looked = Instant::now();
            if self.engine.as_ref().is_some_and(|engine| !engine.is_in_place()) {
                let gone = "was removed or replaced while it was in use";
                self.fail(&OpenError::Refused(gone.to_owned()));
            }
        }
        if self.engine.is_none() {
            if let Some((failure, at)) = &self.failure
                && at.elapsed() < OPEN_AGAIN_AFTER
            {
                return Err(Failure { did_not_run: true, ..failure.clone() });
            }
            match self.open_again() {
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

    /// A file that vanished is not made anew.
    fn open_again(&self) -> Result<Engine, OpenError> {
        if !self.lock.is_in_place() {
            let message = "is not safe: its lock was removed, and another server may use it; start this one again";
            return Err(OpenError::Refused(message.to_owned()));
        }
        let connection = file::open(&self.setup.path, self.setup.durability)?;
        let engine = Engine::open(&self.setup, connection)?;
        engine.accept_file()?;
        Ok(engine)
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
        if failure.full {
            self.full.clone_from(&self.failure);
        }
        failure
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.inbox.desert();
    }
}

fn answer(batch: Vec<Job>, failure: Option<&Failure>) {
    let mut desks: Vec<(Post, Vec<Answered>)> = Vec::new();
    for Job { kind, work, desk } in batch {
        let answered = (work, failure.cloned().map(|failure| failure.into_error(kind)));
        match desks.iter_mut().find(|(other, _)| other.same_channel(&desk)) {
            Some((_, all)) => all.push(answered),
            None => desks.push((desk, vec![answered])),
        }
    }
    for (desk, answered) in desks {
        // A runtime that has ended may have left callers in another one.
        if let Err(mpsc::error::SendError(answered)) = desk.send(answered) {
            hand_out(answered);
        }
    }
}

fn transact(engine: &mut Engine, batch: &mut [Job]) -> Sql<()> {
    engine.begin(batch.iter().any(|job| job.kind != Kind::Lease))?;
    for job in batch {
        job.work.run(engine)?;
    }
    engine.commit()
}
