//! Queues with shards, of which several servers know different things.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use proptest::prelude::*;

use super::*;
use crate::store::{MAX_SHARDS, Shard};

fn two_servers() -> (Arc<Redis>, Rig, Rig, QueueName) {
    let redis = Arc::new(Redis::start());
    let (a, b) = (connected(&redis), connected(&redis));
    (redis, a, b, queue("q::spread"))
}

async fn insert_each(rig: &Rig, q: &QueueName, numbers: Range<usize>) {
    for number in numbers {
        rig.insert_numbers(q, number..number + 1).await;
    }
}

async fn drained(rig: &Rig, q: &QueueName) -> Vec<usize> {
    let mut all = Vec::new();
    loop {
        let held = rig.take(q, 30).await;
        if held.is_empty() {
            all.sort_unstable();
            return all;
        }
        assert_eq!(rig.ack(q, &tokens(&held)).await.unwrap(), vec![Outcome::Applied; held.len()]);
        all.extend(numbers(&held));
    }
}

/// Who knows nothing of a change inserts where it belongs, and finds all that there is with the first pop.
#[tokio::test]
async fn a_server_that_knows_another_number_of_shards_goes_on() {
    let (_redis, a, b, q) = two_servers();
    for (shards, expected) in [(4, 0..40), (64, 0..90), (2, 0..20), (1, 0..20), (8, 0..30)] {
        // What the other one knows is that of the round before.
        assert!(b.take(&q, 1).await.is_empty());
        a.set(&q, Setting::Shards, shards).await;
        insert_each(&b, &q, expected.clone()).await;
        assert_eq!(a.counted(&q).await.ready, expected.len() as u64);
        assert_eq!(drained(&a, &q).await, expected.clone().collect::<Vec<_>>());
        insert_each(&a, &q, expected.clone()).await;
        assert_eq!(drained(&b, &q).await, expected.clone().collect::<Vec<_>>(), "{shards}");
    }
    for shards in [4, 16, 1] {
        a.set(&q, Setting::Shards, shards).await;
        insert_each(&a, &q, 0..50).await;
        // It was never told.
        let c = connected(&_redis);
        assert_eq!(c.look_one(&q).await.ready, 50, "{shards}");
        assert_eq!(drained(&connected(&_redis), &q).await, (0..50).collect::<Vec<_>>(), "{shards}");
    }
}

/// A queue that was deleted and is made anew by others has no shards, whatever a server remembers.
#[tokio::test]
async fn a_server_that_remembers_a_deleted_queue_goes_on() {
    let (_redis, a, b, q) = two_servers();
    for round in 0..5 {
        a.set(&q, Setting::Shards, 8).await;
        insert_each(&a, &q, 0..20).await;
        assert!(b.drop_queue(&q, true).await.unwrap());
        if round % 2 == 0 {
            insert_each(&b, &q, 0..5).await;
        }
        insert_each(&a, &q, 5..25).await;
        let first = if round % 2 == 0 { 0 } else { 5 };
        let expected: Vec<usize> = (first..25).collect();
        assert_eq!(drained(&connected(&_redis), &q).await, expected, "{round}");
        assert_eq!(a.settings(&q).await.unwrap(), Some(Settings::default()));
    }
}

/// A change that fenced some shards and then died: inserts go on, and so does the next change.
#[tokio::test]
async fn a_change_that_was_left_half_done_is_undone() {
    let (redis, a, b, q) = two_servers();
    a.set(&q, Setting::Shards, 4).await;
    insert_each(&b, &q, 0..10).await;
    assert_eq!(drained(&b, &q).await.len(), 10);
    let shared = RedisShared::new(&config_of(&redis, RULES)).unwrap();
    let fence = |number: u8, generation: u64| {
        let meta = shared.key_of(&q.part(Shard { number, generation: 0 }), "meta");
        redis.command(&["HSET", &meta, "generation", &generation.to_string()]);
    };
    for round in 1..4 {
        let ahead = START + 1_000_000 * round;
        fence(1, ahead);
        fence(3, ahead + 7);
        insert_each(&a, &q, 0..40).await;
        insert_each(&b, &q, 40..80).await;
        assert_eq!(drained(&a, &q).await, (0..80).collect::<Vec<_>>());
        fence(2, ahead + 9);
        let shards = if round % 2 == 0 { 4 } else { 8 };
        assert_eq!(b.set(&q, Setting::Shards, shards).await.shards(), shards);
    }
}

