//! A redis-server, as a store of DataQueue and of peers: with its append-only file synced every second.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path, process::Command};

use redis::{AsyncConnectionConfig, Client, FromRedisValue, aio::MultiplexedConnection};

use crate::{
    contender::Missing,
    fault::Result,
    process::{self, Process},
};

/// What an answer of it survives, and so of all that is on it.
pub(crate) const DURABILITY: &str = "AOF, fsync every second";
/// How it is set up.
const SETTINGS: &str = "appendonly yes, appendfsync everysec, no rewrite of the file meanwhile";

pub(crate) type Connection = MultiplexedConnection;

/// A running redis-server.
pub(crate) struct Redis {
    process: Process,
    address: SocketAddr,
}

pub(crate) fn version() -> std::result::Result<(&'static str, String), Missing> {
    let text =
        process::version("redis-server", "--version").ok_or(Missing { install: "apt-get install redis-server" })?;
    let version = text.split_whitespace().find_map(|word| word.strip_prefix("v=")).unwrap_or_default();
    Ok(("redis-server", format!("{version}, {SETTINGS}")))
}

impl Redis {
    /// Starts it with its data in a new directory of this one.
    pub(crate) async fn start(directory: &Path) -> Result<Self> {
        let address = process::free_address().await?;
        let directory = directory.join("redis");
        fs::create_dir(&directory)?;
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--daemonize", "no"]);
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]);
        command.args(["--auto-aof-rewrite-percentage", "0", "--maxmemory-policy", "noeviction"]);
        command.arg("--logfile").arg(directory.join("log")).arg("--dir").arg(&directory);
        let mut process = Process::start("store", &mut command, &directory.with_extension("log"))?;
        process.listens(address).await?;
        Ok(Self { process, address })
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    pub(crate) async fn connection(&self) -> Result<Connection> {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        Ok(Client::open(self.url())?.get_multiplexed_async_connection_with_config(&config).await?)
    }

    /// A section of INFO.
    pub(crate) async fn info(&self, section: &str) -> Result<BTreeMap<String, String>> {
        let text = ask::<String>(&mut self.connection().await?, &["INFO", section]).await?;
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Ok(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// Bytes that its data takes, by its own account.
    pub(crate) async fn used(&self) -> Result<f64> {
        let memory = self.info("memory").await?;
        Ok(memory.get("used_memory").ok_or("Redis does not tell its memory")?.parse()?)
    }
}

/// Sends a command.
pub(crate) async fn ask<T: FromRedisValue>(connection: &mut Connection, words: &[&str]) -> Result<T> {
    let mut command = redis::Cmd::new();
    words.iter().for_each(|word| {
        command.arg(word);
    });
    Ok(command.query_async(connection).await?)
}
