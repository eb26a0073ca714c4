//! Gathers the calls of one thread that wait while Redis is busy, and runs them together: those of one queue and kind as one
//! script, the scripts of a batch in one write. Never waits for more to come.
//!
//! What a call is answered is what it would be answered alone. Inserts are never in one script with what drains, so that a
//! full Redis refuses only them; and a queue that cannot be read fails only its own calls.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use bb8_redis::redis::Value;
use futures_util::future;
use tokio::sync::oneshot;

use super::{
    RedisShared,
    answer::{self, InsertAnswer, PopAnswer},
    link::Links,
    nodes::{Node, Syncs},
    script::{self, Call, Hardened},
};
use crate::store::{
    Beaten, Durability, Insert, Millis, Outcome, Pop, QueueName, StoreError, Token,
    lanes::{Lane, Lanes, Load},
};

/// So many batches are on their way to Redis at once, at most: while one runs there, the next one is already there.
const BATCHES_IN_FLIGHT: usize = 2;

/// So much a script or a batch weighs at most, but for a call that is larger by itself. More would block Redis for longer
/// and gain nothing.
pub(super) const BATCH_WEIGHT: usize = 200;

/// A call of this weight is a script of its own.
const LARGE: usize = 100;

/// A call, and who waits for its answer.
pub(super) struct Ask<C, A> {
    call: C,
    reply: oneshot::Sender<Result<A, StoreError>>,
}

/// A pop, and whether it is to pop though more leases ran out than one step takes back.
pub(super) struct PopCall {
    pub(super) pop: Pop,
    pub(super) anyway: bool,
}

/// Calls that one script does: one at first, then those that were joined with it.
pub(super) enum Job {
    Insert(Vec<Ask<Insert, InsertAnswer>>),
    Pop(Vec<Ask<PopCall, PopAnswer>>),
    Ack(Vec<Ask<Vec<Token>, Vec<Outcome>>>),
    Heartbeat(Vec<Ask<Vec<Token>, Beaten>>, Option<Millis>),
    /// Any other script, and what it reached.
    Script(Vec<Ask<Call, (Value, Durability)>>, Load),
}

/// Calls that may share a script differ in nothing else.
#[derive(PartialEq, Eq, Hash)]
enum Kind {
    Insert,
    /// Without a lease, the queue's is meant.
    Pop {
        max_bytes: usize,
        lease: Option<Millis>,
        will_wait: bool,
    },
    Ack,
    Heartbeat(Option<Millis>),
}

impl Job {
    /// Leaves out those who gave their call up before its turn came; they were told that it may have run. True if nobody is
    /// left.
    fn is_given_up(&mut self) -> bool {
        fn listening<C, A>(asks: &mut Vec<Ask<C, A>>) -> bool {
            asks.retain(|ask| !ask.reply.is_closed());
            asks.is_empty()
        }
        match self {
            Self::Insert(asks) => listening(asks),
            Self::Pop(asks) => listening(asks),
            Self::Ack(asks) => listening(asks),
            Self::Heartbeat(asks, _) => listening(asks),
            Self::Script(asks, _) => listening(asks),
        }
    }

    fn load(&self) -> Load {
        fn sum<C, A>(asks: &[Ask<C, A>], of: impl Fn(&C) -> usize) -> usize {
            asks.iter().map(|ask| of(&ask.call)).sum()
        }
        match self {
            Self::Insert(asks) => {
                let bytes = |call: &Insert| call.tasks.iter().map(|task| task.envelope.len()).sum();
                Load::new(sum(asks, |call| call.tasks.len()), sum(asks, bytes))
            }
            Self::Pop(asks) => Load::new(sum(asks, |call| call.pop.max_tasks.max(call.pop.acks.len())), 0),
            Self::Ack(asks) => Load::new(sum(asks, Vec::len), 0),
            Self::Heartbeat(asks, _) => Load::new(sum(asks, Vec::len), 0),
            Self::Script(_, load) => *load,
        }
    }

    /// With what it may share a script; nothing if it is one of its own.
    fn kind(&self) -> Option<Kind> {
        if self.load().weight() >= LARGE {
            return None;
        }
        match self {
            Self::Insert(_) => Some(Kind::Insert),
            Self::Pop(asks) => asks.first().filter(|ask| ask.call.is_plain()).map(|ask| {
                let Pop { max_bytes, lease, will_wait, .. } = ask.call.pop;
                Kind::Pop { max_bytes, lease, will_wait }
            }),
            Self::Ack(_) => Some(Kind::Ack),
            Self::Heartbeat(_, lease) => Some(Kind::Heartbeat(*lease)),
            Self::Script(..) => None,
        }
    }