/// Inserts, pops and changes of the number from two servers at once: each task is delivered once.
#[tokio::test]
async fn nothing_is_lost_while_the_number_of_shards_changes() {
    let (redis, a, b, q) = two_servers();
    let (changed, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let over = AtomicUsize::new(0);
    let work = async |rig: &Rig, first: usize| {
        let mut seen = Vec::new();
        for round in 0..60 {
            let from = first + 10 * round;
            insert_each(rig, &q, from..from + 5).await;
            rig.insert_repeatably(&q, from + 5..from + 10, &format!("r{from}")).await;
            loop {
                let held = rig.take(&q, 7).await;
                if held.is_empty() {
                    break;
                }
                assert_eq!(rig.ack(&q, &tokens(&held)).await.unwrap(), vec![Outcome::Applied; held.len()]);
                seen.extend(numbers(&held));
            }
        }
        over.fetch_add(1, Ordering::Relaxed);
        seen
    };
    let c = connected(&redis);
    let change = async || {
        for shards in [4, 1, 16, 2, 8].into_iter().cycle() {
            if over.load(Ordering::Relaxed) == 2 {
                return;
            }
            match c.change(&q, &[(Setting::Shards, Some(shards))]).await {
                Ok(_) => changed.fetch_add(1, Ordering::Relaxed),
                Err(StoreError::NotEmpty | StoreError::Unavailable { did_not_run: true, .. }) => {
                    refused.fetch_add(1, Ordering::Relaxed)
                }
                Err(error) => panic!("{error}"),
            };
        }
    };
    let (one, other, ()) = tokio::join!(work(&a, 0), work(&b, 10_000), change());
    let rest = drained(&connected(&redis), &q).await;
    let all: Vec<usize> = [one, other, rest].concat();
    let different: BTreeSet<usize> = all.iter().copied().collect();
    assert_eq!((all.len(), different.len()), (1_200, 1_200));
    assert!(changed.load(Ordering::Relaxed) > 3, "{changed:?} {refused:?}");
    let counts = a.counted(&q).await;
    assert_eq!((counts.inserted, counts.acked), (1_200, 1_200));
}

proptest! {
    /// All keys that a call can name are in one slot of a cluster: those of a shard, of any legal name; and so are those of queues that
    /// share a tag. `common.lua` makes the others of a queue from the first, behind its last colon.
    #[test]
    fn keys_of_a_call_are_in_one_slot(
        name in "[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}",
        prefix in "[A-Za-z0-9_-]{1,16}",
        shard in 0..MAX_SHARDS,
    ) {
        let url = "redis+cluster://127.0.0.1:1".to_owned();
        let config = RedisConfig { url, key_prefix: prefix, ..config_of_nothing() };
        let shared = RedisShared::new(&config).unwrap();
        let part = QueueName::parse(&name).unwrap().part(Shard { number: shard, generation: 0 });
        let keys = ["meta", "tasks", "ready:0", "ready:9", "producer:a}b{c", "session:{x}", "call:}{", "nowhere"]
            .map(|name| shared.key_of(&part, name));
        let tag = |key: &str| key[key.find('{').unwrap() + 1..key.find('}').unwrap()].to_owned();
        for key in &keys {
            prop_assert_eq!(tag(key), tag(&keys[0]));
            prop_assert!(!tag(key).is_empty());
        }
    }
}

fn config_of_nothing() -> RedisConfig {
    RedisConfig {
        url: String::new(),
        access: Default::default(),
        key_prefix: String::new(),
        accept_reset: false,
        timeout: TIMEOUT,
        rules: RULES,
    }
}
