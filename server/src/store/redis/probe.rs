//! The check whether Redis is fit to serve, which runs all the time; of a cluster, each of its masters, and who they are.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bb8_redis::redis::{RedisError, Value, aio::MultiplexedConnection, cmd, from_redis_value};
use futures_util::future;
use tokio::time::timeout;

use super::{
    fitness::{self, Epochs, Report, Unfit},
    keys::Keys,
    link::{Presence, describe},
    nodes::{Node, Nodes, Ranges},
};

/// Of the time that a check may take, a node of a cluster gets this part, twice: others are there when one is not.
const STEPS_PER_CHECK: u32 = 4;

/// So often a master does not answer before it counts as away: it may only be busy.
const MISSES: u32 = 2;

/// The connections on which the check asks.
pub(super) struct Probe {
    nodes: Arc<Nodes>,
    /// Of all of it, for people.
    presence: Arc<Presence>,
    timeout: Duration,
    connections: HashMap<Node, MultiplexedConnection>,
    /// How often in a row a master did not answer.
    missed: HashMap<Node, u32>,
}

/// What a node of a cluster says.
struct Said {
    node: Node,
    connection: MultiplexedConnection,
    info: String,
    epoch: u64,
    is_whole: bool,
    ranges: Ranges,
}

impl Probe {
    pub(super) fn new(nodes: Arc<Nodes>, presence: Arc<Presence>, timeout: Duration) -> Self {
        Self { nodes, presence, timeout, connections: HashMap::new(), missed: HashMap::new() }
    }

    /// Connects if need be and asks. Of histories that are known, others are an error. Answers what was found, and the histories.
    pub(super) async fn ask(&mut self, keys: &Keys, known: &Epochs) -> Result<(Report, Epochs), Unfit> {
        let limit = self.timeout;
        let asked = match self.nodes.is_cluster() {
            true => timeout(limit, self.ask_cluster(keys, known)).await,
            false => timeout(limit, self.ask_one(keys, known)).await,
        };
        let answer = asked.unwrap_or_else(|_| Err(Unfit::Problem(self.presence.timed_out(limit, true).to_string())));
        if answer.is_err() {
            self.connections.clear();
        }
        answer
    }

    async fn ask_one(&mut self, keys: &Keys, known: &Epochs) -> Result<(Report, Epochs), Unfit> {
        let had_connection = !self.connections.is_empty();
        let first = self.ask_one_now(keys, known).await;
        if !had_connection || !matches!(first, Err(Unfit::Problem(_))) {
            return first;
        }
        // It may be that only this connection was lost, and then the others were too.
        self.connections.clear();
        self.nodes.begin_epoch();
        self.ask_one_now(keys, known).await
    }

    async fn ask_one_now(&mut self, keys: &Keys, known: &Epochs) -> Result<(Report, Epochs), Unfit> {
        let address = self.presence.address().to_owned();
        let at = |reason| Unfit::Problem(format!("Redis at {address}: {reason}"));
        let connection = self.connection(&Node::default()).await;
        let mut connection = connection.map_err(|error| self.presence.cannot_connect(&error))?;
        let info = fitness::info(&mut connection).await.map_err(|error| at(describe(&error)))?;
        let report = fitness::examine(&mut connection, &info).await.map_err(at)?;
        self.nodes.note_strength(Node::default(), fitness::strength(&info, &report));
        fitness::claim_format(&mut connection, &keys.format()).await.map_err(at)?;
        let mut epochs = known.clone();
        for key in keys.epochs(false) {
            let told = fitness::epoch(&mut connection, &key, known.contains_key(&key)).await;
            note_epoch(&mut epochs, key, told.map_err(|error| at(describe(&error)))?)?;
        }
        Ok((report, epochs))
    }

