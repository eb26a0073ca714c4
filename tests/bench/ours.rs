//! DataQueue beside its peers: on Redis and in a file, with each of its ways to insert and to take.

use std::{
    mem,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use data_queue_proto::v1;
use tokio::task::JoinSet;

use crate::{
    contender::{Call, Contender, Load, Missing, Running, Ways},
    dataqueue::{self, BATCH, Client, QUEUE, Server},
    fault::Result,
    flow, handles,
    ledger::Ledger,
    process::Process,
    redis::{self, Redis},
    report::Report,
};

/// Unary calls that are under way at once.
pub(crate) const CALLERS: usize = 64;
/// Calls with a hundred tasks each that are under way at once.
const BATCH_CALLERS: usize = 4;
/// Of an Insert, a PopBatch and an Ack in a batch.
const TASKS: u64 = 100;

/// Where the tasks are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// In Redis that syncs its file every second.
    Redis,
    /// In a file, with this --durability.
    File(&'static str),
}

/// Those that can be had here, with what the tables call them; how the others get here goes into the report.
pub(crate) fn stores(report: &mut Report, measurement: &'static str) -> Vec<(&'static str, Store)> {
    let mut stores = vec![("a file, --durability normal", Store::File("normal"))];
    match redis::version() {
        Ok((name, version)) => {
            report.version(name, version);
            stores.insert(0, ("Redis", Store::Redis));
        }
        Err(missing) => report.missing(measurement, format!("DataQueue on Redis: {}", missing.install)),
    }
    stores
}

/// How its client works.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Insert, Pop, Ack: a call a task, with so many callers.
    Unary(usize),
    /// The same, with the inserts on a connection a core, and a thread each.
    Spread(usize),
    /// Pops that carry the ack of the task before.
    Fused,
    /// A hundred tasks a call.
    Batch,
    /// Consume, of what was inserted in batches.
    Consume,
    /// Produce with a task a message; taken in batches.
    Produce,
    /// Produce with a hundred tasks a message; taken in batches.
    ProduceBatches,
    /// The consumer of our own client, of what was inserted in batches.
    Consumer,
    /// The producer of our own client with a task an insert; taken in batches.
    Producer,
    /// The producer of our own client with a hundred tasks an insert; taken in batches.
    ProducerBatches,
}

/// DataQueue, on this store and used in this way.
#[derive(Clone, Copy)]
pub(crate) struct Ours {
    pub(crate) store: Store,
    pub(crate) way: Way,
}

impl Ours {
    fn store_name(self) -> String {
        match self.store {
            Store::Redis => "Redis".to_owned(),
            Store::File(durability) => format!("a file, --durability {durability}"),
        }
    }
}

#[async_trait(?Send)]
impl Contender for Ours {
    fn name(&self) -> String {
        format!("DataQueue on {}", self.store_name())
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        if self.store == Store::Redis {
            redis::version()?;
        }
        dataqueue::version()
            .map(|version| ("data-queue-server", version))
            .map_err(|_| Missing { install: "cargo build --release -p data-queue-server" })
    }

    fn ways(&self) -> Ways {
        let (insert, take) = match self.way {
            Way::Unary(CALLERS) => ("Insert, 64 callers", "Pop and Ack, 64 callers"),
            Way::Unary(_) | Way::Spread(_) => ("Insert", "Pop and Ack"),
            Way::Fused => ("", "Pop with the ack of the last, 64 callers"),
            Way::Batch => ("Insert of 100, 4 callers", "PopBatch of 100 and Ack, 4 callers"),
            Way::Consume => ("", "Consume, max_outstanding 1,000"),
            Way::Produce => ("Produce, a task a message, 1,000 in flight", ""),
            Way::ProduceBatches => ("Produce, 100 tasks a message, 64 in flight", ""),
            Way::Consumer => ("", "our client's consumer, max_outstanding 1,000"),
            Way::Producer => ("our client's producer, a task an insert, 1,000 in flight", ""),
            Way::ProducerBatches => ("our client's producer, 100 tasks an insert, 64 in flight", ""),
        };
        Ways { insert, take }
    }

    fn durability(&self) -> &'static str {
        match self.store {
            Store::Redis => redis::DURABILITY,
            Store::File(durability) => dataqueue::durability(durability),
        }
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        Ok(Box::new(Used { way: self.way, ..Used::start(self.store, directory).await? }))
    }
}

