//! The reaper: queues that nobody pops.

use std::collections::{HashMap, HashSet};

use super::*;
use crate::store::ReapCursor;

/// One whole round: how many visits it made, and what it took back where.
pub(super) async fn round(rig: &Rig, budget: usize) -> (usize, HashMap<QueueName, u64>) {
    let (mut visited, mut reclaimed) = (0, HashMap::new());
    let mut cursor = ReapCursor::default();
    for _ in 0..1000 {
        let reaped = rig.reap(cursor, budget).await.unwrap();
        visited += reaped.visited;
        for (queue, count) in reaped.reclaimed {
            assert!(count > 0);
            *reclaimed.entry(queue).or_default() += count;
        }
        cursor = reaped.next;
        if cursor == ReapCursor::default() {
            return (visited, reclaimed);
        }
    }
    panic!("the round does not end");
}

/// G15: what ran out comes back where nobody pops, and nothing else does.
pub(super) async fn the_reaper_finds_queues_that_nobody_pops(open: Open) {
    let rig = open(RULES);
    assert_eq!(round(&rig, 10).await, (0, HashMap::new()));
    let names = ["a", "a::b", "B", "idle", "alive"].map(queue);
    for q in &names {
        rig.insert_numbers(q, 0..3).await;
    }
    for q in &names[..3] {
        assert_eq!(rig.take(q, 2).await.len(), 2);
    }
    let alive = rig.take_one(&names[4]).await.token;
    rig.pass(LEASE - 1);
    assert_eq!(round(&rig, 10).await.1, HashMap::new());
    rig.beat_one(&names[4], alive, LEASE).await;
    rig.pass(1);
    let (visited, reclaimed) = round(&rig, 10).await;
    assert!(visited >= 5);
    assert_eq!(reclaimed, names[..3].iter().map(|q| (q.clone(), 2)).collect());
    assert_eq!(round(&rig, 10).await.1, HashMap::new());
    assert_eq!(rig.ack_one(&names[4], alive).await, Outcome::Applied);
    for q in &names[..3] {
        assert_eq!(rig.counted(q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
        let first = rig.take_one(q).await;
        assert_eq!((numbers(std::slice::from_ref(&first)), first.expiries), (vec![0], 1));
    }
}

/// G15: with many queues, a round goes on step by step, comes to each and ends.
pub(super) async fn a_round_visits_all_queues_and_ends(open: Open) {
    let rig = open(RULES);
    let names: HashSet<QueueName> = (0..300).map(|number| queue(&format!("queue/{number}"))).collect();
    for q in &names {
        rig.insert_numbers(q, 0..1).await;
        rig.take_one(q).await;
    }
    for budget in [50, 1, 1000] {
        rig.pass(LEASE);
        let (visited, reclaimed) = round(&rig, budget).await;
        assert!(visited >= 300, "{visited} visits with a budget of {budget}");
        assert!(reclaimed.values().all(|count| *count == 1));
        assert_eq!(reclaimed.into_keys().collect::<HashSet<_>>(), names);
        for q in &names {
            rig.take_one(q).await;
        }
    }
}
