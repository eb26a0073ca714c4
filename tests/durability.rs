//! What an insert has reached when it is answered: asked for, refused where it cannot be, and told as it is.

use std::sync::Arc;

use data_queue_proto::{
    reason,
    v1::{Durability, InsertRequest, ProduceInsert, ProduceOpen, ProduceRequest, produce_request::Request},
};
use tokio_stream::iter;
use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{Witness, counts, insert_request, json},
    on_every_store, poll_until,
    redis::{Options, Persistence, Redis},
    server::{Backend, Client, Server},
    status::Refusal,
    topology::Cluster,
    unique_queue, wire_tests,
};

/// Longer than a replica that is well takes, and short enough to wait for one that is not.
const FLAGS: &[&str] = &["--store-timeout", "4s"];

fn asking(queue: &str, durability: Durability) -> InsertRequest {
    InsertRequest { durability: durability.into(), ..insert_request(queue, vec![json("1"), json("2")]) }
}

async fn reached(client: &mut Client, request: InsertRequest) -> Durability {
    client.insert(request).await.unwrap().into_inner().durability()
}

/// A master and so many replicas that it lists as online.
fn master_with(replicas: usize, persistence: Persistence) -> (Redis, Vec<Redis>) {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let extra = words(&["--repl-diskless-sync-delay", "0"]);
    let master = Redis::with(Options { persistence, extra, ..Options::default() });
    let port = master.port().to_string();
    let extra = words(&["--replicaof", "127.0.0.1", &port]);
    let replicas = (0..replicas).map(|_| Redis::with(Options { extra: extra.clone(), ..Options::default() })).collect();
    (master, replicas)
}

/// Until the server has seen all replicas.
async fn knows_replicas(client: &mut Client, queue: &str, redis: &Redis, count: usize) {
    let online = || (0..count).all(|at| redis.info(&format!("slave{at}")).is_some_and(|line| line.contains("online")));
    poll_until("the replicas", PATIENCE, async || online().then_some(())).await;
    poll_until("the server to know of them", PATIENCE, async || {
        let answer = client.insert(asking(queue, Durability::Replicated)).await.ok()?.into_inner();
        (answer.durability() == Durability::Replicated).then_some(())
    })
    .await;
}

on_every_store! {
    /// What is no durability is refused, and so is what this store cannot give; nothing is done then.
    async fn what_cannot_be_reached_is_refused(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for number in [-1, 4, i32::MAX] {
            let request = InsertRequest { durability: number, ..asking("wanted", Durability::Accepted) };
            Refusal::invalid(reason::DURABILITY_INVALID, "durability").check(&number.to_string(), client.insert(request).await);
        }
        let mut refused = vec![Durability::Replicated];
        if backend == Backend::Memory {
            refused.push(Durability::Fsynced);
        }
        for wanted in refused {
            let refused = client.insert(asking("wanted", wanted)).await;
            Refusal::of(Code::FailedPrecondition, reason::DURABILITY_UNSUPPORTED).check(wanted.as_str_name(), refused);
            let open = ProduceOpen { queue: "wanted".to_owned(), producer_id: "p".to_owned(), durability: wanted.into() };
            let insert = ProduceInsert { number: 1, tasks: vec![json("1")] };
            let messages = [Request::Open(open), Request::Insert(insert)].map(|request| ProduceRequest { request: Some(request) });
            let refused = client.produce(iter(messages)).await.unwrap().into_inner().message().await;
            Refusal::of(Code::FailedPrecondition, reason::DURABILITY_UNSUPPORTED).check("a stream", refused);
        }
        witness.unchanged(&mut client, "durabilities").await;
        for wanted in [Durability::Unspecified, Durability::Accepted] {
            assert_eq!(reached(&mut client, asking("wanted", wanted)).await, Durability::Accepted);
        }
    }
}

