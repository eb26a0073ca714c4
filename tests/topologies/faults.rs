//! What faults of sentinels and clusters cost, measured: a load through two servers is written down while one thing happens, and what
//! became of each task is counted. Each test prints its line of the table.
//!
//! A run in which the fault did not bite says nothing, and is made again.

use std::{fs, time::Duration};

use super::{FLAGS, load::Load, queues, soon};
use data_queue_proto::v1::Durability;

use crate::{
    histories::{load::NO_DEAD_LETTERS, random::Random},
    support::{
        PATIENCE,
        directory::Directory,
        doors::{Door, Doors},
        is_long, poll_until,
        redis::Redis,
        rounds,
        server::Server,
        topology::{Announced, Cluster, Sentinels},
        unique_queue, wire_tests,
    },
};

const RUNS: usize = 3;
/// The first one is cut off together with a master, where that is the fault.
const SERVERS: usize = 2;
const BOTH: &[usize] = &[0, 1];
const OUTSIDE: &[usize] = &[1];
const QUEUES: usize = 3;

/// Inserts and acks of each queue before the fault, in it once others are masters, and after it.
fn some() -> usize {
    rounds(150, 1_000)
}

/// All that a run takes.
struct Stage<T> {
    redis: T,
    doors: Doors,
    _open: Vec<Door>,
    _folder: Directory,
    servers: Vec<Server>,
    queues: Vec<String>,
}

/// What a fault came to.
struct Struck {
    at: Duration,
    /// Since then, as Redis says itself, there is a master again for all.
    ready: Duration,
    /// The servers that could reach it.
    reach: &'static [usize],
    /// Since then all can again, where that is later.
    whole: Option<Duration>,
    /// In which way it bit, and whether calls must have failed or been late; none if it did not bite.
    bit: Option<(String, bool)>,
}

/// What is known of a fault beforehand.
#[derive(Clone, Copy)]
struct Row {
    store: &'static str,
    fault: &'static str,
    durability: Durability,
    /// Others become masters, perhaps without the last that was answered OK.
    may_go_back: bool,
}

impl Row {
    const fn new(store: &'static str, fault: &'static str, may_go_back: bool) -> Self {
        Self { store, fault, durability: Durability::Accepted, may_go_back }
    }

    /// Runs it until it bites; with inserts that ask for replicas, and in the long run also with those that do not.
    async fn prove<T>(self, start: impl AsyncFn() -> Stage<T>, strike: impl AsyncFn(&mut Stage<T>, &Load) -> Struck) {
        for durability in rounds(&[Durability::Replicated][..], &[Durability::Replicated, Durability::Accepted]) {
            Self { durability: *durability, ..self }.prove_once(&start, &strike).await;
        }
    }

    async fn prove_once<T>(
        self,
        start: &impl AsyncFn() -> Stage<T>,
        strike: &impl AsyncFn(&mut Stage<T>, &Load) -> Struck,
    ) {
        for _ in 0..RUNS {
            if self.bites(start().await, strike).await {
                return;
            }
        }
        panic!("{}, {}: it did not bite in {RUNS} runs", self.store, self.fault);
    }

    async fn bites<T>(self, mut stage: Stage<T>, strike: &impl AsyncFn(&mut Stage<T>, &Load) -> Struck) -> bool {
        let mut random = Random::new(self.fault);
        let (load, hands) = Load::start(stage.queues.clone(), &stage.servers, self.durability, &mut random).await;
        load.goes_on(BOTH, some()).await;
        let struck = strike(&mut stage, &load).await;
        load.goes_on(BOTH, some()).await;
        let account = load.finish(hands, &stage.servers[1]).await;
        let back = load.back_after(struck.ready, struck.reach);
        let all_back = struck.whole.map(|whole| load.back_after(whole, BOTH));
        let (under_way, disturbed) = load.disturbed(struck.at, struck.ready + back);
        let bit = struck.bit.filter(|(_, must_disturb)| under_way > 0 && (disturbed > 0 || !must_disturb));
        let said = bit.as_ref().map_or("did not bite", |(how, _)| how);
        let all_said = all_back.map(|back| format!(", all {back:.1?} after it was healed")).unwrap_or_default();
        println!(
            "| {} | {} | {:?} | {said}; {disturbed} of {under_way} calls disturbed | {account} | \
             ready after {:.1?}, all queues served {back:.1?} later{all_said} | {:.1?} without an OK at most |",
            self.store,
            self.fault,
            self.durability,
            struck.ready - struck.at,
            load.longest_silence(),
        );
        let broken = account.violations(self.may_go_back);
        assert!(broken.is_empty(), "{}, {}: {broken:?}", self.store, self.fault);
        for back in [Some(back), all_back].into_iter().flatten() {
            assert!(back <= soon(), "{}, {}: not served for {back:?}", self.store, self.fault);
        }
        bit.is_some()
    }
}

