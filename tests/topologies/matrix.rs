//! Faults of Redis under load, and what became of every task: with what was answered OK by the master alone, and with what was
//! answered as replicated.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_proto::v1::{Durability, InsertRequest, Outcome, PopRequest};
use tokio::{task::JoinSet, time::sleep};

use super::{FLAGS, queues, slot_of, soon, with_shards};
use crate::support::{
    PATIENCE,
    call::{ack_request, get_queue_request, insert_request, json, outcomes, pop_request, proto, text},
    directory::Directory,
    poll_until,
    redis::Redis,
    rounds,
    server::{Client, Server},
    topology::{Cluster, Sentinels},
    unique_queue, wire_tests,
};

const PRODUCERS: usize = 2;
const WORKERS: usize = 2;
const LEASE: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_millis(200);
/// A call that takes longer is made again.
const CALL: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(20);
/// How many tasks go through before a fault, and after it.
const AROUND: usize = 200;

/// A delivery, and when its ack was answered, if it was with APPLIED.
struct Delivery {
    token: String,
    id: String,
    value: String,
    at: Instant,
    acked: Option<Instant>,
}

/// All that was sent and answered.
#[derive(Default)]
struct History {
    name: String,
    /// Value to id and what was reached, of inserts that were answered OK.
    inserted: Mutex<BTreeMap<String, (String, Durability)>>,
    sent: Mutex<BTreeSet<String>>,
    deliveries: Mutex<Vec<Delivery>>,
    failures: AtomicUsize,
    is_over: AtomicBool,
    /// By queue: the last insert that was answered OK, and the longest time between two.
    pauses: Mutex<BTreeMap<String, (Instant, Duration)>>,
}

/// What became of it.
#[derive(Debug, Default)]
struct Account {
    fault: String,
    wanted: &'static str,
    inserted: usize,
    replicated: usize,
    failed_calls: usize,
    /// Never delivered, of those that were answered as replicated and of the others.
    lost_replicated: usize,
    lost: usize,
    /// Delivered after an ack was answered.
    came_back: usize,
    /// Values that are in under two ids.
    doubled: usize,
    /// Tokens of two deliveries.
    repeated: usize,
    /// Values that nobody sent.
    unsent: usize,
    pause: Duration,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {} | {} | {} OK, {} of them replicated | {} | lost: {} replicated, {} others | came back after their ack: {} | \
             doubled: {} | tokens repeated: {} | {:.1?} |",
            self.fault,
            self.wanted,
            self.inserted,
            self.replicated,
            self.failed_calls,
            self.lost_replicated,
            self.lost,
            self.came_back,
            self.doubled,
            self.repeated,
            self.pause
        )
    }
}

impl History {
    fn answered(&self) -> usize {
        self.inserted.lock().unwrap().len()
    }

    /// Waits until so many more inserts were answered.
    async fn more(&self, count: usize) {
        let wanted = self.answered() + count;
        poll_until("the load to go on", PATIENCE, async || (self.answered() >= wanted).then_some(())).await;
    }

    fn note_answer(&self, queue: &str) {
        let mut pauses = self.pauses.lock().unwrap();
        let now = Instant::now();
        let (last, longest) = pauses.entry(queue.to_owned()).or_insert((now, Duration::ZERO));
        *longest = (*longest).max(now - *last);
        *last = now;
    }

    fn account(&self, fault: &str, wanted: &'static str) -> Account {
        let (inserted, sent) = (self.inserted.lock().unwrap(), self.sent.lock().unwrap());
        let deliveries = self.deliveries.lock().unwrap();
        let delivered: BTreeSet<&str> = deliveries.iter().map(|delivery| delivery.id.as_str()).collect();
        let tokens: BTreeSet<&str> = deliveries.iter().map(|delivery| delivery.token.as_str()).collect();
        let mut ids: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let mut acked: BTreeMap<&str, Instant> = BTreeMap::new();
        for delivery in deliveries.iter() {
            ids.entry(&delivery.value).or_default().insert(&delivery.id);
            if let Some(at) = delivery.acked {
                acked.entry(&delivery.id).or_insert(at);
            }
        }
        let is_back = |one: &&Delivery| acked.get(one.id.as_str()).is_some_and(|acked| one.at > *acked);
        let lost = |is_replicated: bool| {
            let of_class =
                inserted.values().filter(|(_, reached)| (*reached == Durability::Replicated) == is_replicated);
            of_class.filter(|(id, _)| !delivered.contains(id.as_str())).count()
        };
        Account {
            fault: fault.to_owned(),
            wanted,
            inserted: inserted.len(),
            replicated: inserted.values().filter(|(_, reached)| *reached == Durability::Replicated).count(),
            failed_calls: self.failures.load(Ordering::Relaxed),
            lost_replicated: lost(true),
            lost: lost(false),
            came_back: deliveries.iter().filter(is_back).count(),
            doubled: ids.values().filter(|ids| ids.len() > 1).count(),
            repeated: deliveries.len() - tokens.len(),
            unsent: ids.keys().filter(|value| !sent.contains(**value)).count(),
            pause: self.pauses.lock().unwrap().values().map(|(_, longest)| *longest).max().unwrap_or_default(),
        }
    }
}

