//! Redis Streams with a consumer group, from Rust: what somebody builds who wants a queue of Redis alone.

use std::{ops::Range, path::Path};

use ::redis::{Pipeline, RedisError, pipe};
use async_trait::async_trait;
use tokio::task::JoinSet;

use crate::{
    contender::{Contender, Missing, Running, Ways},
    fault::Result,
    ledger::{Ledger, payload},
    ours::{Shared, Shares, all},
    process::Process,
    redis::{self, Connection, Redis, ask},
};

const STREAM: &str = "bench";
const GROUP: &str = "workers";

/// Redis Streams, with so many tasks a command, and so many callers on one connection.
pub(crate) struct Streams {
    batch: u64,
    callers: usize,
}

pub(crate) const BY_HUNDREDS: Streams = Streams { batch: 100, callers: 4 };
pub(crate) const ONE_BY_ONE: Streams = one_by_one(64);

/// So many callers with a command at a time.
pub(crate) const fn one_by_one(callers: usize) -> Streams {
    Streams { batch: 1, callers }
}

#[async_trait(?Send)]
impl Contender for Streams {
    fn name(&self) -> String {
        "Redis Streams".to_owned()
    }

    fn version(&self) -> std::result::Result<(&'static str, String), Missing> {
        redis::version()
    }

    fn ways(&self) -> Ways {
        if self.batch == 1 {
            Ways { insert: "XADD, 64 callers", take: "XACK, XDEL and XREADGROUP COUNT 1 together, 64 callers" }
        } else {
            Ways {
                insert: "XADD, pipelined by 100, 4 callers",
                take: "XACK, XDEL and XREADGROUP COUNT 100 together, 4 callers",
            }
        }
    }

    fn durability(&self) -> &'static str {
        redis::DURABILITY
    }

    async fn start(&self, directory: &Path) -> Result<Box<dyn Running>> {
        let redis = Redis::start(directory).await?;
        let mut connection = redis.connection().await?;
        ask::<()>(&mut connection, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await?;
        Ok(Box::new(Used { redis, connection, batch: self.batch, callers: self.callers }))
    }
}

struct Used {
    redis: Redis,
    connection: Connection,
    batch: u64,
    callers: usize,
}

#[async_trait(?Send)]
impl Running for Used {
    fn processes(&self) -> Vec<&Process> {
        vec![self.redis.process()]
    }

    async fn fill(&self, numbers: Range<u64>, size: usize) -> Result<()> {
        let shares = Shares::new(numbers, self.batch);
        let mut set = JoinSet::new();
        for _ in 0..self.callers {
            let (mut connection, shares) = (self.connection.clone(), shares.clone());
            set.spawn(async move {
                while let Some(numbers) = shares.take() {
                    let mut pipeline = pipe();
                    for number in numbers {
                        pipeline.cmd("XADD").arg(STREAM).arg("*").arg("v").arg(&payload(number, size)[..]).ignore();
                    }
                    pipeline.query_async::<()>(&mut connection).await?;
                }
                Ok(())
            });
        }
        all(set).await.map(drop)
    }

    async fn drain(&self, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        let (shares, shared) = (Shares::new(0..tasks, self.batch), Shared::new(ledger));
        let mut set = JoinSet::new();
        for caller in 0..self.callers {
            let (mut connection, shares, shared) = (self.connection.clone(), shares.clone(), shared.clone());
            let consumer = format!("c{caller}");
            set.spawn(async move {
                let mut held = Vec::new();
                loop {
                    let wanted = shares.take().map(|part| part.end - part.start);
                    let mut pipeline = pipe();
                    end(&mut pipeline, &held);
                    let Some(wanted) = wanted else {
                        let acked = if held.is_empty() {
                            0
                        } else {
                            pipeline.query_async::<[u64; 2]>(&mut connection).await?[0]
                        };
                        return shared.acked(acked);
                    };
                    read(&mut pipeline, &consumer, wanted);
                    let (acked, found) = exchange(&pipeline, &mut connection, !held.is_empty()).await?;
                    shared.acked(acked)?;
                    held.clear();
                    for (id, (_, payload)) in found {
                        shared.deliver(&payload)?;
                        held.push(id);
                    }
                    if held.len() as u64 != wanted {
                        return Err("a read found less than is there".into());
                    }
                }
            });
        }
        all(set).await?;
        shared.give_back(ledger)
    }

    async fn left(&self) -> Result<u64> {
        let mut connection = self.connection.clone();
        let there = ask::<u64>(&mut connection, &["XLEN", STREAM]).await?;
        let (held, _, _, _) = ask::<Pending>(&mut connection, &["XPENDING", STREAM, GROUP]).await?;
        Ok(there + held)
    }

    async fn memory(&self) -> Result<f64> {
        self.redis.used().await
    }
}

/// What XPENDING answers.
type Pending = (u64, Option<String>, Option<String>, Option<Vec<(String, u64)>>);
/// An entry: its id, its only field and its payload.
type Entry = (String, (String, Vec<u8>));
/// What XREADGROUP answers.
type Found = Option<Vec<(String, Vec<Entry>)>>;

/// Ends these entries for good.
fn end(pipeline: &mut Pipeline, held: &[String]) {
    if !held.is_empty() {
        pipeline.cmd("XACK").arg(STREAM).arg(GROUP).arg(held);
        pipeline.cmd("XDEL").arg(STREAM).arg(held);
    }
}

fn read(pipeline: &mut Pipeline, consumer: &str, count: u64) {
    pipeline.cmd("XREADGROUP").arg("GROUP").arg(GROUP).arg(consumer);
    pipeline.arg("COUNT").arg(count).arg("STREAMS").arg(STREAM).arg(">");
}

/// How many acks were confirmed, and what was read.
async fn exchange(
    pipeline: &Pipeline,
    connection: &mut Connection,
    acks: bool,
) -> std::result::Result<(u64, Vec<Entry>), RedisError> {
    let (acked, found) = if acks {
        let (acked, _, found) = pipeline.query_async::<(u64, u64, Found)>(connection).await?;
        (acked, found)
    } else {
        (0, pipeline.query_async::<(Found,)>(connection).await?.0)
    };
    Ok((acked, found.into_iter().flatten().flat_map(|(_, entries)| entries).collect()))
}
