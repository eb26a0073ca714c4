//! Redis, the server and the connections between them are killed while tasks go through.

use std::{sync::Arc, time::Duration};

use data_queue_proto::v1::InsertRequest;
use tokio::time::sleep;

use super::load::survive;
use crate::support::{
    PATIENCE,
    call::{insert_request, json, pop},
    poll_until,
    redis::{Options, Persistence, Redis},
    rounds,
    server::Server,
    unique_queue, wire_tests,
};

const FLAGS: &[&str] = &["--store-timeout", "2s"];

fn tasks() -> usize {
    rounds(2_000, 40_000)
}

async fn server(persistence: Persistence) -> Server {
    let server = Server::on_redis_with(Options { persistence, ..Options::default() }, FLAGS);
    server.ready().await;
    server
}

wire_tests! {
    /// G3: an Insert that the server was killed over, repeated on another connection, happened once.
    async fn insert_again_after_the_server_was_killed() {
        let server = server(Persistence::None).await;
        for round in 0..rounds(10, 200) {
            let queue = unique_queue("killed");
            let tasks = (0..100).map(|value| json(&value.to_string())).collect::<Vec<_>>();
            let request = InsertRequest { request_id: "once".to_owned(), ..insert_request(&queue, tasks) };
            let mut client = server.client().await;
            let first = {
                let request = request.clone();
                tokio::spawn(async move { client.insert(request).await.ok() })
            };
            // Another moment in each round: before it is sent, while it runs, when it was answered.
            let moment = Duration::from_micros(round * 300);
            sleep(moment).await;
            server.kill();
            let first = first.await.unwrap();
            server.restart().await;

            let mut client = server.client().await;
            let again = client.insert(request).await.expect("the retry").into_inner();
            if let Some(first) = first {
                assert!(again.replayed);
                assert_eq!(again.results, first.into_inner().results);
            }
            for result in &again.results {
                let task = pop(&mut client, &queue).await.expect("a task of the insert");
                assert_eq!((&task.id, task.deliveries), (&result.id, 1));
            }
            assert_eq!(pop(&mut client, &queue).await, None, "inserted twice");
        }
    }

    /// G1, G3, G7: Redis that keeps everything is killed and comes back; nothing is lost, doubled or undone.
    async fn redis_killed_under_load() {
        let server = server(Persistence::Always).await;
        survive(&[&server], tasks(), async |ledger| {
            for percent in [20, 40, 60, 80] {
                ledger.reached(percent).await;
                server.redis().kill();
                server.redis().restart();
            }
        })
        .await;
    }

    /// G1, G3, G7: the server is killed and comes back.
    async fn server_killed_under_load() {
        let server = server(Persistence::None).await;
        survive(&[&server], tasks(), async |ledger| {
            for percent in [20, 40, 60, 80] {
                ledger.reached(percent).await;
                server.restart().await;
            }
        })
        .await;
    }

    /// G1, G3, G7: Redis forgets its scripts, again and again.
    async fn scripts_flushed_under_load() {
        let server = server(Persistence::None).await;
        survive(&[&server], tasks(), async |ledger| {
            for percent in (2..98).step_by(4) {
                ledger.reached(percent).await;
                server.redis().script_flush();
            }
        })
        .await;
    }

    /// G1, G3, G7: Redis cuts every connection, again and again.
    async fn connections_cut_under_load() {
        let server = server(Persistence::None).await;
        survive(&[&server], tasks(), async |ledger| {
            for percent in (2..98).step_by(4) {
                ledger.reached(percent).await;
                server.redis().client_kill();
            }
        })
        .await;
    }

    /// G1, G3, G7: Redis stands still for longer than the store timeout.
    async fn redis_stopped_under_load() {
        let server = server(Persistence::None).await;
        survive(&[&server], tasks(), async |ledger| {
            for percent in [30, 60] {
                ledger.reached(percent).await;
                server.redis().stop();
                let mut client = server.client().await;
                let insert = insert_request("other", vec![json("1")]);
                let refused = async || client.insert(insert.clone()).await.err();
                poll_until("a call to meet the store timeout", PATIENCE, refused).await;
                server.redis().cont();
            }
        })
        .await;
    }

    /// G1, G3, G4: two servers on one Redis; one of them is killed again and again, the other serves on.
    async fn one_of_two_servers_killed_under_load() {
        let redis = Arc::new(Redis::start());
        let servers = [Server::on(Arc::clone(&redis), FLAGS), Server::on(Arc::clone(&redis), FLAGS)];
        for server in &servers {
            server.ready().await;
        }
        survive(&[&servers[0], &servers[1]], tasks(), async |ledger| {
            for percent in [20, 40, 60, 80] {
                ledger.reached(percent).await;
                servers[1].restart().await;
            }
        })
        .await;
    }
}