fn process(redis: &Redis) -> u32 {
    redis.info("process_id").expect("a process").parse().expect("its number")
}

async fn doors(doors: &Doors, count: usize) -> Vec<Door> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(doors.door(0).await);
    }
    all
}

async fn servers(urls: [&str; SERVERS], flags: &[&str], doors: &Doors) -> Vec<Server> {
    let mut servers = Vec::new();
    for url in urls {
        let server = Server::launch(url, &[FLAGS, &NO_DEAD_LETTERS, flags].concat(), None);
        doors.know(server.pid());
        server.ready().await;
        servers.push(server);
    }
    servers
}

/// Three Redis and three sentinels, as they are.
async fn sentinels() -> Stage<Sentinels> {
    watched(Sentinels::start(), Doors::new(), Vec::new(), &[]).await
}

/// The same with a door in front of each, of the sentinels for the first server alone.
async fn sentinels_behind_doors() -> Stage<Sentinels> {
    let all = Doors::new();
    let mut open = doors(&all, 3).await;
    let announced: Vec<_> = open.iter().map(|door| Announced { port: door.port(), bus: 0 }).collect();
    let redis = Sentinels::behind(&announced, &mut |number, redis, _| open[number].open(redis.port(), process(redis)));
    let of_sentinels = doors(&all, 3).await;
    for (door, sentinel) in of_sentinels.iter().zip(redis.sentinels()) {
        door.open(sentinel.port(), process(sentinel));
    }
    let ports: Vec<_> = of_sentinels.iter().map(Door::port).collect();
    open.extend(of_sentinels);
    watched(redis, all, open, &ports).await
}

async fn watched(redis: Sentinels, doors: Doors, open: Vec<Door>, first: &[u16]) -> Stage<Sentinels> {
    let folder = Directory::default();
    let file = folder.join("password");
    fs::write(&file, Sentinels::SENTINEL_PASSWORD).expect("a file");
    redis.sentinels().iter().for_each(|sentinel| doors.know(process(sentinel)));
    let url = redis.url();
    let first = if first.is_empty() { url.clone() } else { redis.url_with(first) };
    let servers = servers([&first, &url], &["--sentinel-password-file", &file], &doors).await;
    let queues = (0..QUEUES).map(|_| unique_queue("watched")).collect();
    Stage { redis, doors, _open: open, _folder: folder, servers, queues }
}

/// Three masters with a replica each, and a queue on each.
async fn cluster() -> Stage<Cluster> {
    spread(Cluster::start(), Doors::new(), Vec::new()).await
}

/// The same with a door in front of each, and one of its bus.
async fn cluster_behind_doors() -> Stage<Cluster> {
    let all = Doors::new();
    let open = doors(&all, 12).await;
    let announced = open.as_chunks::<2>().0.iter().map(|[door, bus]| Announced { port: door.port(), bus: bus.port() });
    let redis = Cluster::behind(&announced.collect::<Vec<_>>(), &mut |number, redis, bus| {
        open[2 * number].open(redis.port(), process(redis));
        open[2 * number + 1].open(bus, process(redis));
    });
    spread(redis, all, open).await
}

async fn spread(redis: Cluster, doors: Doors, open: Vec<Door>) -> Stage<Cluster> {
    let url = redis.url();
    let servers = servers([&url, &url], &[], &doors).await;
    let queues = queues(&redis).into_iter().map(|(queue, _)| queue).collect();
    Stage { redis, doors, _open: open, _folder: Directory::default(), servers, queues }
}

impl Stage<Cluster> {
    /// The slots of the queues, that of a master first that is not asked about the others.
    fn slots(&self) -> Vec<u16> {
        let mut slots: Vec<_> = self.queues.iter().map(|queue| super::slot_of(&self.redis, queue)).collect();
        slots.sort_by_key(|slot| self.redis.is_first(self.redis.owner(*slot)));
        slots
    }

