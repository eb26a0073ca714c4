//! DataQueue: the server's binary, and the calls that the measurements make.

use std::{
    env,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use data_queue_proto::v1::{
    self, data_queue_client::DataQueueClient, new_task, queue_admin_client::QueueAdminClient, task,
};
use tokio::task::JoinSet;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::{
    contender::{Call, Contender, Load, Missing, Running},
    fault::Result,
    ledger::{Ledger, payload},
    options::Options,
    process::{self, Process},
    scratch::Scratch,
};

pub(crate) type Client = DataQueueClient<Channel>;

/// The most tasks of an Insert, and tokens of an Ack.
pub(crate) const BATCH: u64 = 1_000;
/// The most tasks of a PopBatch.
const POP_BATCH: u32 = 10_000;
/// Longer than any run: no lease runs out.
pub(crate) const LEASE_SECONDS: u64 = 6 * 60 * 60;
pub(crate) const QUEUE: &str = "bench";

/// The server's binary. Cargo puts it two directories above this program.
fn binary() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let path = program.ancestors().nth(2).map(|directory| directory.join("data-queue-server"));
    path.filter(|path| path.exists()).ok_or_else(|| "the server is not built: use tests/bench/run".into())
}

pub(crate) fn version() -> Result<String> {
    let path = binary()?;
    let version = process::version(&path.display().to_string(), "--version");
    Ok(version.unwrap_or_default().replace("data-queue-server ", ""))
}

/// What an answer survives with this --durability.
pub(crate) fn durability(setting: &str) -> &'static str {
    match setting {
        "full" => "fsync before OK",
        "normal" => "fsync now and then",
        _ => "no fsync",
    }
}

pub(crate) fn lease() -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: LEASE_SECONDS.cast_signed(), nanos: 0 })
}

pub(crate) fn new_task(number: u64, size: usize) -> v1::NewTask {
    v1::NewTask { value: Some(new_task::Value::Data(payload(number, size))), ..v1::NewTask::default() }
}

/// A running server.
pub(crate) struct Server {
    process: Process,
    address: SocketAddr,
    /// From the start of the process until it said that it listens.
    pub(crate) started_in: Duration,
}

