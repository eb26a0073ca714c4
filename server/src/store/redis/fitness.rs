//! Whether a Redis is fit to serve, and what OK survives on it.

use std::collections::{BTreeMap, HashMap};

use bb8_redis::redis::{ErrorKind, RedisError, ServerErrorKind, aio::MultiplexedConnection, cmd};

use super::{
    keys::{FORMAT, OLDEST_FORMAT},
    link::describe,
    nodes::{Node, Strength, Syncs},
};
use crate::store::{Survives, hex};

/// The oldest Redis whose commands the scripts can use.
const MINIMUM_VERSION: (u32, u32) = (6, 2);

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// As Redis says.
    pub(super) version: String,
    /// What is left of an answered insert or ack, at least, after which fault.
    pub(super) survives: Survives,
    /// The same in words.
    pub(super) note: &'static str,
    /// False if nothing is known to survive the end of Redis.
    pub(super) durable: bool,
    /// Differs when Redis was started again, or another one is the master now: what was known about its data may be wrong then.
    pub(super) run_id: String,
    /// Masters of a cluster that did not answer: their queues stand still, the others do not.
    pub(super) absent: Vec<Node>,
    /// Those that did.
    pub(super) answered: Vec<Node>,
}

/// Why it cannot serve.
#[derive(Debug)]
pub(super) enum Unfit {
    /// For people.
    Problem(String),
    /// This key tells of another history than before, or of none.
    Reset(String),
}

impl From<String> for Unfit {
    fn from(problem: String) -> Self {
        Self::Problem(problem)
    }
}

/// Which histories the data are of: the keys that tell, and what they tell.
pub(super) type Epochs = BTreeMap<String, String>;

/// Reads INFO. What may not be read is unknown, and does not keep the server from serving.
pub(super) async fn info(connection: &mut MultiplexedConnection) -> Result<String, RedisError> {
    match cmd("INFO").query_async(connection).await {
        Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) => Ok(String::new()),
        answer => answer,
    }
}

/// Whether a master is fit, by its INFO, and by CONFIG where that is allowed.
pub(super) async fn examine(connection: &mut MultiplexedConnection, info: &str) -> Result<Report, String> {
    let info = fields(info);
    refuse_unfit(&info)?;
    let (mut appendfsync, mut not_on_rewrite) = (None, None);
    if info.get("aof_enabled") == Some(&"1") {
        appendfsync = setting(connection, "appendfsync").await;
        not_on_rewrite = setting(connection, "no-appendfsync-on-rewrite").await;
    }
    let (survives, note) = survives(&info, appendfsync.as_deref(), not_on_rewrite.as_deref());
    Ok(Report {
        version: info.get("redis_version").copied().unwrap_or("unknown").to_owned(),
        survives,
        note,
        durable: info.get("aof_enabled") == Some(&"1"),
        run_id: info.get("run_id").copied().unwrap_or_default().to_owned(),
        absent: Vec::new(),
        answered: Vec::new(),
    })
}

impl Report {
    /// What is true of both, at the least.
    pub(super) fn and(self, other: Self) -> Self {
        let is_weaker = other.survives < self.survives || !other.durable && self.durable;
        let run_id = format!("{} {}", self.run_id, other.run_id);
        Self { run_id, ..if is_weaker { other } else { self } }
    }
}

/// What an insert can reach on it.
pub(super) fn strength(info: &str, report: &Report) -> Strength {
    /// The first with WAITAOF.
    const SYNCS_WHEN_ASKED: (u32, u32) = (7, 2);
    let info = fields(info);
    // slave0:ip=…,port=…,state=online,…
    let is_replica = |name: &str| name.strip_prefix("slave").is_some_and(|rest| rest.parse::<u32>().is_ok());
    let online = info.iter().filter(|(name, replica)| is_replica(name) && replica.contains("state=online"));
    let syncs = match report.survives {
        Survives::PowerCut => Syncs::Always,
        _ if report.durable && version(&report.version) >= SYNCS_WHEN_ASKED => Syncs::WhenAsked,
        _ => Syncs::Unknown,
    };
    Strength { replicas: online.count(), syncs }
}

