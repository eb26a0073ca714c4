//! beanstalkd, with its binlog synced before each answer, and a client of its text protocol.

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use async_trait::async_trait;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time,
};

use crate::{
    contender::{Call, Contender, Load, Missing, Running},
    fault::Result,
    ledger::{Ledger, payload},
    process::{self, Process},
};

/// How many commands a drain sends before it reads their answers.
const PIPELINE: usize = 100;
/// How often it is asked whether the server listens yet.
const ASK: Duration = Duration::from_millis(5);
const ASK_TIMES: u32 = 1_000;

/// beanstalkd.
pub(crate) struct Beanstalkd;

#[async_trait(?Send)]
impl Contender for Beanstalkd {
    fn name(&self) -> String {
        "beanstalkd -b DIR -f 0".to_owned()
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        let version = process::version("beanstalkd", "-v").ok_or(Missing { install: "apt-get install beanstalkd" })?;
        Ok(("beanstalkd", version.replace("beanstalkd ", "")))
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        // It cannot be asked which port it took: this one was free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
        let directory = directory.join("data");
        fs::create_dir(&directory)?;
        let mut command = Command::new("beanstalkd");
        command.arg("-b").arg(&directory).args(["-f", "0", "-l", "127.0.0.1", "-p", &address.port().to_string()]);
        let process = Process::start("server", &mut command, &directory.with_extension("log"))?;
        let mut ticks = time::interval(ASK);
        for _ in 0..ASK_TIMES {
            ticks.tick().await;
            if TcpStream::connect(address).await.is_ok() {
                return Ok(Box::new(Server { process, address }));
            }
        }
        Err("beanstalkd does not listen".into())
    }
}

struct Server {
    process: Process,
    address: SocketAddr,
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
                    connection.put(&payload(number, size)).await?;
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

    async fn drain(&self, ledger: &mut Ledger) -> Result<()> {
        let mut connection = Connection::open(self.address).await?;
        loop {
            let held = connection.reserve(ledger).await?;
            if held.is_empty() {
                return Ok(());
            }
            ledger.acked(connection.delete(&held).await?);
        }
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

/// A connection, and what was read from it and not yet taken.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    taken: usize,
    command: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new(), taken: 0, command: Vec::new() })
    }

    async fn put(&mut self, payload: &[u8]) -> Result<()> {
        self.command.clear();
        self.command.extend_from_slice(format!("put 0 0 21600 {}\r\n", payload.len()).as_bytes());
        self.command.extend_from_slice(payload);
        self.command.extend_from_slice(b"\r\n");
        self.stream.write_all(&self.command).await?;
        let line = self.line().await?;
        if line.starts_with("INSERTED ") {
            Ok(())
        } else {
            Err(format!("beanstalkd answered a put with {line}").into())
        }
    }

    /// Reserves what is there, some at once; answers their ids.
    async fn reserve(&mut self, ledger: &mut Ledger) -> Result<Vec<String>> {
        self.stream.write_all("reserve-with-timeout 0\r\n".repeat(PIPELINE).as_bytes()).await?;
        let mut held = Vec::new();
        for _ in 0..PIPELINE {
            let line = self.line().await?;
            if line == "TIMED_OUT" {
                continue;
            }
            let mut words = line.split(' ');
            let (Some("RESERVED"), Some(id), Some(size)) = (words.next(), words.next(), words.next()) else {
                return Err(format!("beanstalkd answered a reserve with {line}").into());
            };
            let size = size.parse::<usize>()?;
            let payload = self.bytes(size + 2).await?;
            ledger.deliver(&payload[..size])?;
            held.push(id.to_owned());
        }
        Ok(held)
    }

    async fn delete(&mut self, held: &[String]) -> Result<u64> {
        let commands = held.iter().map(|id| format!("delete {id}\r\n")).collect::<String>();
        self.stream.write_all(commands.as_bytes()).await?;
        for _ in held {
            let line = self.line().await?;
            if line != "DELETED" {
                return Err(format!("beanstalkd answered a delete with {line}").into());
            }
        }
        Ok(held.len() as u64)
    }

    async fn stats(&mut self) -> Result<String> {
        self.stream.write_all(b"stats\r\n").await?;
        let line = self.line().await?;
        let size = line.strip_prefix("OK ").ok_or("beanstalkd has no stats")?.parse::<usize>()?;
        Ok(String::from_utf8(self.bytes(size + 2).await?)?)
    }

    /// The next line, without its end.
    async fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.buffer[self.taken..].windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8(self.buffer[self.taken..self.taken + end].to_vec())?;
                self.take(end + 2);
                return Ok(line);
            }
            self.read().await?;
        }
    }

    async fn bytes(&mut self, count: usize) -> Result<Vec<u8>> {
        while self.buffer.len() - self.taken < count {
            self.read().await?;
        }
        let bytes = self.buffer[self.taken..self.taken + count].to_vec();
        self.take(count);
        Ok(bytes)
    }

    fn take(&mut self, count: usize) {
        self.taken += count;
        if self.taken == self.buffer.len() {
            self.buffer.clear();
            self.taken = 0;
        }
    }

    async fn read(&mut self) -> Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            Err("beanstalkd closed the connection".into())
        } else {
            Ok(())
        }
    }
}
