//! Whether a Redis is fit to serve, and what OK survives on it.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use bb8_redis::redis::{
    ErrorKind, FromRedisValue, RedisError, ServerErrorKind, Value, cluster_routing::SingleNodeRoutingInfo, cmd,
    from_redis_value,
};
use futures_util::future;
use tokio::time::timeout;

use super::{
    keys::{FORMAT, Keys, OLDEST_FORMAT},
    link::{describe, is_elsewhere},
    route::Wire,
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
    /// Which histories the data are of: the keys that tell, and what they tell.
    pub(super) epochs: Epochs,
    /// Of a cluster: the last slot of each range, in their order, and a number for the master that has it.
    pub(super) owners: Vec<(u16, u16)>,
    /// Masters of a cluster that did not answer: their queues stand still, the others do not.
    pub(super) absent: Vec<String>,
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

/// As [`Report`] has them.
struct Masters {
    masters: Vec<Master>,
    absent: Vec<String>,
    owners: Vec<(u16, u16)>,
}

/// A master, and what it said.
struct Master {
    node: SingleNodeRoutingInfo,
    address: String,
    info: String,
}

/// Reads INFO, CONFIG where it is allowed, and the version of the layout; of a cluster, of each master that answers in a part of this
/// time.
pub(super) async fn examine(wire: &mut Wire, keys: &Keys, known: &Epochs, patience: Duration) -> Result<Report, Unfit> {
    let patience = patience / 4;
    let Masters { masters, absent, owners } = masters(wire, patience).await?;
    for master in &masters {
        refuse_unfit(&fields(&master.info)).map_err(|problem| match wire {
            Wire::One(_) => problem,
            Wire::Cluster(_) => format!("{}: {problem}", master.address),
        })?;
    }
    claim_format(wire, &keys.format(), patience).await?;
    let mut report: Option<Report> = None;
    for master in &masters {
        let of_this = report_of(wire, master).await;
        report = Some(match report {
            None => of_this,
            Some(others) => others.and(of_this),
        });
    }
    let mut report = report.ok_or_else(|| format!("no master answers: {}", absent.join(", ")))?;
    report.epochs = epochs(wire, keys, known, patience).await?;
    report.absent = absent;
    report.owners = owners;
    Ok(report)
}

impl Report {
    /// What is true of both, at the least.
    fn and(self, other: Self) -> Self {
        let is_weaker = other.survives < self.survives || !other.durable && self.durable;
        let run_id = format!("{} {}", self.run_id, other.run_id);
        Self { run_id, ..if is_weaker { other } else { self } }
    }
}

async fn report_of(wire: &mut Wire, master: &Master) -> Report {
    let info = fields(&master.info);
    let (mut appendfsync, mut not_on_rewrite) = (None, None);
    if info.get("aof_enabled") == Some(&"1") {
        appendfsync = setting(wire, master, "appendfsync").await;
        not_on_rewrite = setting(wire, master, "no-appendfsync-on-rewrite").await;
    }
    let (survives, note) = survives(&info, appendfsync.as_deref(), not_on_rewrite.as_deref());
    Report {
        version: info.get("redis_version").copied().unwrap_or("unknown").to_owned(),
        survives,
        note,
        durable: info.get("aof_enabled") == Some(&"1"),
        run_id: info.get("run_id").copied().unwrap_or_default().to_owned(),
        epochs: BTreeMap::new(),
        owners: Vec::new(),
        absent: Vec::new(),
    }
}

async fn masters(wire: &mut Wire, patience: Duration) -> Result<Masters, String> {
    let asking = wire.clone();
    let info = async |node: SingleNodeRoutingInfo| match asking.clone().ask(cmd("INFO"), node).await.and_then(text) {
        // What may not be read is unknown, and does not keep the server from serving.
        Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) => Ok(String::new()),
        answer => answer,
    };
    let Wire::Cluster(_) = wire else {
        let node = SingleNodeRoutingInfo::Random;
        let info = info(node.clone()).await.map_err(|error| describe(&error))?;
        let masters = vec![Master { node, address: String::new(), info }];
        return Ok(Masters { masters, absent: Vec::new(), owners: Vec::new() });
    };
    let ranges = ranges(wire, patience).await?;
    let mut addresses: Vec<_> = ranges.iter().map(|(_, address)| address.clone()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let number = |address| addresses.binary_search(address).map_or(0, |at| u16::try_from(at).unwrap_or(u16::MAX));
    let mut owners: Vec<_> = ranges.iter().map(|(last, address)| (*last, number(address))).collect();
    owners.sort_unstable();
    let asked = future::join_all(addresses.into_iter().map(async |(host, port)| {
        let address = format!("{host}:{port}");
        let node = SingleNodeRoutingInfo::ByAddress { host, port };
        match timeout(patience, info(node.clone())).await {
            Ok(Ok(info)) if fields(&info).get("role") != Some(&"slave") => Ok(Master { node, address, info }),
            _ => Err(address),
        }
    }));
    let (mut masters, mut absent) = (Vec::new(), Vec::new());
    for answer in asked.await {
        match answer {
            Ok(master) => masters.push(master),
            Err(address) => absent.push(address),
        }
    }
    Ok(Masters { masters, absent, owners })
}

/// The last slot of each range, and where its master is. Any node knows, if it answers.
async fn ranges(wire: &mut Wire, patience: Duration) -> Result<Vec<(u16, (String, u16))>, String> {
    const TRIES: u32 = 4;
    let mut why = "a node does not answer".to_owned();
    for _ in 0..TRIES {
        let mut slots = cmd("CLUSTER");
        slots.arg("SLOTS");
        match timeout(patience / TRIES, wire.ask(slots, SingleNodeRoutingInfo::Random)).await {
            Ok(Ok(slots)) => return read_ranges(slots).map_err(|error| describe(&error)),
            Ok(Err(error)) => why = describe(&error),
            Err(_) => {}
        }
    }
    Err(format!("cannot tell where the masters are: {why}"))
}

fn read_ranges(slots: Value) -> Result<Vec<(u16, (String, u16))>, RedisError> {
    let mut ranges = Vec::new();
    for range in from_redis_value::<Vec<Vec<Value>>>(slots)? {
        // First, last, then the nodes, the master before its replicas.
        let [_, last, master, ..] = range.as_slice() else { continue };
        let master: Vec<Value> = from_redis_value(master.clone())?;
        let [host, port, ..] = master.as_slice() else { continue };
        ranges.push((from_redis_value(last.clone())?, (text(host.clone())?, from_redis_value(port.clone())?)));
    }
    Ok(ranges)
}

fn text(value: Value) -> Result<String, RedisError> {
    Ok(String::from_redis_value(value)?)
}

/// Which histories the data are of: the keys that tell, and what they tell.
pub(super) type Epochs = BTreeMap<String, String>;

/// Reads which histories the data are of, and begins one where none is told. A key of which something else was known before has
/// lost its data, and with it what else was there, unless that is accepted. Who does not answer, or is full, tells nothing.
async fn epochs(wire: &mut Wire, keys: &Keys, known: &Epochs, patience: Duration) -> Result<Epochs, Unfit> {
    let names = keys.epochs(matches!(wire, Wire::Cluster(_)));
    let mut fresh = [0; 16];
    getrandom::fill(&mut fresh).map_err(|error| Unfit::Problem(error.to_string()))?;
    let fresh = hex(&fresh);
    let told = future::join_all(names.into_iter().map(async |key| {
        let (mut wire, fresh) = (wire.clone(), &fresh);
        let is_known = known.contains_key(&key);
        let asking = async {
            let mut read = cmd("GET");
            read.arg(&key);
            let told: Option<String> = read.query_async(&mut wire).await.ok()?;
            if told.is_some() || is_known {
                return Some(told);
            }
            cmd("SET").arg(&key).arg(fresh).arg("NX").exec_async(&mut wire).await.ok()?;
            // Another server may have been first.
            read.query_async(&mut wire).await.ok()
        };
        let told = timeout(patience, asking).await.ok().flatten();
        (key, told)
    }));
    let mut epochs = known.clone();
    for (key, told) in told.await {
        match (told, known.get(&key)) {
            (Some(told), Some(before)) if told.as_ref() != Some(before) => return Err(Unfit::Reset(key)),
            (Some(Some(told)), _) => drop(epochs.insert(key, told)),
            _ => {}
        }
    }
    Ok(epochs)
}

fn fields(info: &str) -> HashMap<&str, &str> {
    info.lines().filter_map(|line| line.trim_end().split_once(':')).collect()
}

fn refuse_unfit(info: &HashMap<&str, &str>) -> Result<(), String> {
    let field = |name| info.get(name).copied();
    if let Some(version) = field("redis_version") {
        let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if found < MINIMUM_VERSION {
            let (major, minor) = MINIMUM_VERSION;
            return Err(format!("Redis {version} is too old; {major}.{minor} or later is needed"));
        }
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
async fn claim_format(connection: &mut Wire, key: &str, patience: Duration) -> Result<(), String> {
    let read = async { cmd("GET").arg(key).query_async::<Option<String>>(&mut connection.clone()).await };
    let found = match (timeout(patience, read).await, &*connection) {
        (Ok(Ok(found)), _) => found,
        // Of a cluster, the one master that has it; the others need not wait for it.
        (Err(_), Wire::Cluster(_)) => return Ok(()),
        (Ok(Err(error)), Wire::Cluster(_)) if is_elsewhere(&error) || error.is_io_error() => return Ok(()),
        (Ok(Err(error)), _) => return Err(describe(&error)),
        (Err(_), Wire::One(_)) => return Err("it does not answer".to_owned()),
    };
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
async fn setting(wire: &mut Wire, master: &Master, name: &str) -> Option<String> {
    let mut get = cmd("CONFIG");
    get.arg("GET").arg(name);
    let answer: Vec<String> = from_redis_value(wire.ask(get, master.node.clone()).await.ok()?).ok()?;
    answer.into_iter().nth(1)
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