/// Its first two parts.
fn version(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// Whether a node says that it is a master.
pub(super) fn is_master(info: &str) -> bool {
    fields(info).get("role") != Some(&"slave")
}

/// Which history the data are of that this key is among. Begins one where none is told, unless one is known.
pub(super) async fn epoch(
    connection: &mut MultiplexedConnection,
    key: &str,
    is_known: bool,
) -> Result<Option<String>, RedisError> {
    let mut read = cmd("GET");
    read.arg(key);
    let told: Option<String> = read.query_async(connection).await?;
    if told.is_some() || is_known {
        return Ok(told);
    }
    let mut fresh = [0; 16];
    if getrandom::fill(&mut fresh).is_err() {
        return Ok(None);
    }
    // A full Redis refuses it; the next check tries again. Another server may have been first.
    let _: Result<(), _> = cmd("SET").arg(key).arg(hex(&fresh)).arg("NX").exec_async(connection).await;
    read.query_async(connection).await
}

fn fields(info: &str) -> HashMap<&str, &str> {
    info.lines().filter_map(|line| line.trim_end().split_once(':')).collect()
}

fn refuse_unfit(info: &HashMap<&str, &str>) -> Result<(), String> {
    let field = |name| info.get(name).copied();
    if let Some(found) = field("redis_version")
        && version(found) < MINIMUM_VERSION
    {
        let (major, minor) = MINIMUM_VERSION;
        return Err(format!("Redis {found} is too old; {major}.{minor} or later is needed"));
    }
    if let Some(policy) = field("maxmemory_policy")
        && policy != "noeviction"
    {
        return Err(format!("Redis may evict tasks: its maxmemory-policy is {policy}; set it to noeviction"));
    }
    if field("role") == Some("slave") && field("slave_read_only") != Some("0") {
        return Err("Redis is a read-only replica; give the address of the master".to_owned());
    }
    if field("loading").is_some_and(|loading| loading != "0") {
        return Err("Redis is loading its data".to_owned());
    }
    Ok(())
}

/// Writes the layout's version on first use and over one whose data can be used as they are, and refuses another one.
pub(super) async fn claim_format(connection: &mut MultiplexedConnection, key: &str) -> Result<(), String> {
    let found: Option<String> = cmd("GET").arg(key).query_async(connection).await.map_err(|error| describe(&error))?;
    let Some(found) = found else {
        // Redis may be full; the next check tries again.
        let _: Result<(), _> = cmd("SET").arg(key).arg(FORMAT).arg("NX").query_async(connection).await;
        return Ok(());
    };
    match found.parse::<u64>() {
        Ok(FORMAT) => Ok(()),
        Ok(OLDEST_FORMAT..FORMAT) => {
            // Servers that know only the old one stay away from their next check on. A full Redis refuses it until it has drained.
            let mut raise = cmd("SET");
            raise.arg(key).arg(FORMAT).arg("XX").arg("GET");
            let before: Result<Option<String>, _> = raise.query_async(connection).await;
            match before {
                // A newer server came between.
                Ok(Some(before)) if before != found && before != FORMAT.to_string() => {
                    let _: Result<(), _> = cmd("SET").arg(key).arg(&before).query_async(connection).await;
                    Err(newer(key, &before))
                }
                _ => Ok(()),
            }
        }
        Ok(version) if version < FORMAT => Err(format!(
            "the data under {key} has layout version {version}, and this server reads {OLDEST_FORMAT} to {FORMAT}; use the server that wrote it, or another --key-prefix"
        )),
        _ => Err(newer(key, &found)),
    }
}

fn newer(key: &str, found: &str) -> String {
    format!("the data under {key} has layout version {found:?}, and this server knows {FORMAT}; use a newer server")
}

/// Unknown where CONFIG is refused.
async fn setting(connection: &mut MultiplexedConnection, name: &str) -> Option<String> {
    let answer: Result<Vec<String>, _> = cmd("CONFIG").arg("GET").arg(name).query_async(connection).await;
    answer.ok()?.into_iter().nth(1)
}

/// What nothing is known of.
pub(super) const UNKNOWN: &str = "a kill of this server, and nothing that ends Redis as far as is known";

/// What cannot be read is unknown and claims the weakest. While Redis rewrites its file, for minutes perhaps, it syncs
/// nothing if it was told not to, whatever `appendfsync` says.
fn survives(
    info: &HashMap<&str, &str>,
    appendfsync: Option<&str>,
    not_on_rewrite: Option<&str>,
) -> (Survives, &'static str) {
    match (info.get("aof_enabled").copied(), appendfsync) {
        (Some("1"), Some("always")) => match not_on_rewrite {
            Some("no") => (Survives::PowerCut, "a power cut of Redis' host (append-only file, fsync always)"),
            Some(_) => (
                Survives::ServerKill,
                "a kill of this server; if Redis' host fails while the append-only file is rewritten, what was answered meanwhile can go (fsync always, but no-appendfsync-on-rewrite)",
            ),
            None => (
                Survives::ServerKill,
                "a kill of this server; if Redis' host fails, some of it can go (append-only file, fsync always, no-appendfsync-on-rewrite unknown)",
            ),
        },
        (Some("1"), Some("everysec")) => (
            Survives::ServerKill,
            "a kill of this server; if Redis or its host fails, up to 2 s of it can go (append-only file, fsync every second)",
        ),
        (Some("1"), _) => (
            Survives::ServerKill,
            "a kill of this server; if Redis or its host fails, some of it can go (append-only file, fsync unknown)",
        ),
        (Some(_), _) => {
            (Survives::ServerKill, "a kill of this server, and nothing that ends Redis (no append-only file)")
        }
        (None, _) => (Survives::ServerKill, UNKNOWN),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn unfit_redis_is_refused_with_the_reason() {
        let refused = |info: &str| refuse_unfit(&fields(info)).unwrap_err();
        assert!(refused("redis_version:6.0.16\r\n").contains("too old"));
        assert!(refused("redis_version:7.0.15\r\nmaxmemory_policy:allkeys-lru\r\n").contains("maxmemory-policy"));
        assert!(refused("role:slave\r\nslave_read_only:1\r\n").contains("read-only"));
        assert!(refused("loading:1\r\n").contains("loading"));
        refuse_unfit(&fields("redis_version:6.2.0\r\nmaxmemory_policy:noeviction\r\nrole:master\r\nloading:0\r\n"))
            .unwrap();
        refuse_unfit(&fields("")).unwrap();
    }

    #[test]
    fn what_is_unknown_claims_the_weakest() {
        assert_eq!(survives(&fields(""), Some("always"), Some("no")), (Survives::ServerKill, UNKNOWN));
        let with_file = |appendfsync, not_on_rewrite| survives(&fields("aof_enabled:1"), appendfsync, not_on_rewrite);
        assert!(with_file(None, Some("no")).1.contains("unknown"));
        assert_eq!(with_file(Some("everysec"), Some("no")).0, Survives::ServerKill);
        assert_eq!(with_file(Some("always"), Some("no")).0, Survives::PowerCut);
        assert_eq!(with_file(Some("always"), Some("yes")).0, Survives::ServerKill);
        let (survives, note) = with_file(Some("always"), None);
        assert!(survives == Survives::ServerKill && note.contains("unknown"), "{note}");
    }
}