impl Server {
    /// Starts a server on this data directory, or on another store that is in the flags.
    pub(crate) fn start(directory: &Path, flags: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary()?);
        // What is set in the environment is not what the table says.
        for (name, _) in env::vars().filter(|(name, _)| name.starts_with("DATA_QUEUE_")) {
            command.env_remove(name);
        }
        command.args(["--listen", "127.0.0.1:0", "--log-level", "warn"]);
        if !flags.contains(&"--store") {
            command.arg("--data-dir").arg(directory);
        }
        Self::run(command.args(flags), directory)
    }

    /// Starts a server that says where it listens as ours does, and logs beside this directory.
    pub(crate) fn run(command: &mut Command, directory: &Path) -> Result<Self> {
        let start = Instant::now();
        let mut process = Process::start("server", command, &directory.with_extension("log"))?;
        let address = process.line("listening on ")?.parse()?;
        Ok(Self { process, address, started_in: start.elapsed() })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Stops it as an operator does.
    pub(crate) async fn stop(self) -> Result<()> {
        self.process.stop().await
    }

    /// SIGKILL.
    pub(crate) fn kill(self) -> Result<()> {
        self.process.kill()
    }

    async fn channel(&self) -> Result<Channel> {
        channel(self.address).await
    }

    /// A client on a connection of its own.
    pub(crate) async fn client(&self) -> Result<Client> {
        client(self.address).await
    }

    pub(crate) async fn counts(&self) -> Result<v1::QueueCounts> {
        let mut admin = QueueAdminClient::new(self.channel().await?);
        match admin.get_queue(v1::GetQueueRequest { queue: QUEUE.to_owned() }).await {
            Ok(answer) => Ok(answer.into_inner().queue.and_then(|queue| queue.counts).unwrap_or_default()),
            Err(status) if status.code() == Code::NotFound => Ok(v1::QueueCounts::default()),
            Err(status) => Err(status.into()),
        }
    }

    /// Changes settings of the queue.
    pub(crate) async fn set(&self, settings: v1::QueueSettings, mask: prost_types::FieldMask) -> Result<()> {
        let mut admin = QueueAdminClient::new(self.channel().await?);
        let request =
            v1::UpdateQueueRequest { queue: QUEUE.to_owned(), settings: Some(settings), update_mask: Some(mask) };
        admin.update_queue(request).await?;
        Ok(())
    }

    /// What the server says that it keeps tasks in.
    pub(crate) async fn store(&self) -> Result<String> {
        let mut admin = QueueAdminClient::new(self.channel().await?);
        Ok(admin.get_server_info(v1::GetServerInfoRequest {}).await?.into_inner().store)
    }

    /// Inserts these tasks, a batch after the other.
    pub(crate) async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let mut client = self.client().await?;
        let mut next = numbers.start;
        while next < numbers.end {
            let batch = next..numbers.end.min(next + BATCH);
            next = batch.end;
            insert(&mut client, batch, size).await?;
        }
        Ok(())
    }

    /// Pops and acks in batches: so many tasks, or all that are ready.
    pub(crate) async fn drain(&self, tasks: Option<u64>, ledger: &mut Ledger) -> Result<()> {
        let mut client = self.client().await?;
        let end = tasks.map(|tasks| ledger.delivered() + tasks);
        loop {
            let left = end.map_or(u64::MAX, |end| end - ledger.delivered());
            let before = ledger.delivered();
            if left > 0 {
                take(&mut client, u32::try_from(left).unwrap_or(POP_BATCH).min(POP_BATCH), ledger).await?;
            }
            if ledger.delivered() == before {
                return if end.is_none() || left == 0 { Ok(()) } else { Err("the queue was empty too early".into()) };
            }
        }
    }

    /// Nothing is left, and as many acks as tasks were counted.
    pub(crate) async fn is_empty_after(&self, tasks: u64) -> Result<()> {
        let counts = self.counts().await?;
        let found = [counts.ready, counts.leased, counts.dead, counts.inserted, counts.acked];
        if found == [0, 0, 0, tasks, tasks] { Ok(()) } else { Err(format!("after {tasks} tasks: {counts:?}").into()) }
    }
}

async fn channel(address: SocketAddr) -> Result<Channel> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect().await?)
}

async fn client(address: SocketAddr) -> Result<Client> {
    Ok(DataQueueClient::new(channel(address).await?).max_decoding_message_size(usize::MAX))
}

/// One Insert with these tasks.
pub(crate) async fn insert(client: &mut Client, numbers: Range<u64>, size: usize) -> Result<()> {
    let tasks = numbers.map(|number| new_task(number, size)).collect::<Vec<_>>();
    let count = tasks.len();
    let request = v1::InsertRequest { queue: QUEUE.to_owned(), tasks, ..v1::InsertRequest::default() };
    let answer = client.insert(request).await?.into_inner();
    if answer.results.len() == count { Ok(()) } else { Err("an insert answered another number of ids".into()) }
}

/// One Pop.
pub(crate) async fn pop(client: &mut Client) -> Result<v1::Task> {
    let request = v1::PopRequest { queue: QUEUE.to_owned(), lease: lease(), ..v1::PopRequest::default() };
    client.pop(request).await?.into_inner().task.ok_or_else(|| "a pop found nothing".into())
}

/// Acks these, all at once.
pub(crate) async fn ack(client: &mut Client, lease_tokens: Vec<String>) -> Result<u64> {
    let count = lease_tokens.len();
    let answer = client.ack(v1::AckRequest { queue: QUEUE.to_owned(), lease_tokens }).await?.into_inner();
    let applied = answer.outcomes.iter().filter(|outcome| **outcome == v1::Outcome::Applied as i32).count();
    if applied == count { Ok(applied as u64) } else { Err(format!("{applied} of {count} acks were applied").into()) }
}

/// The payload of a task.
pub(crate) fn data(task: &v1::Task) -> &[u8] {
    match &task.value {
        Some(task::Value::Data(data)) => data,
        _ => &[],
    }
}