    /// Takes over the calls of one of the same kind.
    fn join(&mut self, other: Self) {
        match (self, other) {
            (Self::Insert(asks), Self::Insert(more)) => asks.extend(more),
            (Self::Pop(asks), Self::Pop(more)) => asks.extend(more),
            (Self::Ack(asks), Self::Ack(more)) => asks.extend(more),
            (Self::Heartbeat(asks, _), Self::Heartbeat(more, _)) => asks.extend(more),
            (_, other) => other.finish(Err(answer::unreadable()), Durability::Accepted),
        }
    }

    /// What it is to reach.
    fn durability(&self) -> Durability {
        match self {
            Self::Insert(asks) => asks.first().map(|ask| ask.call.durability).unwrap_or_default(),
            Self::Script(asks, _) => asks.first().map(|ask| ask.call.durability()).unwrap_or_default(),
            Self::Pop(_) | Self::Ack(_) | Self::Heartbeat(..) => Durability::Accepted,
        }
    }

    fn script(&self, shared: &RedisShared, queue: &QueueName) -> Call {
        let call = |source| shared.call(source, queue);
        match self {
            Self::Insert(asks) => {
                script::insert(call(&script::INSERT), queue.shard(), asks.iter().map(|ask| &ask.call))
            }
            Self::Pop(asks) => script::pop(call(&script::POP), asks.iter().map(|ask| &ask.call), &shared.rules),
            Self::Ack(asks) => call(&script::ACK).tokens(asks.iter().flat_map(|ask| &ask.call)),
            Self::Heartbeat(asks, lease) => {
                let lease = script::lease(*lease, &shared.rules);
                call(&script::HEARTBEAT).arg(lease).tokens(asks.iter().flat_map(|ask| &ask.call))
            }
            Self::Script(asks, _) => asks[0].call.clone(),
        }
    }

    /// Gives each call its part of what the script answered, or all of them the reason why it did not.
    fn finish(self, value: Result<Value, StoreError>, reached: Durability) {
        match self {
            Self::Insert(asks) => finish(asks, value, |value, calls| {
                let mut answers = answer::inserts(value, calls)?;
                answers.iter_mut().flatten().for_each(|answer| answer.inserted.durability = reached);
                Ok(answers)
            }),
            Self::Pop(asks) => finish(asks, value, answer::pops),
            Self::Ack(asks) => finish(asks, value, answer::acks),
            Self::Heartbeat(asks, _) => finish(asks, value, answer::heartbeats),
            Self::Script(asks, _) => finish(asks, value, |value, _| Ok(vec![Ok((value, reached))])),
        }
    }
}

fn finish<C, A>(
    asks: Vec<Ask<C, A>>,
    value: Result<Value, StoreError>,
    read: impl FnOnce(Value, &[C]) -> Result<Vec<Result<A, StoreError>>, StoreError>,
) {
    let (calls, replies): (Vec<C>, Vec<_>) = asks.into_iter().map(|ask| (ask.call, ask.reply)).unzip();
    let mut answers = value.and_then(|value| read(value, &calls)).map(Vec::into_iter);
    for reply in replies {
        let answer = match &mut answers {
            Ok(answers) => answers.next().unwrap_or_else(|| Err(answer::unreadable())),
            Err(error) => Err(error.clone()),
        };
        // Nobody may be listening any more.
        let _ = reply.send(answer);
    }
}

impl PopCall {
    /// It differs from others in its stem, its acks and how many tasks it wants.
    fn is_plain(&self) -> bool {
        !self.anyway && self.pop.request.is_none() && self.pop.consumer.is_none()
    }
}

/// One thread's calls that wait.
pub(super) struct Gatherer {
    shared: Arc<RedisShared>,
    links: Arc<Links>,
    state: Mutex<State>,
}

/// By node: while one does not answer, the calls of others do not wait for it. And by durability: what waits for replicas keeps
/// nobody else waiting.
type State = BTreeMap<Way, Waiting>;

type Way = (Node, Durability);

#[derive(Default)]
struct Waiting {
    lanes: Lanes<(QueueName, Job)>,
    in_flight: usize,
}

impl Gatherer {
    pub(super) fn new(shared: Arc<RedisShared>, links: Arc<Links>) -> Self {
        Self { shared, links, state: Mutex::default() }
    }

    fn state<T>(&self, way: &Way, with: impl FnOnce(&mut Waiting) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.get_mut(way) {
            Some(waiting) => with(waiting),
            None => with(state.entry(way.clone()).or_default()),
        }
    }