wire_tests! {
    /// The server's own file is synced before the answer, unless it was told not to.
    async fn a_file_is_synced_with_full_durability() {
        for (durability, is_synced) in [("full", true), ("normal", false)] {
            let server = Backend::Sqlite.start(&["--durability", durability]).await;
            let mut client = server.client().await;
            let answer = client.insert(asking("synced", Durability::Fsynced)).await;
            if is_synced {
                assert_eq!(answer.unwrap().into_inner().durability(), Durability::Fsynced);
            } else {
                Refusal::of(Code::FailedPrecondition, reason::DURABILITY_UNSUPPORTED).check(durability, answer);
            }
        }
    }

    /// With an append-only file that is synced before the answer, or on a Redis that can be asked to.
    async fn redis_syncs_before_the_answer_or_when_it_is_asked_to() {
        for persistence in [Persistence::Always, Persistence::EverySecond] {
            let is_always = matches!(persistence, Persistence::Always);
            let redis = Redis::with(Options { persistence, ..Options::default() });
            let server = Server::launch(&redis.url(), FLAGS, None);
            server.ready().await;
            let mut client = server.client().await;
            let version = redis.info("redis_version").unwrap();
            let can_be_asked = !(version.starts_with("6.") || version.starts_with("7.0"));
            let answer = client.insert(asking("synced", Durability::Fsynced)).await;
            if is_always || can_be_asked {
                assert_eq!(answer.unwrap().into_inner().durability(), Durability::Fsynced);
            } else {
                Refusal::of(Code::FailedPrecondition, reason::DURABILITY_UNSUPPORTED).check(&version, answer);
            }
        }
    }

    /// All replicas have it; with one that stands still it is in, and the answer says no more. The same request reaches it once all are well.
    /// What does not wait for replicas does not wait for those who do.
    async fn replicas_have_what_is_answered_as_replicated() {
        let (master, replicas) = master_with(2, Persistence::Always);
        // A quarter of it is what replicas are waited for: long enough for some inserts on any machine.
        let server = Server::launch(&master.url(), &["--store-timeout", "20s"], None);
        server.ready().await;
        let (mut client, queue) = (server.client().await, unique_queue("replicated"));
        knows_replicas(&mut client, &queue, &master, 2).await;
        for wanted in [Durability::Accepted, Durability::Fsynced, Durability::Replicated] {
            assert_eq!(reached(&mut client, asking(&queue, wanted)).await, wanted);
        }
        let open = ProduceOpen { queue: queue.clone(), producer_id: "p".to_owned(), durability: Durability::Replicated.into() };
        let inserts = (1..300).map(|number| Request::Insert(ProduceInsert { number, tasks: vec![json("3")] }));
        let messages: Vec<_> = std::iter::once(Request::Open(open)).chain(inserts).map(|request| ProduceRequest { request: Some(request) }).collect();
        let mut answers = client.produce(iter(messages)).await.unwrap().into_inner();
        let mut answered = 0;
        while let Some(message) = answers.message().await.unwrap() {
            answered += message.answers.len();
            assert!(message.answers.iter().all(|answer| answer.durability() == Durability::Replicated));
        }
        assert_eq!(answered, 299);

        replicas[1].stop();
        let before = counts(&mut client, &queue).await.inserted;
        let request = InsertRequest { request_id: "again".to_owned(), ..asking(&queue, Durability::Replicated) };
        let short = {
            let (mut client, request) = (server.client().await, request.clone());
            tokio::spawn(async move { client.insert(request).await.unwrap().into_inner() })
        };
        poll_until("the insert that waits to be in", PATIENCE, async || {
            (counts(&mut client.clone(), &queue).await.inserted == before + 2).then_some(())
        })
        .await;
        for _ in 0..3 {
            assert_eq!(reached(&mut client, asking(&queue, Durability::Accepted)).await, Durability::Accepted);
        }
        assert!(!short.is_finished(), "plain inserts went before the one that waits");
        let short = short.await.unwrap();
        assert_eq!((short.durability(), short.replayed), (Durability::Fsynced, false));
        replicas[1].cont();
        let again = client.insert(request).await.unwrap().into_inner();
        assert_eq!((again.durability(), again.replayed, again.results), (Durability::Replicated, true, short.results));
    }

    /// On a cluster the replicas are those of the queue's master; with shards, of each.
    async fn a_cluster_replicates_what_is_asked_for() {
        let cluster = Arc::new(Cluster::start());
        let server = Server::launch(&cluster.url(), FLAGS, None);
        server.ready().await;
        let mut client = server.client().await;
        for number in 0..12 {
            let queue = format!("replicated-{number}");
            poll_until("replicas", PATIENCE, async || {
                let answer = client.insert(asking(&queue, Durability::Replicated)).await.ok()?.into_inner();
                (answer.durability() == Durability::Replicated).then_some(())
            })
            .await;
        }
    }
}
