//! Redis with sentinels, as a cluster, behind TLS, and with logins: whatever becomes of its servers, the server goes on by itself.

mod account;
mod faults;
mod load;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use data_queue_proto::{
    reason,
    v1::{NewTask, PopRequest, QueueSettings, Task, UpdateQueueRequest},
};
use prost_types::FieldMask;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    faults::load::survive_in,
    support::{
        PATIENCE,
        call::{
            ack, ack_request, counts, get_queue_request, insert_json, insert_request, json, pop_request, proto, text,
        },
        directory::Directory,
        poll_until,
        redis::{Options, Persistence, Redis},
        rounds,
        server::{Client, Server, run_to_end},
        status::{Details, Refusal},
        topology::{Cluster, Sentinels, Tls},
        unique_queue, wire_tests,
    },
};

const FLAGS: &[&str] = &["--store-timeout", "2s"];

/// After others are masters, calls are answered within this. On a busy machine it may take longer.
fn soon() -> Duration {
    rounds(Duration::from_secs(20), Duration::from_secs(5))
}

fn tasks() -> usize {
    rounds(2_000, 40_000)
}

async fn on(store: &str, flags: &[&str]) -> Server {
    let server = Server::launch(store, &[FLAGS, flags].concat(), None);
    server.ready().await;
    server
}

/// What a life is: it is inserted, delivered and acked, once what went before is noticed.
async fn serves(server: &Server) {
    let (mut client, queue) = (server.client().await, unique_queue("served"));
    poll_until("an insert", PATIENCE, async || client.insert(insert_request(&queue, vec![json("1")])).await.ok()).await;
    let task = popped(server, &queue).await;
    ack(&mut client, &queue, &task.lease_token).await;
}

async fn popped(server: &Server, queue: &str) -> Task {
    let mut client = server.client().await;
    poll_until("a pop", PATIENCE, async || client.pop(pop_request(queue)).await.ok()?.into_inner().task).await
}

/// Waits until this queue takes a task again, and says for how long it did not, once others were masters.
async fn serves_again(server: &Server, queue: &str) {
    let mut client = server.client().await;
    let start = Instant::now();
    poll_until("an insert after the failover", soon(), async || {
        let mut insert = tonic::Request::new(insert_request(queue, vec![json("1")]));
        insert.set_timeout(Duration::from_secs(1));
        client.insert(insert).await.ok()
    })
    .await;
    println!("{queue}: served again {:?} after others were masters", start.elapsed());
}

/// The slot of a queue, by how its keys begin.
fn slot_of(cluster: &Cluster, queue: &str) -> u16 {
    cluster.slot_of(&format!("{{{}.0}}", URL_SAFE_NO_PAD.encode(queue)))
}

/// A queue for each master of the cluster, and its slot.
fn queues(cluster: &Cluster) -> Vec<(String, u16)> {
    let mut queues = Vec::new();
    for master in cluster.masters() {
        let named = (0..).map(|number| {
            let name = format!("queue-{number}");
            let slot = slot_of(cluster, &name);
            (name, slot)
        });
        let mut of_master = named.filter(|(_, slot)| cluster.owner(*slot).port() == master.port());
        queues.push(of_master.next().expect("a queue"));
    }
    queues
}

fn with_shards(queue: &str, shards: u32) -> UpdateQueueRequest {
    UpdateQueueRequest {
        queue: queue.to_owned(),
        settings: Some(QueueSettings { shards: Some(shards), ..QueueSettings::default() }),
        update_mask: Some(FieldMask { paths: vec!["shards".to_owned()] }),
    }
}

async fn spread(client: &mut Client, queue: &str, shards: u32) {
    client.admin.update_queue(with_shards(queue, shards)).await.unwrap();
}

async fn changes_under_load(shards: u32) {
    let mut cluster = Cluster::start();
    let (server, another) = (on(&cluster.url(), &[]).await, on(&cluster.url(), &[]).await);
    let new = cluster.add_node();
    let queue = unique_queue("load");
    spread(&mut server.client().await, &queue, shards).await;
    survive_in(queue, &[&server, &another], tasks(), async |ledger| {
        let slot = slot_of(&cluster, ledger.queue());
        ledger.reached(10).await;
        let before = cluster.owner(slot).port();
        let mut moments = 0;
        cluster.migrate(slot, new, || moments += 1);
        assert!(moments > 3 && cluster.owner(slot).port() == new, "the slot had keys, and moved");
        ledger.reached(30).await;
        cluster.migrate(slot, before, || {});
        ledger.reached(50).await;
        cluster.fail_over(cluster.owner(slot), slot);
        ledger.reached(70).await;
        let master = cluster.owner(slot);
        cluster.replica_of(master).kill();
        ledger.reached(90).await;
    })
    .await;
}

