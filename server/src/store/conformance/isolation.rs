//! Queues are apart, whatever their names.

use super::*;

const NAMES: [&str; 9] = ["a", "A", "a::b", "a::c", "a:b", "a/../b", "a::", "a.0", "a::b:meta"];

/// G12: the same ids, tokens and request ids in queues of like names, and nothing done to one is seen in another.
pub(super) async fn queues_do_not_touch_each_other(open: Open) {
    let rig = open(RULES);
    let names = NAMES.map(queue);
    let insert = Insert { request: Some(key("r", 1)), ..insert(tasks(0..6)) };
    let call = attempt(5, "r", 1);
    let mut held = Vec::new();
    for q in &names {
        let inserted = rig.insert(q, insert.clone()).await.unwrap();
        assert!(!inserted.replayed, "{q:?}");
        let popped = rig.pop(q, call.clone()).await.unwrap();
        assert_eq!((numbers(&popped.tasks), popped.ready), (vec![0, 1, 2, 3, 4], 1), "{q:?}");
        held = tokens(&popped.tasks);
    }
    let untouched = Counts { ready: 1, leased: 5, inserted: 6, acked: 0, ..Counts::default() };
    for (at, q) in names.iter().enumerate() {
        let changed = Counts { ready: 3, leased: 2, inserted: 6, acked: 1, ..Counts::default() };
        assert_eq!(rig.ack_one(q, held[0]).await, Outcome::Applied, "{q:?}");
        assert_eq!(rig.put_back(q, &held[1..2]).await, [Outcome::Applied], "{q:?}");
        assert_eq!(rig.unsent(q, &held[2..3], Some(name_of_attempt(1))).await, [Outcome::Applied], "{q:?}");
        assert_eq!(rig.beat_one(q, held[3], 5 * LEASE).await, Outcome::Applied, "{q:?}");
        assert_eq!(rig.counted(q).await, changed, "{q:?}");
        for other in &names[at + 1..] {
            assert_eq!(rig.counted(other).await, untouched, "{other:?} after {q:?}");
        }
    }
    rig.pass(LEASE);
    for (at, q) in names.iter().enumerate() {
        for other in &names[at..] {
            assert_eq!(rig.beat_one(other, held[4], 1).await, Outcome::Applied, "{other:?} after {q:?}");
        }
        rig.pass(1);
        assert_eq!(rig.take_one(q).await.deliveries, 2, "{q:?}");
        assert_eq!(rig.held_released(q, 1).await, 1, "{q:?}");
        assert_eq!(rig.beat_one(q, held[3], 1).await, Outcome::LeaseLost, "{q:?}");
        assert_eq!(rig.drain(q).await.len(), 4, "{q:?}");
    }
}
