//! A store without room.

use data_queue_proto::reason;
use data_queue_proto::v1::{Outcome, PopBatchRequest};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    call::{
        ack, data, heartbeat, insert_json, insert_request, pop, pop_batch, pop_batch_request, putback, putback_request,
    },
    embedded::Embedded,
    redis::Options,
    server::{Client, Server},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

const VALUE: usize = 64 << 10;
/// Far more than fits.
const MOST: usize = 10_000;

fn full() -> Refusal {
    Refusal::of(Code::ResourceExhausted, reason::STORE_FULL)
}

/// Inserts until the store is full and refuses it properly. Gives the ids of what is in.
async fn fill(client: &mut Client, queue: &str) -> Vec<String> {
    let mut ids = Vec::new();
    let refused = loop {
        assert!(ids.len() < MOST, "never full");
        match client.insert(insert_request(queue, vec![data(vec![b'x'; VALUE])])).await {
            Ok(answer) => ids.push(answer.into_inner().results[0].id.clone()),
            Err(status) => break status,
        }
    };
    let status = full().check("a full store", Err::<(), _>(refused));
    assert!(status.retry_delay().is_some(), "no RetryInfo in {status:?}");
    ids
}

wire_tests! {
    /// Row 35, G13: Redis is out of memory; inserts are refused, all else goes on, and then inserts do.
    async fn row_35_redis_out_of_memory() {
        let options = Options {
            maxmemory: Some("24mb".to_owned()),
            maxmemory_policy: Some("noeviction".to_owned()),
            ..Options::default()
        };
        let server = Server::on_redis_with(options, &[]);
        server.ready().await;
        let mut client = server.client().await;
        let queue = unique_queue("full");
        let mut ids = fill(&mut client, &queue).await;
        assert!(ids.len() > 10, "full after {}", ids.len());
        // Small values take what little room is left.
        let mut small = Vec::new();
        while let Ok(answer) = client.insert(insert_request(&queue, vec![data(vec![b'y'; 100])])).await {
            assert!(small.len() < 100 * MOST, "never full");
            small.push(answer.into_inner().results[0].id.clone());
        }
        ids.extend(small);

        // Under its own pressure too: a second later Redis may count another megabyte of buffers.
        server.redis().config_set("maxmemory", "1mb");
        let answer = client.insert(insert_request(&queue, vec![data("z")])).await;
        full().check("a Redis far over its limit", answer);

        let mut held = pop(&mut client, &queue).await.expect("a pop from a full Redis");
        assert_eq!(heartbeat(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        assert_eq!(putback(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        for (position, id) in ids.iter().enumerate() {
            held = pop(&mut client, &queue).await.expect("a pop from a full Redis");
            assert_eq!((&held.id, held.deliveries), (id, if position == 0 { 2 } else { 1 }));
            assert_eq!(ack(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        }
        assert_eq!(pop(&mut client, &queue).await, None, "a refused insert inserted");
        assert_eq!(ack(&mut client, &queue, &held.lease_token).await, Outcome::AlreadyAcked);

        server.redis().config_set("maxmemory", "24mb");
        insert_json(&mut client, &queue, &["1"]).await;
        assert!(pop(&mut client, &queue).await.is_some());
    }

    /// Row 35, G13: the same of the store in a file, on a small file system of its own; the server goes on serving, and what
    /// it kept is there when it was killed.
    async fn row_35_a_file_system_without_room() {
        let flags = ["--disk-reserve", "8388608"];
        let server = Embedded::start_on_disk(48 << 20, &flags).await;
        let mut client = server.client().await;
        let queue = unique_queue("full");
        let mut ids = fill(&mut client, &queue).await;
        assert!(ids.len() > 100, "full after {}", ids.len());
        for round in 0..3 {
            // Small values take what little room is left.
            while let Ok(answer) = client.insert(insert_request(&queue, vec![data(vec![b'y'; 100])])).await {
                assert!(ids.len() < 100 * MOST, "never full");
                ids.push(answer.into_inner().results[0].id.clone());
            }
            assert_eq!(server.health("").await, ServingStatus::Serving);
            // Many changes, so that the room that they take themselves is tried.
            for _ in 0..300 {
                let held = pop(&mut client, &queue).await.expect("a pop from a full store");
                assert_eq!(held.id, ids[0]);
                assert_eq!(heartbeat(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
                assert_eq!(putback(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
            }
            let held = pop_batch(&mut client, PopBatchRequest { max_tasks: 200, ..pop_batch_request(&queue) }).await;
            let held = held.expect("a batch from a full store").into_iter().map(|task| task.lease_token);
            let answer = client.putback(putback_request(&queue, &held.collect::<Vec<_>>())).await.expect("a putback");
            assert_eq!(answer.into_inner().put_back, 200);
            let refused = client.insert(insert_request(&queue, vec![data(vec![b'x'; VALUE])])).await;
            full().check(&format!("round {round}"), refused);
            assert_eq!(server.health("").await, ServingStatus::Serving);
            if round == 1 {
                server.kill();
                server.restart().await;
                client = server.client().await;
            }
        }
        println!("{} tasks in", ids.len());
        for id in &ids {
            let held = pop(&mut client, &queue).await.expect("a pop from a full store");
            assert_eq!(&held.id, id);
            assert_eq!(ack(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        }
        assert_eq!(pop(&mut client, &queue).await, None, "a refused insert inserted");
        let more = fill(&mut client, &queue).await;
        assert!(more.len() > 100, "full again after {}", more.len());
        server.kill_and_check();
    }

    /// Row 35, G13: the same of the store in memory, at the capacity that it was given.
    async fn row_35_memory_at_its_capacity() {
        let server = Server::launch("memory", &["--memory-capacity", "1000000"], None);
        let mut client = server.client().await;
        let queue = unique_queue("full");
        let ids = fill(&mut client, &queue).await;
        let held = pop(&mut client, &queue).await.expect("a pop from a full store");
        assert_eq!(heartbeat(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        assert_eq!(putback(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        for id in &ids {
            let held = pop(&mut client, &queue).await.expect("a pop from a full store");
            assert_eq!(&held.id, id);
            assert_eq!(ack(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        }
        assert_eq!(pop(&mut client, &queue).await, None, "a refused insert inserted");
        insert_json(&mut client, &queue, &["1"]).await;
    }
}