wire_tests! {
    /// The sentinels choose another master when it is killed or stands still, and when they are told to; each time the server follows.
    async fn sentinels_tell_the_server_where_the_master_is() {
        let redis = Sentinels::start();
        let folder = Directory::default();
        let file = folder.join("password");
        fs::write(&file, format!("{}\n", Sentinels::SENTINEL_PASSWORD)).unwrap();
        let server = on(&redis.url(), &["--sentinel-password-file", &file]).await;
        serves(&server).await;

        let master = redis.master();
        master.kill();
        redis.await_successor_of(master.port());
        serves_again(&server, "after-a-kill").await;
        master.restart();
        serves(&server).await;

        let master = redis.master();
        master.stop();
        redis.await_successor_of(master.port());
        serves_again(&server, "after-a-pause").await;
        // It still thinks that it is the master, for a moment.
        master.cont();
        serves(&server).await;

        redis.fail_over();
        serves_again(&server, "after-a-failover").await;
        serves(&server).await;
        redis.replicas()[0].kill();
        serves(&server).await;
        server.ready().await;
    }

    /// What no fault explains is told: a sentinel that does not know the name, and a wrong password.
    async fn sentinels_that_cannot_tell_are_named() {
        let redis = Sentinels::start();
        let folder = Directory::default();
        let file = folder.join("password");
        let away = async |store: &str, why: &str| {
            let server = Server::launch(store, &[FLAGS, &["--sentinel-password-file", &file]].concat(), None);
            poll_until(why, PATIENCE, async || server.log().contains(why).then_some(())).await;
            assert_eq!(server.health("").await, ServingStatus::NotServing);
            assert!(!server.log().contains(Sentinels::PASSWORD) && !server.log().contains("of-nobody"), "{}", server.log());
            server
        };
        fs::write(&file, "of-nobody").unwrap();
        let server = away(&redis.url(), "cannot connect to Redis").await;
        // A password that is put right is read.
        fs::write(&file, Sentinels::SENTINEL_PASSWORD).unwrap();
        server.ready().await;
        away(&redis.url().replace(Sentinels::MASTER, "another"), "cannot connect to Redis").await;
    }

    /// G1, G3, G7: slots move, a node is added, masters change by hand and a replica is killed while tasks go through; nothing is lost.
    async fn a_cluster_changes_under_load() {
        changes_under_load(1).await;
    }

    /// The same where the queue is on all masters, and one of its shards moves; two servers serve it.
    async fn a_cluster_changes_under_a_queue_with_shards() {
        changes_under_load(8).await;
    }

    /// It is on all masters; while one of them is away tasks go in and out on the others, and in the end nothing is lost but what that one
    /// had not told its replica.
    async fn a_queue_with_shards_goes_on_while_a_master_is_away() {
        let cluster = Cluster::start();
        let (one, other) = (on(&cluster.url(), &[]).await, on(&cluster.url(), &[]).await);
        let queue = unique_queue("spread");
        let mut client = one.client().await;
        spread(&mut client, &queue, 8).await;
        for value in 0..64 {
            insert_json(&mut client, &queue, &[&value.to_string()]).await;
        }
        // Nobody told the other one.
        assert_eq!(counts(&mut other.client().await, &queue).await.ready, 64);
        let slot = slot_of(&cluster, &queue);
        let master = cluster.owner(slot);
        // Nobody takes its place until the others were seen to go on without it.
        let replica = cluster.replica_of(master);
        replica.config_set("cluster-replica-no-failover", "yes");
        replica.config_set("cluster-replica-validity-factor", "0");
        master.stop();
        // Once it is known to be away no call runs into it.
        let mut in_a_row = 0;
        poll_until("calls to go past the one that is away", PATIENCE, async || {
            let mut client = other.client().await;
            let mut insert = tonic::Request::new(insert_request(&queue, vec![json("65")]));
            insert.set_timeout(Duration::from_secs(1));
            let is_inserted = client.insert(insert).await.is_ok();
            let popped = client.pop(pop_request(&queue)).await.ok().and_then(|answer| answer.into_inner().task);
            let is_acked = match popped {
                Some(task) => client.ack(ack_request(&queue, &[task.lease_token])).await.is_ok(),
                None => false,
            };
            in_a_row = if is_inserted && is_acked { in_a_row + 1 } else { 0 };
            (in_a_row == 20).then_some(())
        })
        .await;
        replica.config_set("cluster-replica-no-failover", "no");
        cluster.await_successor_of(master.port(), slot);
        serves_again(&one, &queue).await;
        master.cont();
        cluster.await_whole();
        poll_until("all of it", PATIENCE, async || {
            let mut client = one.client().await;
            let all = client.admin.get_queue(get_queue_request(&queue)).await.ok()?.into_inner().queue?.counts?;
            (all.inserted == all.ready + all.leased + all.acked).then_some(())
        })
        .await;
    }

    /// The unique keys of an insert may not belong together, and nothing is done then. A pop that waits gets what goes into any shard on
    /// another server.
    async fn a_queue_with_shards_is_one_queue() {
        let redis = Redis::start();
        let (one, other) = (on(&redis.url(), &[]).await, on(&redis.url(), &[]).await);
        let queue = unique_queue("spread");
        let mut client = one.client().await;
        spread(&mut client, &queue, 16).await;
        let apart = (0..64).map(|key| NewTask { unique_key: format!("k{key}"), ..json("1") }).collect();
        let refused = client.insert(insert_request(&queue, apart)).await;
        Refusal::invalid(reason::UNIQUE_KEYS_APART, "tasks").check("keys of different shards", refused);
        assert_eq!(counts(&mut client, &queue).await.inserted, 0);
        for value in 0..20 {
            let mut waiter = other.client().await;
            let (queue, value) = (&queue, value.to_string());
            let wait = PopRequest { wait: Some(proto(PATIENCE)), ..pop_request(queue) };
            let waiting = async { waiter.pop(wait).await.unwrap().into_inner().task.expect("a task") };
            let (task, ()) = tokio::join!(waiting, async { insert_json(&mut client, queue, &[&value]).await; });
            assert_eq!(text(&task), value);
            ack(&mut client, queue, &task.lease_token).await;
        }
        insert_json(&mut client, &queue, &["1"]).await;
        let refused = client.admin.update_queue(with_shards(&queue, 2)).await;
        Refusal::of(Code::FailedPrecondition, reason::QUEUE_NOT_EMPTY).check("a queue with a task", refused);
    }

    /// A master is killed, another one stands still: its replica takes over and the server follows; queues of other masters go on meanwhile.
    async fn a_master_of_a_cluster_goes_and_others_do_not_wait_for_it() {
        let cluster = Cluster::start();
        let server = on(&cluster.url(), &[]).await;
        for stands_still in [false, true] {
            let queues = queues(&cluster);
            let (lost, others) = queues.split_first().unwrap();
            for (queue, _) in &queues {
                let mut client = server.client().await;
                poll_until("an insert", PATIENCE, async || client.insert(insert_request(queue, vec![json("1")])).await.ok()).await;
            }
            let master = cluster.owner(lost.1);
            println!("{queues:?}: {} goes; {:?}", master.port(), cluster.masters().iter().map(|master| master.port()).collect::<Vec<_>>());
            if stands_still { master.stop() } else { master.kill() }
            // Until its replica takes over, calls to others are answered.
            let (mut client, mut answered) = (server.client().await, 0);
            let taken_over = async || cluster.masters().iter().any(|other| cluster.is_owner(other, lost.1) && other.port() != master.port());
            while !taken_over().await {
                let (queue, _) = &others[answered % others.len()];
                insert_json(&mut client, queue, &["2"]).await;
                answered += 1;
            }
            assert!(answered > 0);
            println!("{answered} inserts into queues of other masters meanwhile");
            serves_again(&server, &lost.0).await;
            if stands_still { master.cont() } else { master.restart() }
            cluster.await_whole();
            for (queue, _) in &queues {
                popped(&server, queue).await;
            }
        }
    }

    /// With the certificates that Redis wants, and only then.
    async fn tls_is_spoken_with_certificates_that_match() {
        let redis = Tls::start();
        let file = |name: &str| redis.file(name);
        let (ca, other) = (file("ca.crt"), file("other.crt"));
        let ours = ["--redis-cert", &file("client.crt"), "--redis-key", &file("client.key")].map(str::to_owned);
        let with = |ca: &str, more: &[String]| {
            let mut flags = vec!["--redis-ca".to_owned(), ca.to_owned()];
            flags.extend_from_slice(more);
            flags
        };
        let flags = with(&ca, &ours);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let server = on(&redis.url(), &flags).await;
        serves(&server).await;
        redis.redis().client_kill();
        serves(&server).await;
        let strange = ["--redis-cert", &file("stranger.crt"), "--redis-key", &file("stranger.key")].map(str::to_owned);
        for flags in [with(&other, &ours), with(&ca, &[]), with(&ca, &strange), ours.to_vec()] {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let server = Server::launch(&redis.url(), &[FLAGS, &flags].concat(), None);
            poll_until("a reason", PATIENCE, async || server.log().contains("cannot connect to Redis").then_some(())).await;
            assert_eq!(server.health("").await, ServingStatus::NotServing, "{flags:?}");
        }
    }

    /// A user that may do what README says, with a password in a file that is changed while the server runs.
    async fn a_password_in_a_file_can_be_changed() {
        let redis = Redis::start();
        let folder = Directory::default();
        let file = folder.join("password");
        let set = |password: &str| {
            let rule = format!(">{password}");
            redis.command(&["ACL", "SETUSER", "queue", "reset", "on", &rule, "~dq:*", "&dq:*", "+@all", "-@dangerous", "+info"]);
            fs::write(&file, format!("{password}\r\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        };
        set("first");
        let server = on(&redis.url(), &["--redis-user", "queue", "--redis-password-file", &file]).await;
        serves(&server).await;
        set("second");
        redis.client_kill();
        serves(&server).await;
        assert!(!server.log().contains("first") && !server.log().contains("second"), "{}", server.log());
    }

    /// A Redis that comes back without its data is not taken for an empty one, unless the server is told to.
    async fn an_emptied_store_is_not_served() {
        let redis = std::sync::Arc::new(Redis::start());
        let (wary, trusting) = (on(&redis.url(), &[]).await, on(&redis.url(), &["--accept-reset"]).await);
        let queue = unique_queue("gone");
        insert_json(&mut wary.client().await, &queue, &["1"]).await;
        redis.restart();
        poll_until("the reset to be noticed", PATIENCE, async || {
            let refused = wary.client().await.pop(pop_request(&queue)).await.err()?;
            (refused.reason().as_deref() == Some(reason::DATASET_RESET)).then_some(())
        })
        .await;
        assert_eq!(wary.health("").await, ServingStatus::NotServing);
        let mut client = wary.client().await;
        let refused = client.insert(insert_request(&queue, vec![json("1")])).await;
        let status = Refusal::of(Code::Unavailable, reason::DATASET_RESET).check("an insert", refused);
        assert!(status.retry_delay().is_some());
        trusting.ready().await;
        serves(&trusting).await;
        // It stays so however often it looks.
        assert_eq!(wary.health("").await, ServingStatus::NotServing);
        wary.restart().await;
        wary.ready().await;
        serves(&wary).await;
    }

    /// One that comes back with its data is as before.
    async fn a_store_that_kept_its_data_is_no_reset() {
        let redis = Redis::with(Options { persistence: Persistence::Always, ..Options::default() });
        let server = on(&redis.url(), &[]).await;
        let queue = unique_queue("kept");
        insert_json(&mut server.client().await, &queue, &["1"]).await;
        redis.restart();
        server.ready().await;
        popped(&server, &queue).await;
    }

    /// Of a cluster: a Redis that is none, and one that takes no password.
    async fn a_cluster_that_is_none_says_why() {
        let redis = Redis::start();
        for (user, why) in [("", "cluster support disabled"), (":secret@", "authentication failed")] {
            let store = format!("redis+cluster://{user}127.0.0.1:{}", redis.port());
            let server = Server::launch(&store, FLAGS, None);
            poll_until(why, PATIENCE, async || server.log().contains(why).then_some(())).await;
            assert_eq!(server.health("").await, ServingStatus::NotServing);
            assert!(!server.log().contains("secret"), "{}", server.log());
        }
    }

    /// Row 47: addresses and logins that cannot work are told in one line, without a password.
    async fn addresses_that_mean_nothing_end_the_server() {
        let folder = Directory::default();
        let (empty, here) = (folder.join("empty"), folder.join("here"));
        fs::write(&empty, "\n").unwrap();
        fs::write(&here, "not-a-certificate").unwrap();
        for (flags, words) in [
            (&["--store", "redis+sentinel://:secret@a:1,b:2"][..], &["--store", "master"][..]),
            (&["--store", "redis+cluster://:secret@a/1"], &["--store", "database 0"]),
            (&["--store", "redis://:secret@a,b"], &["--store", "several hosts"]),
            (&["--store", "redis+other://:secret@a"], &["--store", "scheme"]),
            (&["--store", "redis://a", "--redis-ca", &here], &["--redis-ca", "rediss"]),
            (&["--store", "rediss://a", "--redis-ca", "/nowhere/ca"], &["--redis-ca", "/nowhere/ca"]),
            (&["--store", "rediss://a", "--redis-cert", &here], &["--redis-key"]),
            (&["--store", "rediss://a", "--redis-cert", &here, "--redis-key", &here], &["--redis-key"]),
            (&["--store", "redis://a", "--redis-password-file", &empty], &["--redis-password-file", "empty"]),
            (&["--store", "redis://:secret@a", "--redis-password-file", &here], &["--redis-password-file", "--store"]),
            (&["--store", "redis://a", "--redis-user", "u"], &["--redis-user", "--redis-password-file"]),
            (&["--store", "redis://a", "--sentinel-user", "u"], &["--sentinel-user", "redis+sentinel"]),
        ] {
            let ended = run_to_end(&[&["--listen", "127.0.0.1:0"], flags].concat());
            ended.one_line(64, words);
        }
    }
}
