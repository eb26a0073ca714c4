//! One queue wider than a node: what a task costs each process with more shards, over more masters of a cluster.

use std::{path::Path, process::Command, time::Duration};

use async_trait::async_trait;
use data_queue_proto::v1;
use prost_types::FieldMask;
use redis::{Client as RedisClient, aio::MultiplexedConnection};
use tokio::time::sleep;

use crate::{
    contender::{Running, cpu_times},
    dataqueue::{Client, QUEUE, Server},
    fault::Result,
    features::{Mode, PLAIN, costs},
    ledger::Ledger,
    options::Options,
    process::{self, Process},
    redis::{ask, version},
    report::{Figure, Report, count},
    scratch::Scratch,
    unary::Leg,
};

const NAME: &str = "shards";
const SIZE: usize = 12;
/// More callers than elsewhere, since those of a queue share its scripts: with few, shards take that away.
const MODES: [Mode; 3] = [
    Mode { what: "one by one, 64 callers", callers: 64, part: 1, tasks: 20_000 },
    Mode { what: "one by one, 1,024 callers", callers: 1_024, part: 1, tasks: 40_000 },
    Mode { what: "by 100, 8 callers", callers: 8, part: 100, tasks: 100_000 },
];
/// Masters, and shards of the queue.
const LEGS: [(usize, u32); 8] = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 8), (3, 4), (3, 8)];
const NODES: [&str; 3] = ["node 1", "node 2", "node 3"];
const SLOTS: usize = 16_384;
const ASK: Duration = Duration::from_millis(50);
const ASK_TIMES: usize = 600;

/// Masters without replicas, and a server on them.
struct Cluster {
    nodes: Vec<Process>,
    server: Server,
    client: Client,
}

#[async_trait(?Send)]
impl Running for Cluster {
    fn processes(&self) -> Vec<&Process> {
        std::iter::once(self.server.process()).chain(&self.nodes).collect()
    }

    async fn fill(&self, _: std::ops::Range<u64>, _: usize) -> Result<()> {
        Err("it is filled by the measurement".into())
    }

    async fn drain(&self, _: u64, _: &mut Ledger) -> Result<()> {
        Err("it is drained by the measurement".into())
    }

    async fn left(&self) -> Result<u64> {
        let counts = self.server.counts().await?;
        Ok(counts.ready + counts.leased + counts.dead)
    }
}

impl Cluster {
    async fn start(nodes: usize, shards: u32, directory: &Path) -> Result<Self> {
        let (mut processes, mut ports, mut connections) = (Vec::new(), Vec::new(), Vec::new());
        for name in NODES.iter().take(nodes) {
            let (process, port, bus) = node(name, directory).await?;
            connections.push(
                RedisClient::open(format!("redis://127.0.0.1:{port}"))?.get_multiplexed_async_connection().await?,
            );
            processes.push(process);
            ports.push([port.to_string(), bus.to_string()]);
        }
        let share = SLOTS.div_ceil(nodes);
        for (number, connection) in connections.iter_mut().enumerate() {
            let slots: Vec<String> =
                (number * share..((number + 1) * share).min(SLOTS)).map(|slot| slot.to_string()).collect();
            let words: Vec<&str> =
                ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
            ask::<()>(connection, &words).await?;
            // Each needs an epoch of its own.
            ask::<()>(connection, &["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()]).await?;
        }
        for [port, bus] in &ports[1..] {
            ask::<()>(&mut connections[0], &["CLUSTER", "MEET", "127.0.0.1", port, bus]).await?;
        }
        for connection in &mut connections {
            until_whole(connection, nodes).await?;
        }
        let seeds: Vec<String> = ports.iter().map(|[port, _]| format!("127.0.0.1:{port}")).collect();
        let url = format!("redis+cluster://{}", seeds.join(","));
        let server = Server::start(&directory.join("data"), &["--store", &url])?;
        let client = server.client().await?;
        let settings = v1::QueueSettings { shards: Some(shards), ..v1::QueueSettings::default() };
        server.set(settings, FieldMask { paths: vec!["shards".to_owned()] }).await?;
        Ok(Self { nodes: processes, server, client })
    }
}

async fn node(name: &'static str, directory: &Path) -> Result<(Process, u16, u16)> {
    let address = process::free_address().await?;
    let (port, bus) = (address.port(), process::free_address().await?.port());
    let directory = directory.join(name.replace(' ', "-"));
    std::fs::create_dir(&directory)?;
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--daemonize", "no", "--cluster-enabled", "yes"]);
    command.args(["--cluster-port", &bus.to_string()]);
    command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]);
    command.args(["--auto-aof-rewrite-percentage", "0", "--maxmemory-policy", "noeviction"]);
    command.arg("--logfile").arg(directory.join("log")).arg("--dir").arg(&directory);
    let mut process = Process::start(name, &mut command, &directory.with_extension("log"))?;
    process.listens(address).await?;
    Ok((process, port, bus))
}