    /// The master of the first of them goes by `stop`, another one takes over, and it comes back by `heal`.
    async fn succeeded(&self, load: &Load, stop: impl FnOnce(&Redis), heal: impl FnOnce(&Redis)) -> Struck {
        let slot = self.slots()[0];
        let master = self.redis.owner(slot);
        let at = load.now();
        stop(master);
        self.redis.await_successor_of(master.port(), slot);
        let mut ready = load.now();
        if load.wants_replicas() {
            // The new master has none before the old one is that.
            heal(master);
            self.redis.await_whole();
            ready = load.now();
        } else {
            load.goes_on(BOTH, some()).await;
            heal(master);
            self.redis.await_whole();
        }
        let bit = (!self.redis.is_owner(master, slot)).then(|| ("another master has its slots".to_owned(), true));
        Struck { at, ready, reach: BOTH, whole: None, bit }
    }

    /// A slot goes to this node.
    fn moved(&self, load: &Load, slot: u16, to: u16) -> Struck {
        let (at, mut moments) = (load.now(), 0);
        self.redis.migrate(slot, to, || moments += 1);
        let has_moved = self.redis.owner(slot).port() == to;
        let bit = (moments > 3 && has_moved).then(|| (format!("the slot moved with {} keys", moments - 1), false));
        Struck { at, ready: load.now(), reach: BOTH, whole: None, bit }
    }
}

impl Stage<Sentinels> {
    async fn succeeded(&self, load: &Load, stop: impl FnOnce(&Redis), heal: impl FnOnce(&Redis)) -> Struck {
        let master = self.redis.master();
        let at = load.now();
        stop(master);
        self.redis.await_successor_of(master.port());
        let ready = load.now();
        load.goes_on(BOTH, some()).await;
        heal(master);
        self.redis.await_whole();
        let bit = (self.redis.master().port() != master.port()).then(|| ("another one is the master".to_owned(), true));
        Struck { at, ready, reach: BOTH, whole: None, bit }
    }
}

/// A replica goes, and comes back in the end. Without another one, inserts that ask for replicas do not go on before that.
async fn without(
    load: &Load,
    master: &Redis,
    replica: &Redis,
    goes_on_without: bool,
    await_whole: impl FnOnce(),
) -> Struck {
    let replicas = || master.info("connected_slaves");
    let before = replicas();
    let at = load.now();
    replica.kill();
    if goes_on_without {
        load.goes_on(BOTH, some()).await;
    } else {
        poll_until("the replica to be missed", PATIENCE, async || (replicas() < before).then_some(())).await;
    }
    let bit = (replicas() < before).then(|| ("the master has a replica less".to_owned(), false));
    replica.restart();
    await_whole();
    let ready = if goes_on_without { at } else { load.now() };
    Struck { at, ready, reach: BOTH, whole: None, bit }
}

/// A master and the first server are cut off from all others, until these have another master and go on.
async fn cut_off<T>(
    stage: &Stage<T>,
    load: &Load,
    master: &Redis,
    goes_on_without: bool,
    await_successor: impl FnOnce(),
    await_whole: impl FnOnce(),
) -> Struck {
    let at = load.now();
    stage.doors.cut_off(&[process(master), stage.servers[0].pid()]);
    await_successor();
    let ready = load.now();
    if goes_on_without {
        load.goes_on(OUTSIDE, some()).await;
    }
    let inside = load.taken(at, load.now(), 0);
    let thought_so = master.info("role").is_some_and(|role| role == "master");
    stage.doors.heal();
    await_whole();
    let whole = Some(load.now());
    load.goes_on(BOTH, some()).await;
    let is_demoted = master.info("role").is_some_and(|role| role == "slave");
    let held = stage.doors.held();
    let bit = (thought_so && is_demoted && held > 0 && inside > 0)
        .then(|| (format!("two masters, the old one took {inside} inserts and acks"), true));
    Struck { at, ready, reach: OUTSIDE, whole, bit }
}