async fn produce(history: Arc<History>, mut client: Client, queue: String, producer: usize, durability: Durability) {
    for number in 0.. {
        if history.is_over.load(Ordering::Relaxed) {
            return;
        }
        // Unlike that of any other load, since request ids are remembered.
        let value = format!("\"{} {queue} {producer} {number}\"", history.name);
        history.sent.lock().unwrap().insert(value.clone());
        let request = InsertRequest {
            request_id: value.clone(),
            durability: durability.into(),
            ..insert_request(&queue, vec![json(&value)])
        };
        // The same request until it is answered, also when the load is over: the fault is by then.
        let answer = loop {
            let mut call = tonic::Request::new(request.clone());
            call.set_timeout(CALL);
            match client.insert(call).await {
                Ok(answer) => break answer.into_inner(),
                Err(_) => history.failures.fetch_add(1, Ordering::Relaxed),
            };
            sleep(RETRY).await;
        };
        history.note_answer(&queue);
        let reached = answer.durability();
        history.inserted.lock().unwrap().insert(value, (answer.results[0].id.clone(), reached));
    }
}

/// Until all is over and the queue is empty.
async fn work(history: Arc<History>, mut client: Client, queue: String) {
    loop {
        let is_over = history.is_over.load(Ordering::Relaxed);
        let pop = PopRequest { lease: Some(proto(LEASE)), wait: Some(proto(WAIT)), ..pop_request(&queue) };
        let mut call = tonic::Request::new(pop);
        call.set_timeout(CALL);
        let Ok(answer) = client.pop(call).await else {
            history.failures.fetch_add(1, Ordering::Relaxed);
            sleep(RETRY).await;
            continue;
        };
        let Some(task) = answer.into_inner().task else {
            if is_over
                && let Ok(answer) = client.admin.get_queue(get_queue_request(&queue)).await
                && let Some(left) = answer.into_inner().queue.and_then(|queue| queue.counts)
                && left.ready + left.leased + left.scheduled == 0
            {
                return;
            }
            continue;
        };
        let at = Instant::now();
        let mut ack = tonic::Request::new(ack_request(&queue, std::slice::from_ref(&task.lease_token)));
        ack.set_timeout(CALL);
        let is_acked = match client.ack(ack).await {
            Ok(answer) => outcomes(&answer.into_inner().outcomes) == [Outcome::Applied],
            Err(_) => {
                history.failures.fetch_add(1, Ordering::Relaxed);
                false
            }
        };
        let (value, acked) = (text(&task).to_owned(), is_acked.then(Instant::now));
        let delivery = Delivery { token: task.lease_token, id: task.id, value, at, acked };
        history.deliveries.lock().unwrap().push(delivery);
    }
}

