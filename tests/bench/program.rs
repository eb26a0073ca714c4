//! Peers whose client is a program in another language: BullMQ, and the seed of this project.
//!
//! The programs are in `peers/`. Each does what it is told line by line: `fill FIRST COUNT SIZE` and `drain COUNT SIZE`, and answers
//! with a line of JSON: the numbers of the tasks that were delivered, whose payloads it has checked, and how many were acked.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
};

use async_trait::async_trait;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{ChildStdin, ChildStdout},
    sync::Mutex,
};

use crate::{
    contender::{Contender, Missing, Running, Ways},
    fault::Result,
    ledger::Ledger,
    process::{self, Process},
    redis::{self, Redis},
};

/// A peer on Redis with a program as its client.
pub(crate) struct Program {
    name: &'static str,
    ways: Ways,
    kind: Kind,
}

enum Kind {
    /// The seed, with so many tasks a pop.
    Seed(&'static str),
    BullMq,
}

pub(crate) const SEED: Program = Program {
    name: "the seed, in Python",
    ways: Ways { insert: "insert_data", take: "pop_data and delete_task" },
    kind: Kind::Seed("1"),
};
pub(crate) const SEED_BY_TENS: Program = Program {
    name: "the seed, in Python",
    ways: Ways { insert: "", take: "pop_data_num(10) and delete_task" },
    kind: Kind::Seed("10"),
};
pub(crate) const BULLMQ: Program = Program {
    name: "BullMQ",
    ways: Ways { insert: "addBulk(500)", take: "Worker, concurrency 100, removeOnComplete" },
    kind: Kind::BullMq,
};

impl Program {
    /// The command, without what it works on.
    fn command(&self) -> Command {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/peers");
        match self.kind {
            Kind::Seed(batch) => {
                let mut command = Command::new(python());
                command.arg(source.join("seed.py")).arg(batch);
                command
            }
            Kind::BullMq => {
                let mut command = Command::new("node");
                command.arg(source.join("bullmq.mjs")).arg(process::peers());
                command
            }
        }
    }
}

fn python() -> PathBuf {
    process::peers().join("venv/bin/python3")
}

#[async_trait(?Send)]
impl Contender for Program {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        redis::version()?;
        let (name, install) = match self.kind {
            Kind::Seed(_) => ("Python and redis-py", "tests/bench/run, with python3 and pip"),
            Kind::BullMq => ("Node.js and BullMQ", "tests/bench/run, with node and npm"),
        };
        let output = self.command().arg("version").output().map_err(|_| Missing { install })?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if output.status.success() { Ok((name, text)) } else { Err(Missing { install }) }
    }

    fn ways(&self) -> Ways {
        self.ways
    }

    fn durability(&self) -> &'static str {
        redis::DURABILITY
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let redis = Redis::start(directory).await?;
        let mut command = self.command();
        command.arg(redis.port().to_string());
        let (process, stdin, stdout) = Process::converse("client", &mut command, &directory.join("client.log"))?;
        let conversation = Mutex::new(Conversation { stdin, lines: BufReader::new(stdout).lines() });
        let running = Used { process, redis, conversation };
        // It is connected when it answers.
        running.left().await?;
        Ok(Box::new(running))
    }
}

struct Used {
    process: Process,
    redis: Redis,
    conversation: Mutex<Conversation>,
}

struct Conversation {
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Used {
    async fn tell(&self, command: String) -> Result<Value> {
        let mut conversation = self.conversation.lock().await;
        conversation.stdin.write_all(format!("{command}\n").as_bytes()).await?;
        match conversation.lines.next_line().await? {
            Some(line) => Ok(serde_json::from_str(&line)?),
            None => Err(self.process.fault("ended")),
        }
    }
}

#[async_trait(?Send)]
impl Running for Used {
    fn processes(&self) -> Vec<&Process> {
        vec![&self.process, self.redis.process()]
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let count = numbers.end - numbers.start;
        let answer = self.tell(format!("fill {} {count} {size}", numbers.start)).await?;
        if answer["inserted"] == count { Ok(()) } else { Err(format!("a fill answered {answer}").into()) }
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        let answer = self.tell(format!("drain {tasks} {}", ledger.size())).await?;
        for number in answer["delivered"].as_array().into_iter().flatten() {
            ledger.deliver_checked(number.as_u64().ok_or("no number")?)?;
        }
        ledger.acked(answer["acked"].as_u64().ok_or_else(|| format!("a drain answered {answer}"))?);
        Ok(())
    }

    async fn left(&self) -> Result<u64> {
        Ok(self.tell("left".to_owned()).await?["left"].as_u64().ok_or("nothing is said of what is left")?)
    }

    async fn memory(&self) -> Result<f64> {
        self.redis.used().await
    }
}