/// A server, and its Redis if it has one. It ends before its Redis does.
pub(crate) struct Used {
    pub(crate) way: Way,
    pub(crate) client: Client,
    pub(crate) server: Server,
    pub(crate) redis: Option<Redis>,
}

impl Used {
    /// Starts DataQueue on this empty directory.
    pub(crate) async fn start(store: Store, directory: &Path) -> Result<Self> {
        let redis = match store {
            Store::Redis => Some(Redis::start(directory).await?),
            Store::File(_) => None,
        };
        let url = redis.as_ref().map(Redis::url);
        let flags = match (&url, store) {
            (Some(url), _) => ["--store", url],
            (None, Store::File(durability)) => ["--durability", durability],
            (None, Store::Redis) => return Err("Redis was not started".into()),
        };
        let server = Server::start(&directory.join("data"), &flags)?;
        let client = server.client().await?;
        Ok(Self { way: Way::Batch, client, server, redis })
    }
}

#[async_trait(?Send)]
impl Running for Used {
    fn processes(&self) -> Vec<&Process> {
        let store = self.redis.as_ref().map(Redis::process);
        [Some(self.server.process()), store].into_iter().flatten().collect()
    }

    async fn produce(&self, load: &Load) -> Result<Vec<Call>> {
        match self.way {
            Way::Spread(_) => dataqueue::produce_spread(&self.server, load).await,
            _ => dataqueue::produce(&self.server, 1, load).await,
        }
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        match self.way {
            Way::Unary(callers) | Way::Spread(callers) => insert_all(&self.client, callers, 1, numbers, size).await,
            Way::Fused => insert_all(&self.client, CALLERS, 1, numbers, size).await,
            Way::Batch | Way::Consume | Way::Consumer => {
                insert_all(&self.client, BATCH_CALLERS, TASKS, numbers, size).await
            }
            Way::Produce => flow::produce(&self.client, numbers, size, 1, 1_000).await,
            Way::ProduceBatches => flow::produce(&self.client, numbers, size, TASKS, 64).await,
            Way::Producer => handles::produce(&self.server, numbers, size, 1, 1_000).await,
            Way::ProducerBatches => handles::produce(&self.server, numbers, size, TASKS, 64).await,
        }
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        match self.way {
            Way::Unary(callers) | Way::Spread(callers) => pop_all(&self.client, callers, tasks, false, ledger).await,
            Way::Fused => pop_all(&self.client, CALLERS, tasks, true, ledger).await,
            Way::Batch | Way::Produce | Way::ProduceBatches | Way::Producer | Way::ProducerBatches => {
                pop_batches(&self.client, tasks, ledger).await
            }
            Way::Consume => flow::consume(&self.client, tasks, ledger).await,
            Way::Consumer => handles::consume(&self.server, tasks, ledger).await,
        }
    }

    async fn left(&self) -> Result<u64> {
        let counts = self.server.counts().await?;
        Ok(counts.ready + counts.leased + counts.dead)
    }

    async fn memory(&self) -> Result<f64> {
        match &self.redis {
            Some(redis) => redis.used().await,
            None => self.server.process().resident(),
        }
    }
}

/// Work that callers share: each takes the next part of it until none is left.
#[derive(Clone)]
pub(crate) struct Shares {
    next: Arc<AtomicU64>,
    end: u64,
    part: u64,
}

impl Shares {
    pub(crate) fn new(work: Range<u64>, part: u64) -> Self {
        Self { next: Arc::new(AtomicU64::new(work.start)), end: work.end, part }
    }

    pub(crate) fn take(&self) -> Option<Range<u64>> {
        let start = self.next.fetch_add(self.part, Ordering::Relaxed);
        (start < self.end).then(|| start..self.end.min(start + self.part))
    }
}

/// Waits for all callers; the first that fails ends them all.
pub(crate) async fn all<T: 'static>(mut callers: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut found = Vec::new();
    while let Some(ended) = callers.join_next().await {
        found.push(ended??);
    }
    Ok(found)
}

/// A ledger that callers write in turn, on the one thread there is.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Ledger>>);

impl Shared {
    /// Takes the ledger away until [`Self::give_back`].
    pub(crate) fn new(ledger: &mut Ledger) -> Self {
        Self(Arc::new(Mutex::new(mem::replace(ledger, Ledger::new(0)))))
    }