/// Runs load through these queues while a fault happens, which is over when its future is, and says what became of all tasks.
async fn under_load(
    servers: &[&Server],
    queues: &[String],
    durability: Durability,
    fault: &str,
    happens: impl AsyncFnOnce(&History),
) -> Account {
    let history = Arc::new(History { name: unique_queue("load"), ..History::default() });
    let mut hands = JoinSet::new();
    for (at, queue) in queues.iter().enumerate() {
        for hand in 0..PRODUCERS {
            let client = servers[(at + hand) % servers.len()].client().await;
            hands.spawn(produce(Arc::clone(&history), client, queue.clone(), hand, durability));
        }
        for hand in 0..WORKERS {
            let client = servers[(at + hand) % servers.len()].client().await;
            hands.spawn(work(Arc::clone(&history), client, queue.clone()));
        }
    }
    history.more(AROUND).await;
    happens(&history).await;
    history.more(AROUND).await;
    history.is_over.store(true, Ordering::Relaxed);
    let end = async {
        while let Some(hand) = hands.join_next().await {
            hand.expect("a producer or worker");
        }
    };
    tokio::time::timeout(PATIENCE, end).await.expect("all queues to be empty");
    let wanted = if durability == Durability::Replicated { "REPLICATED" } else { "ACCEPTED" };
    let account = history.account(fault, wanted);
    println!("{account}");
    assert_eq!((account.repeated, account.unsent), (0, 0), "{account}");
    assert_eq!(account.lost_replicated, 0, "{account}");
    account
}

/// Where no write was taken back, nothing is lost, and no ack either.
fn lost_nothing(account: &Account) {
    assert_eq!((account.lost, account.came_back, account.doubled), (0, 0, 0), "{account}");
}

/// Waits until a queue takes tasks again.
async fn serves(server: &Server, queue: &str) {
    let start = Instant::now();
    let mut client = server.client().await;
    poll_until("service after the failover", soon(), async || {
        let mut pop = tonic::Request::new(pop_request(queue));
        pop.set_timeout(Duration::from_secs(1));
        client.pop(pop).await.ok()
    })
    .await;
    println!("{queue}: served {:.1?} after another one was master", start.elapsed());
}

const BOTH: [Durability; 2] = [Durability::Accepted, Durability::Replicated];

/// What is done to a master, and whether it is a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    Kill,
    Pause,
    ByHand,
    CutOff,
    KillReplica,
}

async fn with_sentinels(blows: &[Blow]) {
    for durability in BOTH {
        let redis = Sentinels::start();
        let folder = Directory::default();
        let file = folder.join("password");
        std::fs::write(&file, Sentinels::SENTINEL_PASSWORD).unwrap();
        let server = Server::launch(&redis.url(), &[FLAGS, &["--sentinel-password-file", &file]].concat(), None);
        server.ready().await;
        for blow in blows {
            let queue = format!("{blow:?}-{durability:?}");
            poll_until("a master with replicas", PATIENCE, async || {
                let request = InsertRequest {
                    durability: Durability::Replicated.into(),
                    ..insert_request("warm", vec![json("1")])
                };
                let answer = server.client().await.insert(request).await.ok()?.into_inner();
                (answer.durability() == Durability::Replicated).then_some(())
            })
            .await;
            let fault = format!("Sentinel: {blow:?}");
            let account = under_load(&[&server], std::slice::from_ref(&queue), durability, &fault, async |history| {
                sentinels_suffer(&redis, &server, &queue, *blow, history, durability).await;
            })
            .await;
            if *blow == Blow::KillReplica {
                lost_nothing(&account);
            } else {
                assert!(account.failed_calls > 0 || account.lost + account.came_back > 0, "it did not bite: {account}");
            }
        }
    }
}

async fn sentinels_suffer(
    redis: &Sentinels,
    server: &Server,
    queue: &str,
    blow: Blow,
    history: &History,
    durability: Durability,
) {
    let master = redis.master();
    let port = master.port();
    match blow {
        Blow::Kill => master.kill(),
        Blow::Pause => master.stop(),
        Blow::ByHand => redis.fail_over(),
        Blow::CutOff => {
            redis.cut_off(master);
            if durability == Durability::Accepted {
                // It does not know that it is cut off, and answers.
                history.more(AROUND).await;
            }
        }
        Blow::KillReplica => {
            let replica = redis.replicas()[0];
            replica.kill();
            history.more(AROUND).await;
            replica.restart();
            return;
        }
    }
    redis.await_successor_of(port);
    match blow {
        Blow::Kill => master.restart(),
        Blow::Pause => master.cont(),
        Blow::CutOff => redis.mend(master),
        Blow::ByHand | Blow::KillReplica => {}
    }
    serves(server, queue).await;
}