wire_tests! {
    async fn sentinels_when_the_master_is_killed() {
        if is_long() {
            let row = Row::new("Sentinel", "master killed", true);
            row.prove(sentinels, async |stage, load| stage.succeeded(load, Redis::kill, Redis::restart).await).await;
        }
    }

    async fn sentinels_when_the_master_is_paused() {
        if is_long() {
            let row = Row::new("Sentinel", "master paused", true);
            row.prove(sentinels, async |stage, load| stage.succeeded(load, Redis::stop, Redis::cont).await).await;
        }
    }

    async fn sentinels_when_the_master_is_changed_by_hand() {
        if is_long() {
            let row = Row::new("Sentinel", "master failed over by hand", true);
            let strike = async |stage: &mut Stage<Sentinels>, load: &Load| {
                let before = stage.redis.master().port();
                let at = load.now();
                stage.redis.fail_over();
                let ready = load.now();
                stage.redis.await_whole();
                let bit = (stage.redis.master().port() != before).then(|| ("another one is the master".to_owned(), false));
                Struck { at, ready, reach: BOTH, whole: None, bit }
            };
            row.prove(sentinels, strike).await;
        }
    }

    async fn sentinels_when_a_replica_is_killed() {
        if is_long() {
            let row = Row::new("Sentinel", "replica killed", false);
            let strike = async |stage: &mut Stage<Sentinels>, load: &Load| {
                let redis = &stage.redis;
                without(load, redis.master(), redis.replicas()[0], true, || redis.await_whole()).await
            };
            row.prove(sentinels, strike).await;
        }
    }

    async fn sentinels_when_the_master_is_cut_off_with_its_clients() {
        let row = Row::new("Sentinel", "master cut off with its clients", true);
        let strike = async |stage: &mut Stage<Sentinels>, load: &Load| {
            let master = stage.redis.master();
            let successor = || stage.redis.await_successor_of(master.port());
            cut_off(stage, load, master, true, successor, || stage.redis.await_whole()).await
        };
        row.prove(sentinels_behind_doors, strike).await;
    }

    async fn a_cluster_when_a_master_is_killed() {
        let row = Row::new("Cluster", "master killed", true);
        row.prove(cluster, async |stage, load| stage.succeeded(load, Redis::kill, Redis::restart).await).await;
    }

    async fn a_cluster_when_a_master_is_paused() {
        if is_long() {
            let row = Row::new("Cluster", "master paused", true);
            row.prove(cluster, async |stage, load| stage.succeeded(load, Redis::stop, Redis::cont).await).await;
        }
    }

    async fn a_cluster_when_a_master_is_changed_by_hand() {
        if is_long() {
            let row = Row::new("Cluster", "master failed over by hand", false);
            let strike = async |stage: &mut Stage<Cluster>, load: &Load| {
                let slot = stage.slots()[0];
                let master = stage.redis.owner(slot);
                let at = load.now();
                stage.redis.fail_over(master, slot);
                let ready = load.now();
                stage.redis.await_whole();
                let bit = (!stage.redis.is_owner(master, slot)).then(|| ("another master has its slots".to_owned(), false));
                Struck { at, ready, reach: BOTH, whole: None, bit }
            };
            row.prove(cluster, strike).await;
        }
    }

    async fn a_cluster_when_a_slot_is_migrated() {
        if is_long() {
            let row = Row::new("Cluster", "slot migrated", false);
            let strike = async |stage: &mut Stage<Cluster>, load: &Load| {
                let slots = stage.slots();
                stage.moved(load, slots[0], stage.redis.owner(slots[1]).port())
            };
            row.prove(cluster, strike).await;
        }
    }

    async fn a_cluster_when_a_node_is_added() {
        if is_long() {
            let row = Row::new("Cluster", "node added", false);
            let strike = async |stage: &mut Stage<Cluster>, load: &Load| {
                let at = load.now();
                let new = stage.redis.add_node();
                Struck { at, ..stage.moved(load, stage.slots()[0], new) }
            };
            // A new node has no replica to ask for.
            row.prove_once(&cluster, &strike).await;
        }
    }

    async fn a_cluster_when_a_replica_is_killed() {
        if is_long() {
            let row = Row::new("Cluster", "replica killed", false);
            let strike = async |stage: &mut Stage<Cluster>, load: &Load| {
                let redis = &stage.redis;
                let master = redis.owner(stage.slots()[0]);
                without(load, master, redis.replica_of(master), !load.wants_replicas(), || redis.await_whole()).await
            };
            row.prove(cluster, strike).await;
        }
    }

    async fn a_cluster_when_a_master_is_cut_off_with_its_clients() {
        if is_long() {
            let row = Row::new("Cluster", "master cut off with its clients", true);
            let strike = async |stage: &mut Stage<Cluster>, load: &Load| {
                let slot = stage.slots()[0];
                let master = stage.redis.owner(slot);
                let successor = || stage.redis.await_successor_of(master.port(), slot);
                let goes_on = !load.wants_replicas();
                cut_off(stage, load, master, goes_on, successor, || stage.redis.await_whole()).await
            };
            row.prove(cluster_behind_doors, strike).await;
        }
    }
}
