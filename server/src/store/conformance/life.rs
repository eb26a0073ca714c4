//! Everything together.

use super::*;

/// G8, G10, G11, G14: a task that was scheduled, has a priority, a key and an end, fails, waits, runs out, dies, is redriven
/// and is done at last.
pub(super) async fn a_task_lives_through_everything(open: Open) {
    let rig = open(Rules { max_failures: 2, backoff: Backoff { min: 100, max: 1_000 }, ..RULES });
    let q = queue("q");
    let plan = Plan { priority: 7, ttl: Some(10 * LEASE), unique_key: Some("k".to_owned()) };
    let id = rig.insert_new(&q, vec![after(500, planned(0, plan.clone()))]).await[0];
    rig.insert_numbers(&q, 1..3).await;
    let duplicate = async || rig.insert(&q, insert(vec![with_key(9, "k")])).await.unwrap().duplicates == [0];
    assert!(duplicate().await);
    rig.pass(500);
    rig.insert_new(&q, vec![of_priority(3, 8), of_priority(4, 7)]).await;
    assert_eq!(numbers(&rig.take(&q, 2).await), [3, 4], "it is made ready behind them");
    let held = rig.take_one(&q).await;
    assert_eq!((held.id, held.deliveries), (id, 1));
    rig.give_back(&q, failed(&[held.token], "once")).await;
    assert!(duplicate().await);
    rig.pass(99);
    assert_eq!(numbers(&rig.take(&q, 1).await), [1]);
    rig.pass(1);
    let held = rig.take_one(&q).await;
    assert_eq!((held.id, held.deliveries, held.failures, held.expiries), (id, 2, 1, 0));
    rig.pass(LEASE);
    let held = rig.take(&q, 3).await;
    assert_eq!(numbers(&held), [3, 4, 0]);
    assert_eq!((held[2].deliveries, held[2].failures, held[2].expiries), (3, 1, 1));
    assert_eq!(rig.give_back(&q, failed(&[held[2].token], "twice")).await.dead_lettered, 1);
    let dead = rig.seen(&q, id).await.unwrap();
    assert_eq!((dead.cause, dead.plan, &*dead.last_error), (Some(Cause::Failures), plan, "twice"));
    assert_eq!(dead.ends_at, Some(START + 10 * LEASE));

    let other = rig.insert_new(&q, vec![with_key(5, "k")]).await[0];
    assert_eq!(rig.redrive(&q, &[id]).await.unwrap(), [Redriven::Duplicate]);
    assert_eq!(rig.delete(&q, &[other]).await.unwrap(), [Deleted::Gone]);
    assert_eq!(rig.redrive(&q, &[id]).await.unwrap(), [Redriven::Ready]);
    assert!(duplicate().await);
    let held = rig.take_one(&q).await;
    assert_eq!((held.id, held.deliveries, held.failures, held.expiries), (id, 4, 0, 0), "before those of no priority");
    rig.pass(LEASE - 1);
    assert_eq!(rig.delete(&q, &[id]).await.unwrap(), [Deleted::Cancelled]);
    assert_eq!(rig.heartbeat(&q, &[held.token], None).await.unwrap().cancelled, [held.token]);
    assert_eq!(rig.ack_one(&q, held.token).await, Outcome::Applied);
    assert!(!duplicate().await, "the key is free");
    let counts = rig.counted(&q).await;
    assert_eq!((counts.inserted, counts.acked, counts.deleted, counts.dead), (7, 1, 1, 0));
}