async fn until_whole(connection: &mut MultiplexedConnection, nodes: usize) -> Result<()> {
    for _ in 0..ASK_TIMES {
        let info = ask::<String>(connection, &["CLUSTER", "INFO"]).await?;
        if info.contains("cluster_state:ok") && info.contains(&format!("cluster_known_nodes:{nodes}")) {
            return Ok(());
        }
        sleep(ASK).await;
    }
    Err("the cluster does not become whole".into())
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    if let Err(missing) = version() {
        report.missing(NAME, format!("Redis: {}", missing.install));
        return Ok(());
    }
    for mode in &MODES {
        let mut found = LEGS.map(|_| [Vec::new(), Vec::new()]);
        for round in 1..=options.rounds() {
            for ((nodes, shards), legs) in LEGS.iter().zip(&mut found) {
                let parts = one_round(options, mode, *nodes, *shards).await?;
                let [inserts, takes] = parts.each_ref().map(|part| costs(&part.cpu));
                eprintln!(
                    "round {round}: {}, {nodes} masters, {shards} shards: insert: {inserts}; the rest: {takes}",
                    mode.what
                );
                legs.iter_mut().zip(parts).for_each(|(legs, part)| legs.push(part));
            }
        }
        for ((nodes, shards), parts) in LEGS.iter().zip(found) {
            for (what, legs) in ["Insert", "Pop and Ack"].into_iter().zip(parts) {
                report.figure(Figure {
                    measurement: NAME,
                    what: format!("{}, {nodes} masters, {shards} shards: {what}", mode.what),
                    unit: "tasks/s",
                    values: legs.iter().map(|leg| leg.rate).collect(),
                    cpu: legs.into_iter().map(|leg| leg.cpu).collect(),
                    ..Figure::default()
                });
            }
        }
    }
    let tasks = MODES.each_ref().map(|mode| format!("{}: {} tasks", mode.what, count(options.many(mode.tasks))));
    report.note(format!(
        "{NAME}: {SIZE} B, one queue; {}; masters without replicas; all processes share the machine, so that the time of a \
         core that a task costs each of them tells what the rate would be on machines of their own",
        tasks.join("; ")
    ));
    Ok(())
}

/// What inserts cost, and what comes after them.
async fn one_round(options: &Options, mode: &Mode, nodes: usize, shards: u32) -> Result<[Leg; 2]> {
    let scratch = Scratch::new(options)?;
    let used = Cluster::start(nodes, shards, scratch.path()).await?;
    let tasks = options.many(mode.tasks);
    let (warm, end) = (tasks / 4, tasks / 4 + tasks);
    let mut ledger = Ledger::new(SIZE);
    PLAIN.insert(&used.client, mode, 0..warm).await?;
    PLAIN.take(&used.client, mode, warm, &mut ledger).await?;
    let inserts = Leg::of(|| cpu_times(&used), PLAIN.insert(&used.client, mode, warm..end), |()| tasks).await?;
    let takes = Leg::of(|| cpu_times(&used), PLAIN.take(&used.client, mode, tasks, &mut ledger), |()| tasks).await?;
    ledger.verify(end)?;
    if used.left().await? > 0 {
        return Err(format!("{QUEUE}: tasks are left").into());
    }
    Ok([inserts, takes])
}