    /// Asks all nodes that are known who the masters are, and believes the one that has heard of the latest change; then the masters.
    async fn ask_cluster(&mut self, keys: &Keys, known: &Epochs) -> Result<(Report, Epochs), Unfit> {
        let patience = self.timeout / STEPS_PER_CHECK;
        let (mut said, why) = self.all_say(patience).await;
        let best = said.iter().max_by_key(|said| (said.is_whole, said.epoch));
        let ranges = best.map(|said| said.ranges.clone()).filter(|ranges| !ranges.is_empty());
        let Some(ranges) = ranges else {
            return Err(Unfit::Problem(format!("no node of the cluster at {} answers{why}", self.presence.address())));
        };
        self.nodes.set_owners(ranges);
        let masters = self.nodes.owners();
        said.retain(|said| masters.contains(&said.node) && fitness::is_master(&said.info));
        let mut report: Option<Report> = None;
        for said in &mut said {
            let node = &said.node;
            let examined = fitness::examine(&mut said.connection, &said.info).await;
            let examined = examined.map_err(|reason| Unfit::Problem(format!("Redis at {node}: {reason}")))?;
            self.nodes.note_strength(node.clone(), fitness::strength(&said.info, &examined));
            report = Some(match report {
                None => examined,
                Some(others) => others.and(examined),
            });
        }
        let answered: BTreeSet<_> = said.iter().map(|said| &said.node).collect();
        let silent: Vec<Node> = masters.iter().filter(|master| !answered.contains(master)).cloned().collect();
        self.missed.retain(|node, _| silent.contains(node));
        let mut absent = Vec::new();
        for node in silent {
            let missed = self.missed.entry(node.clone()).or_default();
            *missed = missed.saturating_add(1);
            if *missed >= MISSES {
                absent.push(node);
            }
        }
        let report =
            report.ok_or_else(|| format!("no master of the cluster at {} answers", self.presence.address()))?;
        let connection_of = |key: &str| {
            let owner = self.nodes.owner(Keys::slot(key))?;
            said.iter().find(|said| said.node == owner).map(|said| said.connection.clone())
        };
        if let Some(mut connection) = connection_of(&keys.format()) {
            let claimed = timeout(patience, fitness::claim_format(&mut connection, &keys.format())).await;
            claimed.unwrap_or(Ok(())).map_err(|reason| format!("Redis at {}: {reason}", self.presence.address()))?;
        }
        let told = future::join_all(keys.epochs(true).into_iter().map(async |key| {
            let mut connection = connection_of(&key)?;
            let told = timeout(patience, fitness::epoch(&mut connection, &key, known.contains_key(&key))).await;
            Some((key, told.ok()?.ok()?))
        }));
        let mut epochs = known.clone();
        for (key, told) in told.await.into_iter().flatten() {
            note_epoch(&mut epochs, key, told)?;
        }
        let answered = said.into_iter().map(|said| said.node).collect();
        Ok((Report { absent, answered, ..report }, epochs))
    }

    /// What they say; and why one of the others does not, for people.
    async fn all_say(&mut self, patience: Duration) -> (Vec<Said>, String) {
        let mut asked: BTreeSet<Node> = self.nodes.route().seeds().into_iter().collect();
        asked.extend(self.nodes.owners());
        self.connections.retain(|node, _| asked.contains(node));
        let connections = &self.connections;
        let said = future::join_all(asked.into_iter().map(async |node| {
            let asking = async {
                let connection = match connections.get(&node) {
                    Some(connection) => connection.clone(),
                    None => self.nodes.route().connect(&node).await?,
                };
                says(node.clone(), connection).await
            };
            (node.clone(), timeout(patience, asking).await)
        }))
        .await;
        let (mut all, mut why) = (Vec::new(), String::new());
        for (node, said) in said {
            match said {
                Ok(Ok(said)) => {
                    self.connections.insert(node, said.connection.clone());
                    all.push(said);
                    continue;
                }
                Ok(Err(error)) => why = format!(": {node}: {}", describe(&error)),
                Err(_) => {}
            }
            self.connections.remove(&node);
        }
        (all, why)
    }

    async fn connection(&mut self, node: &Node) -> Result<MultiplexedConnection, RedisError> {
        if let Some(connection) = self.connections.get(node) {
            return Ok(connection.clone());
        }
        let connection = self.nodes.route().connect(node).await?;
        self.connections.insert(node.clone(), connection.clone());
        Ok(connection)
    }
}

/// A history that is another one than before, or none any more, is an error. One that is not known begins.
fn note_epoch(epochs: &mut Epochs, key: String, told: Option<String>) -> Result<(), Unfit> {
    match (told, epochs.get(&key)) {
        (told, Some(before)) if told.as_ref() != Some(before) => Err(Unfit::Reset(key)),
        (Some(told), None) => {
            epochs.insert(key, told);
            Ok(())
        }
        _ => Ok(()),
    }
}

async fn says(node: Node, mut connection: MultiplexedConnection) -> Result<Said, RedisError> {
    let (mut state, mut slots) = (cmd("CLUSTER"), cmd("CLUSTER"));
    let state: String = state.arg("INFO").query_async(&mut connection).await?;
    let ranges = ranges(&node, slots.arg("SLOTS").query_async(&mut connection).await?)?;
    let info = fitness::info(&mut connection).await?;
    let field = |name| state.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let epoch = field("cluster_current_epoch:").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    let is_whole = field("cluster_state:") == Some("ok");
    Ok(Said { node, connection, info, epoch, is_whole, ranges })
}

/// The last slot of each range, and its master.
fn ranges(asked: &Node, slots: Value) -> Result<Ranges, RedisError> {
    let mut ranges = Ranges::new();
    for range in from_redis_value::<Vec<Vec<Value>>>(slots)? {
        // First, last, then the nodes, the master before its replicas.
        let [_, last, master, ..] = range.as_slice() else { continue };
        let master: Vec<Value> = from_redis_value(master.clone())?;
        let [host, port, ..] = master.as_slice() else { continue };
        let host: Option<String> = from_redis_value(host.clone())?;
        // A node that does not know its own name is where it was asked.
        let own = || asked.host_and_port().map(|(host, _)| host.to_owned());
        let Some(host) = host.filter(|host| !host.is_empty()).or_else(own) else { continue };
        ranges.push((from_redis_value(last.clone())?, Node::at(&host, from_redis_value(port.clone())?)));
    }
    ranges.sort_unstable();
    Ok(ranges)
}
