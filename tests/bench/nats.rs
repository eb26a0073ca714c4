//! NATS JetStream: a work-queue stream in a file with one pull consumer, and a client of its text protocol.
//!
//! JetStream syncs its file every two minutes unless told otherwise, and does not confirm acks: as its clients do, acks are sent
//! and the server is asked at the end whether it has them all.

use std::{net::SocketAddr, ops::Range, path::Path, process::Command};

use async_trait::async_trait;
use serde_json::Value;

use crate::{
    contender::{Contender, Missing, Running, Ways},
    fault::Result,
    ledger::{Ledger, payload},
    process::{self, Process},
    wire::Wire,
};

const STREAM: &str = "BENCH";
const SUBJECT: &str = "bench";
/// Publishes of a stream of messages that are not confirmed yet.
const IN_FLIGHT: u64 = 1_000;
/// What a stream of messages asks for at once; again when half of it came.
const BATCH: u64 = 500;

/// JetStream: as a stream of messages, or with a fetch a message.
#[derive(Clone, Copy)]
pub(crate) struct JetStream {
    /// Whether each message is fetched.
    single: bool,
    /// Publishes that are not confirmed yet, and fetches under way.
    in_flight: u64,
}

pub(crate) const MESSAGES: JetStream = JetStream { single: false, in_flight: IN_FLIGHT };
pub(crate) const FETCH: JetStream = one_by_one(64);

/// With so many publishes, or fetches of one message, under way.
pub(crate) const fn one_by_one(callers: usize) -> JetStream {
    JetStream { single: true, in_flight: callers as u64 }
}

#[async_trait(?Send)]
impl Contender for JetStream {
    fn name(&self) -> String {
        "NATS JetStream in a file".to_owned()
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        let version =
            process::version(&binary(), "--version").ok_or(Missing { install: "tests/bench/run, with go" })?;
        let version = version.replace("nats-server: ", "");
        Ok(("nats-server", version))
    }

    fn ways(&self) -> Ways {
        if self.single {
            Ways { insert: "", take: "fetch(1) and ack, 64 under way" }
        } else {
            Ways { insert: "publish, 1,000 in flight", take: "messages() by 500, acks" }
        }
    }

    fn durability(&self) -> &'static str {
        "fsync every 2 minutes, acks not confirmed"
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let address = process::free_address().await?;
        let mut command = Command::new(binary());
        command.args(["--addr", "127.0.0.1", "--port", &address.port().to_string(), "--jetstream", "--store_dir"]);
        command.arg(directory.join("data"));
        let mut process = Process::start("server", &mut command, &directory.join("log"))?;
        process.listens(address).await?;
        let mut client = Client::open(address).await?;
        let stream = format!(
            r#"{{"name":"{STREAM}","subjects":["{SUBJECT}"],"retention":"workqueue","storage":"file","discard":"old","num_replicas":1,"max_consumers":-1,"max_msgs":-1,"max_bytes":-1,"max_age":0}}"#
        );
        client.ask(&format!("$JS.API.STREAM.CREATE.{STREAM}"), &stream).await?;
        let consumer = format!(
            r#"{{"stream_name":"{STREAM}","config":{{"durable_name":"c","ack_policy":"explicit","ack_wait":21600000000000,"deliver_policy":"all","max_ack_pending":20000,"replay_policy":"instant"}}}}"#
        );
        client.ask(&format!("$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.c"), &consumer).await?;
        Ok(Box::new(Server { process, address, of: *self }))
    }
}

fn binary() -> String {
    let ours = process::peers().join("bin/nats-server");
    if ours.exists() { ours.display().to_string() } else { "nats-server".to_owned() }
}

struct Server {
    process: Process,
    address: SocketAddr,
    of: JetStream,
}

