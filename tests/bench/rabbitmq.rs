//! RabbitMQ with a quorum queue, which syncs its log before it confirms, and a client of AMQP 0-9-1.

use std::{fs, net::SocketAddr, ops::Range, path::Path, process::Command, time::Duration};

use async_trait::async_trait;
use tokio::time::interval;

use crate::{
    contender::{Contender, Missing, Running, Ways},
    fault::Result,
    ledger::{Ledger, payload},
    process::{self, Process},
    wire::Wire,
};

/// The script that runs in the foreground, as whoever starts it: the one on PATH changes the user.
const SCRIPT: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
const QUEUE: &str = "bench";
/// Publishes that are not confirmed yet.
const IN_FLIGHT: u64 = 1_000;
/// Messages with the consumer that are not acked yet.
const PREFETCH: u16 = 1_000;
/// How long an ack may take to be counted, and how often the count is asked for.
const SETTLE: Duration = Duration::from_secs(5);
const SETTLE_TIMES: u32 = 500;
/// An ack for so many at the most.
const ACK: u64 = 100;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// How many bytes of a frame are not its content.
const FRAME: usize = 8;

/// RabbitMQ.
pub(crate) struct RabbitMq;

#[async_trait(?Send)]
impl Contender for RabbitMq {
    fn name(&self) -> String {
        "RabbitMQ, quorum queue".to_owned()
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        let missing = Missing { install: "apt-get install rabbitmq-server" };
        if !Path::new(SCRIPT).exists() {
            return Err(missing);
        }
        // Asking the program takes seconds and a node: its directory tells.
        let libraries = fs::read_dir("/usr/lib/rabbitmq/lib").into_iter().flatten().flatten();
        let names = libraries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let version = names.filter_map(|name| Some(name.strip_prefix("rabbitmq_server-")?.to_owned())).next();
        Ok(("rabbitmq-server", version.ok_or(missing)?))
    }

    fn ways(&self) -> Ways {
        Ways { insert: "publish, 1,000 not confirmed", take: "consume, prefetch 1,000, an ack for what came" }
    }