async fn on_a_cluster(blows: &[Blow]) {
    for durability in BOTH {
        let cluster = Cluster::start();
        let server = Server::launch(&cluster.url(), FLAGS, None);
        server.ready().await;
        for (round, blow) in blows.iter().enumerate() {
            let mut names: Vec<String> = queues(&cluster).into_iter().map(|(name, _)| name).collect();
            let spread = format!("spread-{round}");
            server.client().await.admin.update_queue(with_shards(&spread, 8)).await.unwrap();
            names.push(spread);
            for queue in &names {
                poll_until("masters with replicas", PATIENCE, async || {
                    let request = InsertRequest {
                        durability: Durability::Replicated.into(),
                        ..insert_request(queue, vec![json("\"warm\"")])
                    };
                    let mut client = server.client().await;
                    let answer = client.insert(request).await.ok()?.into_inner();
                    let task = client.pop(pop_request(queue)).await.ok()?.into_inner().task?;
                    client.ack(ack_request(queue, &[task.lease_token])).await.ok()?;
                    (answer.durability() == Durability::Replicated).then_some(())
                })
                .await;
            }
            let fault = format!("Cluster: {blow:?}");
            let account = under_load(&[&server], &names, durability, &fault, async |history| {
                cluster_suffers(&cluster, &server, &names[0], *blow, history).await;
            })
            .await;
            match blow {
                Blow::KillReplica | Blow::ByHand => lost_nothing(&account),
                Blow::Kill | Blow::Pause | Blow::CutOff => {
                    assert!(account.failed_calls > 0, "it did not bite: {account}");
                }
            }
        }
    }
}

async fn cluster_suffers(cluster: &Cluster, server: &Server, queue: &str, blow: Blow, history: &History) {
    let slot = slot_of(cluster, queue);
    let master: &Redis = cluster.owner(slot);
    let port = master.port();
    match blow {
        Blow::Kill => master.kill(),
        Blow::Pause => master.stop(),
        Blow::ByHand => cluster.fail_over(master, slot),
        Blow::KillReplica => {
            let replica = cluster.replica_of(master);
            replica.kill();
            history.more(AROUND).await;
            replica.restart();
        }
        Blow::CutOff => unreachable!("with sentinels only"),
    }
    if matches!(blow, Blow::Kill | Blow::Pause) {
        poll_until("another master", PATIENCE, async || {
            cluster.masters().iter().any(|node| node.port() != port && cluster.is_owner(node, slot)).then_some(())
        })
        .await;
        if blow == Blow::Kill { master.restart() } else { master.cont() }
    }
    serves(server, queue).await;
    cluster.await_whole();
}

async fn slots_move() {
    for durability in BOTH {
        let mut cluster = Cluster::start();
        let server = Server::launch(&cluster.url(), FLAGS, None);
        server.ready().await;
        let new = cluster.add_node();
        let names: Vec<String> = queues(&cluster).into_iter().map(|(name, _)| name).collect();
        let account =
            under_load(&[&server], &names, durability, "Cluster: a slot to a new node and back", async |history| {
                let slot = slot_of(&cluster, &names[0]);
                let before = cluster.owner(slot).port();
                let mut moments = 0;
                cluster.migrate(slot, new, || moments += 1);
                assert!(moments > 3 && cluster.owner(slot).port() == new, "the slot had keys, and moved");
                history.more(AROUND).await;
                cluster.migrate(slot, before, || {});
            })
            .await;
        lost_nothing(&account);
    }
}

wire_tests! {
    /// G1, G4: a master that is cut off from its replicas and sentinels, not from its clients; in the long run one that is killed,
    /// stopped, and replaced by hand, and a replica that is killed.
    async fn masters_of_sentinels_fail_under_load() {
        let all = [Blow::Kill, Blow::Pause, Blow::ByHand, Blow::KillReplica, Blow::CutOff];
        with_sentinels(rounds(&all[4..], &all)).await;
    }

    /// G1, G4: a master that is killed; in the long run one that is stopped, and replaced by hand, and a replica that is killed. One queue is
    /// on all masters.
    async fn masters_of_a_cluster_fail_under_load() {
        let all = [Blow::Kill, Blow::Pause, Blow::ByHand, Blow::KillReplica];
        on_a_cluster(rounds(&all[..1], &all)).await;
    }

    /// G1, G4: in the long run only; `topologies::a_cluster_changes_under_load` has its short form.
    async fn slots_move_under_load() {
        if rounds(false, true) {
            slots_move().await;
        }
    }
}
