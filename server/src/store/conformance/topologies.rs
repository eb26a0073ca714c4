//! More than one Redis, or one that is not spoken with as it is: what takes long to start, and is shared by cases in turn.

use std::{
    any::Any,
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Rig,
    engines::{OnRedis, TIMEOUT},
    support::{
        directory::Directory,
        redis::{Options, Redis, Reply},
        topology::{Sentinels, Tls},
    },
};
use crate::store::{Rules, redis::Access};

/// One that runs.
struct Topology {
    name: &'static str,
    /// Who has the data.
    redis: Arc<Redis>,
    url: String,
    access: Access,
    _rest: Box<dyn Any + Send>,
}

static RUNNING: Mutex<Vec<Topology>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Topology>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends it with the test.
pub(super) struct Started(&'static str);

impl Drop for Started {
    fn drop(&mut self) {
        running().retain(|topology| topology.name != self.0);
    }
}

/// By the name of the function that opens a store there.
pub(super) fn start(name: &'static str) -> Started {
    let topology = match name {
        "cluster" => start_cluster(),
        "sentinels" => start_sentinels(),
        "tls" => start_tls(),
        _ => panic!("no topology: {name}"),
    };
    running().push(topology);
    Started(name)
}

/// One node has all slots: what is not in one slot is refused all the same.
fn start_cluster() -> Topology {
    let own = ["--cluster-enabled", "yes", "--cluster-node-timeout", "500"].map(str::to_owned).to_vec();
    let node = Redis::with(Options { extra: own, ..Options::default() });
    for first in (0..16_384).step_by(1_024) {
        let slots: Vec<String> = (first..first + 1_024).map(|slot| slot.to_string()).collect();
        let words: Vec<&str> = ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
        node.command(&words);
    }
    let start = Instant::now();
    while !matches!(node.command(&["CLUSTER", "INFO"]), Reply::Bytes(info) if info.starts_with(b"cluster_state:ok")) {
        assert!(start.elapsed() < TIMEOUT, "the cluster is not ready");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let url = node.url().replace("redis://", "redis+cluster://");
    Topology { name: "cluster", redis: Arc::new(node), url, access: Access::default(), _rest: Box::new(()) }
}

/// A master with two replicas, and three sentinels who say where it is.
fn start_sentinels() -> Topology {
    let sentinels = Sentinels::start();
    // However busy this machine is.
    for sentinel in sentinels.sentinels() {
        sentinel.command(&["SENTINEL", "SET", Sentinels::MASTER, "down-after-milliseconds", "600000"]);
    }
    let folder = Directory::default();
    let file = folder.path().join("password");
    fs::write(&file, Sentinels::SENTINEL_PASSWORD).expect("a file");
    let access = Access { sentinel_password_file: Some(file), ..Access::default() };
    let (redis, url) = (Arc::clone(sentinels.master()), sentinels.url());
    Topology { name: "sentinels", redis, url, access, _rest: Box::new((sentinels, folder)) }
}

/// One that wants certificates.
fn start_tls() -> Topology {
    let tls = Tls::start();
    let file = |name: &str| tls.file(name).into();
    let certificate = Some((file("client.crt"), file("client.key")));
    let access = Access { ca: Some(file("ca.crt")), certificate, ..Access::default() };
    Topology { name: "tls", redis: Arc::clone(tls.redis()), url: tls.url(), access, _rest: Box::new(tls) }
}

/// How stores find this Redis.
pub(super) fn address_of(redis: &Redis) -> (String, Access) {
    let running = running();
    let here = running.iter().find(|topology| topology.redis.port() == redis.port());
    here.map_or_else(|| (redis.url(), Access::default()), |topology| (topology.url.clone(), topology.access.clone()))
}

/// A store on what runs, emptied.
fn open(name: &str, rules: Rules) -> Rig {
    let redis = running().iter().find(|topology| topology.name == name).map(|topology| Arc::clone(&topology.redis));
    let redis = redis.expect("it was started");
    redis.config_set("maxmemory", "0");
    redis.flush();
    Rig::new(OnRedis::connect(&redis, rules))
}

pub(super) fn cluster(rules: Rules) -> Rig {
    open("cluster", rules)
}

pub(super) fn sentinels(rules: Rules) -> Rig {
    open("sentinels", rules)
}

pub(super) fn tls(rules: Rules) -> Rig {
    open("tls", rules)
}