/// One PopBatch, and the acks of what came.
pub(crate) async fn take(client: &mut Client, max_tasks: u32, ledger: &mut Ledger) -> Result<()> {
    let request = v1::PopBatchRequest {
        queue: QUEUE.to_owned(),
        max_tasks,
        lease: lease(),
        wait: None,
        ..v1::PopBatchRequest::default()
    };
    let mut stream = client.pop_batch(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(message) = stream.message().await? {
        for task in message.tasks {
            ledger.deliver(data(&task))?;
            tokens.push(task.lease_token);
        }
    }
    while !tokens.is_empty() {
        let rest = tokens.split_off(tokens.len().min(BATCH as usize));
        ledger.acked(ack(client, tokens).await?);
        tokens = rest;
    }
    Ok(())
}

/// DataQueue with these settings, as a contender.
pub(crate) struct DataQueue {
    pub(crate) name: &'static str,
    pub(crate) durability: &'static str,
    /// How many connections the callers share; 0: each has one of its own.
    pub(crate) connections: usize,
}

#[async_trait(?Send)]
impl Contender for DataQueue {
    fn name(&self) -> String {
        format!("DataQueue {}", self.name)
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        version()
            .map(|version| ("data-queue-server", version))
            .map_err(|_| Missing { install: "cargo build --release -p data-queue-server" })
    }

    fn durability(&self) -> &'static str {
        durability(self.durability)
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let server = Server::start(&directory.join("data"), &["--durability", self.durability])?;
        Ok(Box::new(Loaded { server, connections: self.connections }))
    }
}

/// A server under a contender's load.
struct Loaded {
    server: Server,
    connections: usize,
}

#[async_trait(?Send)]
impl Running for Loaded {
    fn processes(&self) -> Vec<&Process> {
        vec![&self.server.process]
    }

    async fn produce(&self, load: &Load) -> Result<Vec<Call>> {
        produce(&self.server, self.connections, load).await
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        self.server.fill(numbers, size).await
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        self.server.drain(Some(tasks), ledger).await
    }

    async fn left(&self) -> Result<u64> {
        let counts = self.server.counts().await?;
        Ok(counts.ready + counts.leased + counts.dead)
    }
}

/// Inserts under this load, over so many connections; 0: one a caller.
pub(crate) async fn produce(server: &Server, connections: usize, load: &Load) -> Result<Vec<Call>> {
    produce_at(server.address, connections, load).await
}

async fn produce_at(address: SocketAddr, connections: usize, load: &Load) -> Result<Vec<Call>> {
    let connections = if connections == 0 { load.callers } else { connections };
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(client(address).await?);
    }
    let mut callers = JoinSet::new();
    for client in clients.iter().cycle().take(load.callers) {
        let (mut client, mut caller, size) = (client.clone(), load.caller(), load.size);
        callers.spawn(async move {
            while let Some(number) = caller.next() {
                insert(&mut client, number..number + 1, size).await?;
                caller.answered();
            }
            Result::Ok(caller.into_calls())
        });
    }
    let mut calls = Vec::new();
    while let Some(ended) = callers.join_next().await {
        calls.extend(ended??);
    }
    Ok(calls)
}

/// The same over a connection for each core that this process may use now, each on a thread with a runtime of its own.
pub(crate) async fn produce_spread(server: &Server, load: &Load) -> Result<Vec<Call>> {
    let threads = thread::available_parallelism()?.get();
    let mut parts = JoinSet::new();
    for number in 0..threads {
        let callers = load.callers / threads + usize::from(number < load.callers % threads);
        let (address, load) = (server.address, Load { callers, ..load.clone() });
        parts.spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(produce_at(address, 1, &load))
        });
    }
    let mut calls = Vec::new();
    while let Some(ended) = parts.join_next().await {
        calls.extend(ended??);
    }
    Ok(calls)
}

/// A server on a directory of its own, with these tasks ready, and a client.
pub(crate) struct Filled {
    pub(crate) server: Server,
    pub(crate) client: Client,
    pub(crate) scratch: Scratch,
}

impl Filled {
    /// Starts the server and inserts the tasks from 0 on.
    pub(crate) async fn new(options: &Options, flags: &[&str], tasks: u64, size: usize) -> Result<Self> {
        let scratch = Scratch::new(options)?;
        let server = Server::start(&scratch.path().join("data"), flags)?;
        server.fill(0..tasks, size).await?;
        let client = server.client().await?;
        Ok(Self { server, client, scratch })
    }
}
