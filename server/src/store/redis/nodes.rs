//! The nodes that have the data: the only Redis, or the masters of a cluster, and which slots each of them has.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use super::{
    link::{Presence, Standing},
    route::Route,
};

/// Where a node is: `host:port`. Of what is no cluster, nothing: its address says how to find it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Node(String);

impl Node {
    pub(super) fn at(host: &str, port: u16) -> Self {
        Self(format!("{host}:{port}"))
    }

    /// As redis-rs tells of a redirection.
    pub(super) fn parse(address: &str) -> Option<Self> {
        let node = Self(address.to_owned());
        node.host_and_port().map(|_| node.clone())
    }

    pub(super) fn host_and_port(&self) -> Option<(&str, u16)> {
        let (host, port) = self.0.rsplit_once(':')?;
        Some((host, port.parse().ok()?)).filter(|(host, _)| !host.is_empty())
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Of each range of slots, in their order, the last one, and who has them.
pub(super) type Ranges = Vec<(u16, Node)>;

/// What a node can make of an insert beyond having it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Strength {
    /// Replicas that are online.
    pub(super) replicas: usize,
    pub(super) syncs: Syncs,
}

/// When a node has what it was told on its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Syncs {
    /// Before it answers.
    Always,
    /// When it is asked to.
    WhenAsked,
    /// Nobody knows when, or never.
    #[default]
    Unknown,
}

/// For so long after a replica was there none is a fault that passes: another one is master, and the others are on their way to it.
const REPLICAS_RETURN: Duration = Duration::from_secs(60);

/// What is known of the strengths of nodes.
#[derive(Default)]
struct Strengths {
    of_nodes: HashMap<Node, Strength>,
    had_replicas: Option<Instant>,
}

/// What a process knows of them.
pub(super) struct Nodes {
    strengths: Mutex<Strengths>,
    route: Arc<Route>,
    seeds: Vec<Node>,
    owners: RwLock<Owners>,
    presences: Mutex<HashMap<Node, Arc<Presence>>>,
}

#[derive(Default)]
struct Owners {
    ranges: Ranges,
    /// What was heard since the ranges were read.
    moved: HashMap<u16, Node>,
}

impl Nodes {
    pub(super) fn new(route: Arc<Route>) -> Self {
        let (owners, presences, strengths) = Default::default();
        Self { seeds: route.seeds(), route, owners, presences, strengths }
    }

    pub(super) fn route(&self) -> &Arc<Route> {
        &self.route
    }

    pub(super) fn is_cluster(&self) -> bool {
        self.route.address().is_cluster()
    }

    /// Who has a slot, as far as is known. Before the first check, one who knows.
    pub(super) fn owner(&self, slot: u16) -> Option<Node> {
        if !self.is_cluster() {
            return Some(Node::default());
        }
        let owners = self.owners.read().unwrap_or_else(PoisonError::into_inner);
        let of_range = || owners.ranges.get(owners.ranges.partition_point(|(last, _)| *last < slot));
        let owner = owners.moved.get(&slot).or_else(|| of_range().map(|(_, node)| node));
        owner.or_else(|| self.seeds.get(usize::from(slot) % self.seeds.len().max(1))).cloned()
    }

    /// All that have slots.
    pub(super) fn owners(&self) -> Vec<Node> {
        let owners = self.owners.read().unwrap_or_else(PoisonError::into_inner);
        let mut nodes: Vec<_> = owners.ranges.iter().map(|(_, node)| node.clone()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    pub(super) fn set_owners(&self, ranges: Ranges) {
        let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
        *owners = Owners { ranges, moved: HashMap::new() };
    }

    /// A node says that another one has the slot.
    pub(super) fn moved(&self, slot: u16, to: Node) {
        self.owners.write().unwrap_or_else(PoisonError::into_inner).moved.insert(slot, to);
    }

    /// What is known of a node.
    pub(super) fn presence(&self, node: &Node) -> Arc<Presence> {
        let mut presences = self.presences.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let address = if self.is_cluster() { node.to_string() } else { self.route.address().to_string() };
            Arc::new(Presence::new(address))
        };
        Arc::clone(presences.entry(node.clone()).or_insert_with(new))
    }

    /// Those of a cluster from which the last checks had no answer.
    pub(super) fn away(&self) -> Vec<Node> {
        let presences = self.presences.lock().unwrap_or_else(PoisonError::into_inner);
        let away = presences.iter().filter(|(_, presence)| presence.is_away() && self.is_cluster());
        away.map(|(node, _)| node.clone()).collect()
    }

    /// What the last check found.
    pub(super) fn note_strength(&self, node: Node, strength: Strength) {
        let mut strengths = self.strengths.lock().unwrap_or_else(PoisonError::into_inner);
        if strength.replicas > 0 {
            strengths.had_replicas = Some(Instant::now());
        }
        strengths.of_nodes.insert(node, strength);
    }

    /// Nothing if that is not known yet.
    pub(super) fn strength(&self, node: &Node) -> Option<Strength> {
        self.strengths.lock().unwrap_or_else(PoisonError::into_inner).of_nodes.get(node).copied()
    }

    /// Whether replicas were there of late.
    pub(super) fn had_replicas(&self) -> bool {
        let strengths = self.strengths.lock().unwrap_or_else(PoisonError::into_inner);
        strengths.had_replicas.is_some_and(|had| had.elapsed() < REPLICAS_RETURN)
    }

    /// The same of all that anybody has asked for. True if it is news of one.
    pub(super) fn set_all(&self, standing: &Standing) -> bool {
        let presences = self.presences.lock().unwrap_or_else(PoisonError::into_inner);
        presences.values().filter(|presence| presence.set(standing.clone())).count() > 0
    }

    /// All connections made so far are to be made anew.
    pub(super) fn begin_epoch(&self) {
        let presences = self.presences.lock().unwrap_or_else(PoisonError::into_inner);
        presences.values().for_each(|presence| presence.begin_epoch());
    }

    /// Drops what is known of nodes that have no slots any more.
    pub(super) fn forget_others(&self) {
        let owners = self.owners();
        let mut presences = self.presences.lock().unwrap_or_else(PoisonError::into_inner);
        presences.retain(|node, presence| owners.contains(node) || Arc::strong_count(presence) > 1);
        let mut strengths = self.strengths.lock().unwrap_or_else(PoisonError::into_inner);
        strengths.of_nodes.retain(|node, _| owners.contains(node));
    }
}
