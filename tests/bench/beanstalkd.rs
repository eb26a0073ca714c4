//! beanstalkd with its binlog, and a client of its text protocol.

use std::{fs, net::SocketAddr, ops::Range, path::Path, process::Command};

use async_trait::async_trait;
use tokio::task::JoinSet;

use crate::{
    contender::{Call, Contender, Load, Missing, Running, Ways},
    fault::Result,
    ledger::{Ledger, payload},
    ours::{Shared, Shares, all},
    process::{self, Process},
    wire::Wire,
};

/// How many commands are sent before their answers are read.
const PIPELINE: u64 = 100;

/// beanstalkd, and its callers, with a connection each.
#[derive(Clone, Copy)]
pub(crate) struct Beanstalkd {
    /// How many milliseconds may pass until a put is synced.
    sync: &'static str,
    callers: usize,
    pipeline: u64,
}

/// An fsync before each answer.
pub(crate) const SYNCED: Beanstalkd = Beanstalkd { sync: "0", callers: 1, pipeline: PIPELINE };
/// An fsync a second.
pub(crate) const EVERY_SECOND: Beanstalkd = Beanstalkd { sync: "1000", ..SYNCED };

/// An fsync a second, and so many callers with a command at a time.
pub(crate) const fn one_by_one(callers: usize) -> Beanstalkd {
    Beanstalkd { callers, pipeline: 1, ..EVERY_SECOND }
}

#[async_trait(?Send)]
impl Contender for Beanstalkd {
    fn name(&self) -> String {
        format!("beanstalkd -b DIR -f {}", self.sync)
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        let version = process::version("beanstalkd", "-v").ok_or(Missing { install: "apt-get install beanstalkd" })?;
        Ok(("beanstalkd", version.replace("beanstalkd ", "")))
    }

    fn ways(&self) -> Ways {
        Ways { insert: "put, pipelined by 100", take: "reserve and delete, pipelined by 100" }
    }

    fn durability(&self) -> &'static str {
        if self.sync == SYNCED.sync { "fsync before OK" } else { "fsync every second" }
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let address = process::free_address().await?;
        let directory = directory.join("data");
        fs::create_dir(&directory)?;
        let mut command = Command::new("beanstalkd");
        command.arg("-b").arg(&directory).args(["-f", self.sync, "-l", "127.0.0.1", "-p", &address.port().to_string()]);
        let mut process = Process::start("server", &mut command, &directory.with_extension("log"))?;
        process.listens(address).await?;
        Ok(Box::new(Server { process, address, of: *self }))
    }
}

struct Server {
    process: Process,
    address: SocketAddr,
    of: Beanstalkd,
}

#[async_trait(?Send)]
impl Running for Server {
    fn processes(&self) -> Vec<&Process> {
        vec![&self.process]
    }

    /// A connection a caller: it answers a connection's commands one after the other anyway.
    async fn produce(&self, load: &Load) -> Result<Vec<Call>> {
        let mut connections = Vec::new();
        for _ in 0..load.callers {
            connections.push(Connection::open(self.address).await?);
        }
        let mut callers = JoinSet::new();
        for mut connection in connections {
            let (mut caller, size) = (load.caller(), load.size);
            callers.spawn(async move {
                while let Some(number) = caller.next() {
                    connection.put(number..number + 1, size).await?;
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

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let shares = Shares::new(numbers, self.of.pipeline);
        let mut callers = JoinSet::new();
        for _ in 0..self.of.callers {
            let (mut connection, shares) = (Connection::open(self.address).await?, shares.clone());
            callers.spawn(async move {
                while let Some(part) = shares.take() {
                    connection.put(part, size).await?;
                }
                Ok(())
            });
        }
        all(callers).await.map(drop)
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        let (shares, shared) = (Shares::new(0..tasks, self.of.pipeline), Shared::new(ledger));
        let mut callers = JoinSet::new();
        for _ in 0..self.of.callers {
            let mut connection = Connection::open(self.address).await?;
            let (shares, shared) = (shares.clone(), shared.clone());
            callers.spawn(async move {
                while let Some(part) = shares.take() {
                    let held = connection.reserve(part.end - part.start, &shared).await?;
                    shared.acked(connection.delete(&held).await?)?;
                }
                Ok(())
            });
        }
        all(callers).await?;
        shared.give_back(ledger)
    }

    async fn left(&self) -> Result<u64> {
        let stats = Connection::open(self.address).await?.stats().await?;
        let fields =
            ["current-jobs-ready: ", "current-jobs-reserved: ", "current-jobs-delayed: ", "current-jobs-buried: "];
        let values = stats.lines().filter_map(|line| fields.iter().find_map(|field| line.strip_prefix(field)));
        let values = values.map(str::parse::<u64>).collect::<std::result::Result<Vec<_>, _>>()?;
        if values.len() == fields.len() {
            Ok(values.iter().sum())
        } else {
            Err("beanstalkd does not tell its jobs".into())
        }
    }
}

struct Connection {
    wire: Wire,
    command: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self> {
        Ok(Self { wire: Wire::open("beanstalkd", address).await?, command: Vec::new() })
    }

    /// Puts these at once, and reads the answers after that.
    async fn put(&mut self, numbers: Range<u64>, size: usize) -> Result<()> {
        self.command.clear();
        for number in numbers.clone() {
            self.command.extend_from_slice(format!("put 0 0 21600 {size}\r\n").as_bytes());
            self.command.extend_from_slice(&payload(number, size));
            self.command.extend_from_slice(b"\r\n");
        }
        self.wire.write(&self.command).await?;
        for _ in numbers {
            let line = self.wire.line().await?;
            if !line.starts_with("INSERTED ") {
                return Err(format!("beanstalkd answered a put with {line}").into());
            }
        }
        Ok(())
    }

    /// Reserves so many, which are there; answers their ids.
    async fn reserve(&mut self, count: u64, ledger: &Shared) -> Result<Vec<String>> {
        self.wire.write("reserve-with-timeout 0\r\n".repeat(usize::try_from(count)?).as_bytes()).await?;
        let mut held = Vec::new();
        for _ in 0..count {
            let line = self.wire.line().await?;
            let mut words = line.split(' ');
            let (Some("RESERVED"), Some(id), Some(size)) = (words.next(), words.next(), words.next()) else {
                return Err(format!("beanstalkd answered a reserve with {line}").into());
            };
            let size = size.parse::<usize>()?;
            ledger.deliver(&self.wire.bytes(size + 2).await?[..size])?;
            held.push(id.to_owned());
        }
        Ok(held)
    }

    async fn delete(&mut self, held: &[String]) -> Result<u64> {
        let commands = held.iter().map(|id| format!("delete {id}\r\n")).collect::<String>();
        self.wire.write(commands.as_bytes()).await?;
        for _ in held {
            let line = self.wire.line().await?;
            if line != "DELETED" {
                return Err(format!("beanstalkd answered a delete with {line}").into());
            }
        }
        Ok(held.len() as u64)
    }

    async fn stats(&mut self) -> Result<String> {
        self.wire.write(b"stats\r\n").await?;
        let line = self.wire.line().await?;
        let size = line.strip_prefix("OK ").ok_or("beanstalkd has no stats")?.parse::<usize>()?;
        Ok(String::from_utf8(self.wire.bytes(size + 2).await?.to_vec())?)
    }
}