    /// Lets a job wait for its turn, and answers what became of it.
    pub(super) async fn run<C, A>(
        self: &Arc<Self>,
        lane: Lane,
        queue: &QueueName,
        call: C,
        job: impl FnOnce(Vec<Ask<C, A>>) -> Job,
    ) -> Result<A, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job = job(vec![Ask { call, reply }]);
        let load = job.load();
        let way = (self.shared.owner(queue), job.durability());
        let may_start = self.state(&way, |state| {
            state.lanes.push(lane, load, (queue.clone(), job))?;
            let may_start = state.in_flight < BATCHES_IN_FLIGHT;
            state.in_flight += usize::from(may_start);
            Ok::<_, StoreError>(may_start)
        })?;
        if may_start {
            tokio::spawn(Runner { gatherer: Arc::clone(self), way, is_in_flight: true }.run());
        }
        answer.await.unwrap_or_else(|_| {
            let message = "the call was dropped; the log has the cause".to_owned();
            Err(StoreError::Unavailable { message, did_not_run: false })
        })
    }

    async fn run_batch(&self, (node, durability): &Way, jobs: Vec<(QueueName, Job)>) {
        let jobs = joined(jobs);
        let calls: Vec<Call> = jobs.iter().map(|(queue, job)| job.script(&self.shared, queue)).collect();
        let answers = match durability {
            Durability::Accepted => {
                self.links.run_all(&calls).await.into_iter().map(|answer| (answer, Durability::Accepted)).collect()
            }
            durability => self.harden(node, *durability, calls).await,
        };
        for ((_, job), (answer, reached)) in jobs.into_iter().zip(answers) {
            job.finish(answer, reached);
        }
    }

    /// Runs inserts and waits until they have reached this, or it is too long. Those of a cluster each where its slot is.
    async fn harden(
        &self,
        node: &Node,
        durability: Durability,
        calls: Vec<Call>,
    ) -> Vec<(Result<Value, StoreError>, Durability)> {
        let strength = self.shared.nodes.strength(node).unwrap_or_default();
        // So that what waits behind it on the connection has its time, too.
        let patience = u64::try_from(self.shared.timeout.as_millis() / 4).unwrap_or(u64::MAX).max(1);
        let together = |calls: Vec<Call>| Hardened {
            calls,
            durability,
            replicas: strength.replicas.max(1),
            patience,
            is_synced: strength.syncs == Syncs::Always,
        };
        let batches: Vec<Vec<Call>> = match self.shared.nodes.is_cluster() {
            true => calls.into_iter().map(|call| vec![call]).collect(),
            false => vec![calls],
        };
        let done = future::join_all(batches.into_iter().map(async |calls| {
            let count = calls.len();
            match self.links.run(&together(calls)).await {
                Ok((answers, reached)) => {
                    let answer =
                        |answer: Result<_, _>| answer.map_err(|error| self.shared.presence.store_error(&error));
                    answers.into_iter().map(|one| (answer(one), reached)).collect::<Vec<_>>()
                }
                Err(error) => (0..count).map(|_| (Err(error.clone()), Durability::Accepted)).collect(),
            }
        }));
        done.await.into_iter().flatten().collect()
    }
}

/// One of those who take batches, until nothing waits.
struct Runner {
    gatherer: Arc<Gatherer>,
    way: Way,
    is_in_flight: bool,
}

impl Runner {
    async fn run(mut self) {
        loop {
            let jobs = self.gatherer.state(&self.way, |state| {
                let jobs = state.lanes.take(BATCH_WEIGHT);
                // In the same breath, so that whoever comes next knows that there is nobody to wait for.
                self.is_in_flight = !jobs.is_empty();
                state.in_flight -= usize::from(jobs.is_empty());
                jobs
            });
            if jobs.is_empty() {
                return;
            }
            self.gatherer.run_batch(&self.way, jobs).await;
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        if self.is_in_flight {
            self.gatherer.state(&self.way, |state| state.in_flight -= 1);
        }
    }
}

/// The jobs of a batch, each a script, in the order in which the first of its calls was taken.
fn joined(batch: Vec<(QueueName, Job)>) -> Vec<(QueueName, Job)> {
    let mut jobs: Vec<(QueueName, Job)> = Vec::new();
    let mut open: HashMap<(QueueName, Kind), usize> = HashMap::new();
    for (queue, mut job) in batch {
        if job.is_given_up() {
            continue;
        }
        if let Some(kind) = job.kind() {
            let key = (queue.clone(), kind);
            if let Some((_, first)) = open.get(&key).and_then(|at| jobs.get_mut(*at))
                && first.load().weight() + job.load().weight() <= BATCH_WEIGHT
            {
                first.join(job);
                continue;
            }
            open.insert(key, jobs.len());
        }
        jobs.push((queue, job));
    }
    jobs
}