#[async_trait(?Send)]
impl Running for Server {
    fn processes(&self) -> Vec<&Process> {
        vec![&self.process]
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let mut client = Client::open(self.address).await?;
        let count = numbers.end - numbers.start;
        let (mut sent, mut confirmed) = (0, 0);
        while confirmed < count {
            while sent < count && sent - confirmed < self.of.in_flight {
                client.publish(SUBJECT, "_INBOX.p", &payload(numbers.start + sent, size));
                sent += 1;
            }
            client.flush().await?;
            // All that has come, so that one write answers many.
            loop {
                let message = client.message().await?;
                if !message.payload.starts_with(b"{\"stream\":") {
                    return Err(format!("a publish was answered {}", String::from_utf8_lossy(message.payload)).into());
                }
                confirmed += 1;
                if confirmed == sent || !client.wire.has_more() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        let mut client = Client::open(self.address).await?;
        let (mut asked, mut came) = (0, 0);
        while came < tasks {
            if self.of.single {
                while asked < tasks && asked - came < self.of.in_flight {
                    client.pull(1);
                    asked += 1;
                }
            } else if asked < tasks && asked - came <= BATCH / 2 {
                let batch = BATCH.min(tasks - asked);
                client.pull(batch);
                asked += batch;
            }
            client.flush().await?;
            loop {
                let message = client.message().await?;
                if message.status {
                    return Err(format!("a pull was answered {}", String::from_utf8_lossy(message.payload)).into());
                }
                ledger.deliver(message.payload)?;
                let reply = message.reply;
                client.publish(&reply, "", b"+ACK");
                came += 1;
                if came == tasks || !client.wire.has_more() {
                    break;
                }
            }
        }
        // An answer to this says that the acks before it were read; what the consumer knows, that they were taken.
        client.flush().await?;
        loop {
            let info = client.ask(&format!("$JS.API.CONSUMER.INFO.{STREAM}.c"), "").await?;
            if info["num_ack_pending"] == 0 && info["num_redelivered"] == 0 {
                ledger.acked(tasks);
                return Ok(());
            }
        }
    }

    async fn left(&self) -> Result<u64> {
        let info = Client::open(self.address).await?.ask(&format!("$JS.API.STREAM.INFO.{STREAM}"), "").await?;
        Ok(info["state"]["messages"].as_u64().ok_or("JetStream does not tell its messages")?)
    }
}

/// A connection with one inbox for all.
struct Client {
    wire: Wire,
    /// What is not sent yet.
    out: Vec<u8>,
}

struct Message<'c> {
    reply: String,
    payload: &'c [u8],
    /// It is no message of the stream, but says what became of a pull.
    status: bool,
}

impl Client {
    async fn open(address: SocketAddr) -> Result<Self> {
        let mut wire = Wire::open("nats-server", address).await?;
        wire.line().await?;
        wire.write(b"CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\n")
            .await?;
        wire.write(b"SUB _INBOX.> 1\r\nPING\r\n").await?;
        while wire.line().await? != "PONG" {}
        Ok(Self { wire, out: Vec::new() })
    }

    fn publish(&mut self, subject: &str, reply: &str, payload: &[u8]) {
        self.out.extend_from_slice(format!("PUB {subject} {reply} {}\r\n", payload.len()).as_bytes());
        self.out.extend_from_slice(payload);
        self.out.extend_from_slice(b"\r\n");
    }

    fn pull(&mut self, batch: u64) {
        let request = format!(r#"{{"batch":{batch},"expires":300000000000}}"#);
        self.publish(&format!("$JS.API.CONSUMER.MSG.NEXT.{STREAM}.c"), "_INBOX.m", request.as_bytes());
    }

    async fn flush(&mut self) -> Result<()> {
        self.wire.write(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    /// A request of the API, and its answer.
    async fn ask(&mut self, subject: &str, request: &str) -> Result<Value> {
        self.publish(subject, "_INBOX.r", request.as_bytes());
        self.flush().await?;
        let answer = serde_json::from_slice::<Value>(self.message().await?.payload)?;
        if answer["error"].is_null() { Ok(answer) } else { Err(format!("{subject}: {}", answer["error"]).into()) }
    }

    /// The next message.
    async fn message(&mut self) -> Result<Message<'_>> {
        loop {
            let line = self.wire.line().await?;
            let words = line.split(' ').collect::<Vec<_>>();
            let (headers, total) = match *words.as_slice() {
                ["MSG", .., total] => (0, total.parse::<usize>()?),
                ["HMSG", .., headers, total] => (headers.parse::<usize>()?, total.parse::<usize>()?),
                ["PING"] => {
                    self.wire.write(b"PONG\r\n").await?;
                    continue;
                }
                _ => return Err(format!("nats-server said {line}").into()),
            };
            // MSG subject sid [reply] total
            let reply = if headers == 0 && words.len() == 5 { words[3].to_owned() } else { String::new() };
            let status = headers > 0;
            let bytes = &self.wire.bytes(total + 2).await?[..total];
            return Ok(Message { reply, payload: if status { bytes } else { &bytes[headers..] }, status });
        }
    }
}