    fn durability(&self) -> &'static str {
        "fsync before the confirm"
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let (address, names, distribution) =
            (process::free_address().await?, process::free_address().await?, process::free_address().await?);
        let configuration = directory.join("rabbitmq.conf");
        fs::write(&configuration, format!("listeners.tcp.1 = {address}\nlog.file.level = warning\n"))?;
        // It would stay behind if the node started it.
        let mut epmd = Command::new("epmd");
        epmd.args(["-address", "127.0.0.1", "-port", &names.port().to_string()]);
        let mut epmd = Process::start_group("epmd", &mut epmd, &directory.join("epmd.log"))?;
        epmd.listens(names).await?;
        let mut command = Command::new(SCRIPT);
        command
            .env("HOME", directory)
            .env("ERL_EPMD_PORT", names.port().to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", "bench@localhost")
            .env("RABBITMQ_DIST_PORT", distribution.port().to_string())
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}")
            .env("RABBITMQ_CONFIG_FILE", &configuration)
            .env("RABBITMQ_MNESIA_BASE", directory.join("data"))
            .env("RABBITMQ_LOG_BASE", directory.join("logs"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", directory.join("plugins"))
            .env("RABBITMQ_PID_FILE", directory.join("pid"));
        let mut process = Process::start_group("server", &mut command, &directory.join("log"))?;
        process.listens(address).await?;
        Client::open(address).await?.declare(false).await?;
        Ok(Box::new(Server { process, _epmd: epmd, address }))
    }
}

struct Server {
    process: Process,
    _epmd: Process,
    address: SocketAddr,
}

#[async_trait(?Send)]
impl Running for Server {
    fn processes(&self) -> Vec<&Process> {
        vec![&self.process]
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let mut client = Client::open(self.address).await?;
        client.call(85, 10, &[0], 11).await?;
        let count = numbers.end - numbers.start;
        let (mut sent, mut confirmed) = (0, 0);
        while confirmed < count {
            while sent < count && sent - confirmed < IN_FLIGHT {
                client.publish(&payload(numbers.start + sent, size));
                sent += 1;
            }
            client.flush().await?;
            loop {
                let mut confirm = client.method(60, 80).await?;
                let (tag, multiple) = (confirm.number(8)?, confirm.number(1)?);
                // One that is not for all before it comes in any order.
                confirmed = if multiple == 1 { confirmed.max(tag) } else { confirmed + 1 };
                if confirmed == sent || !client.wire.has_more() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        let mut client = Client::open(self.address).await?;
        client.call(85, 10, &[0], 11).await?;
        client.call(60, 10, &[&[0; 4][..], &PREFETCH.to_be_bytes(), &[0]].concat(), 11).await?;
        client.call(60, 20, &[&[0; 2][..], &short(QUEUE), &short("c"), &[0], &[0; 4]].concat(), 21).await?;
        let (mut came, mut acked) = (0, 0);
        while came < tasks {
            let mut delivery = client.method(60, 60).await?;
            delivery.text()?;
            let tag = delivery.number(8)?;
            client.content(ledger).await?;
            came += 1;
            if came == tasks || came - acked == ACK || !client.wire.has_more() {
                client.send(60, 80, &[&tag.to_be_bytes()[..], &[1]].concat());
                client.flush().await?;
                acked = came;
            }
        }
        client.settle().await?;
        // An ack has no answer. What was not taken would be in the queue again once the channel is closed.
        client.call(20, 40, &[&[0; 2][..], &short(""), &[0; 4]].concat(), 41).await?;
        ledger.acked(acked);
        Ok(())
    }

    async fn left(&self) -> Result<u64> {
        let mut client = Client::open(self.address).await?;
        // An ack is in the count only when the queue has written it, which nothing tells.
        let mut ticks = interval(SETTLE / SETTLE_TIMES);
        for _ in 0..SETTLE_TIMES {
            ticks.tick().await;
            if client.declare(true).await? == 0 {
                return Ok(0);
            }
        }
        client.declare(true).await
    }
}

/// A connection with one channel.
struct Client {
    wire: Wire,
    /// What is not sent yet.
    out: Vec<u8>,
    /// Of the frame that is being written.
    channel: u16,
}

impl Client {
    async fn open(address: SocketAddr) -> Result<Self> {
        let mut client = Self { wire: Wire::open("RabbitMQ", address).await?, out: Vec::new(), channel: 0 };
        client.wire.write(b"AMQP\0\0\x09\x01").await?;
        client.method(10, 10).await?;
        let login = [&[0; 4][..], &short("PLAIN"), &long(b"\0guest\0guest"), &short("en_US")].concat();
        client.call(10, 11, &login, 30).await?;
        // As many channels and as large frames as it allows, 2,047 and 128 KiB; no heartbeats.
        client.send(10, 31, &[7, 0xFF, 0, 2, 0, 0, 0, 0]);
        client.call(10, 40, &[&short("/")[..], &[0, 0]].concat(), 41).await?;
        client.channel = 1;
        client.call(20, 10, &short(""), 11).await?;
        Ok(client)
    }

    /// The queue, made unless it is only looked at; how many messages are ready in it.
    async fn declare(&mut self, passive: bool) -> Result<u64> {
        const DURABLE: u8 = 2;
        let kind = [&short("x-queue-type")[..], b"S", &long(b"quorum")].concat();
        let arguments = [&[0; 2][..], &short(QUEUE), &[DURABLE | u8::from(passive)], &long(&kind)].concat();
        let mut answer = self.call(50, 10, &arguments, 11).await?;
        answer.text()?;
        answer.number(4)
    }

    fn publish(&mut self, payload: &[u8]) {
        self.send(60, 40, &[&[0; 2][..], &short(""), &short(QUEUE), &[0]].concat());
        let size = (payload.len() as u64).to_be_bytes();
        // Of the properties only the delivery mode: persistent.
        self.frame(HEADER, &[&60_u16.to_be_bytes()[..], &[0; 2], &size, &0x1000_u16.to_be_bytes(), &[2]].concat());
        self.frame(BODY, payload);
    }

    fn send(&mut self, class: u16, method: u16, arguments: &[u8]) {
        self.frame(METHOD, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat());
    }

    fn frame(&mut self, kind: u8, content: &[u8]) {
        self.out.push(kind);
        self.out.extend_from_slice(&self.channel.to_be_bytes());
        self.out.extend_from_slice(&(content.len() as u32).to_be_bytes());
        self.out.extend_from_slice(content);
        self.out.push(0xCE);
    }

    async fn flush(&mut self) -> Result<()> {
        self.wire.write(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    /// A method, and its answer of the same class.
    async fn call(&mut self, class: u16, method: u16, arguments: &[u8], answer: u16) -> Result<Fields> {
        self.send(class, method, arguments);
        self.flush().await?;
        self.method(class, answer).await
    }

    /// The next frame, which must be this method.
    async fn method(&mut self, class: u16, method: u16) -> Result<Fields> {
        let mut fields = Fields(self.next(METHOD).await?, 0);
        let found = (fields.number(2)?, fields.number(2)?);
        if found == (u64::from(class), u64::from(method)) {
            Ok(fields)
        } else {
            Err(format!("RabbitMQ sent {found:?}: {}", String::from_utf8_lossy(&fields.0)).into())
        }
    }

    /// Waits until all acks are with the queue: the channel holds some back as long as others are under way, and loses them
    /// when it is closed. They are before a message that was confirmed; that comes back, and is acked alone.
    async fn settle(&mut self) -> Result<()> {
        self.publish(b"settled");
        self.flush().await?;
        let (mut confirmed, mut came) = (false, None);
        while !confirmed || came.is_none() {
            let mut fields = Fields(self.next(METHOD).await?, 0);
            match (fields.number(2)?, fields.number(2)?) {
                (60, 80) => confirmed = true,
                (60, 60) => {
                    fields.text()?;
                    came = Some(fields.number(8)?);
                    self.next(HEADER).await?;
                    self.next(BODY).await?;
                }
                other => return Err(format!("RabbitMQ sent {other:?}").into()),
            }
        }
        self.send(60, 80, &[&came.unwrap_or_default().to_be_bytes()[..], &[0]].concat());
        Ok(())
    }

    /// What follows a delivery: a header, and its payload in one frame.
    async fn content(&mut self, ledger: &mut Ledger) -> Result<()> {
        self.next(HEADER).await?;
        ledger.deliver(&self.next(BODY).await?)?;
        Ok(())
    }

    async fn next(&mut self, kind: u8) -> Result<Vec<u8>> {
        let head = self.wire.bytes(FRAME - 1).await?;
        let (found, size) = (head[0], u32::from_be_bytes([head[3], head[4], head[5], head[6]]));
        let content = self.wire.bytes(size as usize + 1).await?[..size as usize].to_vec();
        if found == kind { Ok(content) } else { Err(format!("RabbitMQ sent a frame of kind {found}").into()) }
    }
}

/// The arguments of a method, and how many bytes of them were read.
struct Fields(Vec<u8>, usize);

impl Fields {
    fn number(&mut self, bytes: usize) -> Result<u64> {
        let field = self.0.get(self.1..self.1 + bytes).ok_or("RabbitMQ sent too little")?;
        self.1 += bytes;
        Ok(field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// A short text; nobody needs it.
    fn text(&mut self) -> Result<()> {
        self.1 += usize::try_from(self.number(1)?)?;
        Ok(())
    }
}

fn short(text: &str) -> Vec<u8> {
    [&[text.len() as u8][..], text.as_bytes()].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}