    pub(crate) fn give_back(self, ledger: &mut Ledger) -> Result<()> {
        mem::swap(&mut *self.0.lock().map_err(|_| "a caller panicked")?, ledger);
        Ok(())
    }

    pub(crate) fn deliver(&self, payload: &[u8]) -> Result<()> {
        self.0.lock().map_err(|_| "a caller panicked")?.deliver(payload)?;
        Ok(())
    }

    pub(crate) fn acked(&self, count: u64) -> Result<()> {
        self.0.lock().map_err(|_| "a caller panicked")?.acked(count);
        Ok(())
    }
}

async fn insert_all(client: &Client, callers: usize, part: u64, numbers: Range<u64>, size: usize) -> Result<()> {
    let shares = Shares::new(numbers, part);
    let mut set = JoinSet::new();
    for _ in 0..callers {
        let (mut client, shares) = (client.clone(), shares.clone());
        set.spawn(async move {
            while let Some(numbers) = shares.take() {
                dataqueue::insert(&mut client, numbers, size).await?;
            }
            Ok(())
        });
    }
    all(set).await.map(drop)
}

/// Pops and acks so many, one a call. `fused`: the next pop carries the ack.
pub(crate) async fn pop_all(
    client: &Client,
    callers: usize,
    tasks: u64,
    fused: bool,
    ledger: &mut Ledger,
) -> Result<()> {
    let (shares, shared) = (Shares::new(0..tasks, 1), Shared::new(ledger));
    let mut set = JoinSet::new();
    for _ in 0..callers {
        let (mut client, shares, shared) = (client.clone(), shares.clone(), shared.clone());
        set.spawn(async move {
            let mut held = Vec::new();
            while shares.take().is_some() {
                let (task, acked) = pop_with(&mut client, mem::take(&mut held)).await?;
                shared.deliver(dataqueue::data(&task))?;
                shared.acked(acked)?;
                held.push(task.lease_token);
                if !fused {
                    shared.acked(dataqueue::ack(&mut client, mem::take(&mut held)).await?)?;
                }
            }
            if !held.is_empty() {
                shared.acked(dataqueue::ack(&mut client, held).await?)?;
            }
            Ok(())
        });
    }
    all(set).await?;
    shared.give_back(ledger)
}

/// A Pop with these acks: the task, and how many acks were applied.
async fn pop_with(client: &mut Client, ack_lease_tokens: Vec<String>) -> Result<(v1::Task, u64)> {
    let count = ack_lease_tokens.len();
    let request = v1::PopRequest {
        queue: QUEUE.to_owned(),
        lease: dataqueue::lease(),
        ack_lease_tokens,
        ..v1::PopRequest::default()
    };
    let answer = client.pop(request).await?.into_inner();
    let applied = answer.ack_outcomes.iter().filter(|outcome| **outcome == v1::Outcome::Applied as i32).count();
    if applied != count {
        return Err(format!("{applied} of {count} acks were applied").into());
    }
    Ok((answer.task.ok_or("a pop found nothing")?, applied as u64))
}

async fn pop_batches(client: &Client, tasks: u64, ledger: &mut Ledger) -> Result<()> {
    let (shares, shared) = (Shares::new(0..tasks, TASKS), Shared::new(ledger));
    let mut set = JoinSet::new();
    for _ in 0..BATCH_CALLERS {
        let (mut client, shares, shared) = (client.clone(), shares.clone(), shared.clone());
        set.spawn(async move {
            while let Some(part) = shares.take() {
                let tokens = pop_batch(&mut client, part.end - part.start, &shared).await?;
                shared.acked(dataqueue::ack(&mut client, tokens).await?)?;
            }
            Ok(())
        });
    }
    all(set).await?;
    shared.give_back(ledger)
}

/// Pops so many, which are there; answers their tokens.
pub(crate) async fn pop_batch(client: &mut Client, count: u64, shared: &Shared) -> Result<Vec<String>> {
    let request = v1::PopBatchRequest {
        queue: QUEUE.to_owned(),
        max_tasks: u32::try_from(count.min(BATCH))?,
        lease: dataqueue::lease(),
        ..v1::PopBatchRequest::default()
    };
    let mut stream = client.pop_batch(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(message) = stream.message().await? {
        for task in message.tasks {
            shared.deliver(dataqueue::data(&task))?;
            tokens.push(task.lease_token);
        }
    }
    if tokens.len() as u64 == count { Ok(tokens) } else { Err("a batch was smaller than what is ready".into()) }
}
