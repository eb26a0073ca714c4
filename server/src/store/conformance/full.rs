//! A store without room.

use super::{reap::round, *};

/// G13: a full store refuses inserts, each whole, and lets everything out that is in it.
pub(super) async fn a_full_store_refuses_inserts_and_drains(open: Open) {
    let rig = open(RULES);
    drains(&rig).await;
}

/// The case itself, on a store that holds nothing yet.
pub(super) async fn drains(rig: &Rig) {
    let (q, new) = (queue("q"), queue("new"));
    rig.insert_repeatably(&q, 0..460, "r").await;
    let held = tokens(&rig.take(&q, 8).await);
    rig.engine.fill().await;

    let large = || insert((0..200).map(|_| task(vec![1; 1000])).collect());
    for refused in [large(), Insert { request: Some(key("s", 1)), ..large() }] {
        for q in [&q, &new] {
            assert!(matches!(rig.insert(q, refused.clone()).await, Err(StoreError::Full(_))), "{q:?}");
        }
    }
    assert_eq!(rig.count(&new).await, None);
    assert_eq!(rig.counted(&q).await, Counts { ready: 452, leased: 8, inserted: 460, acked: 0, ..Counts::default() });
    assert!(rig.insert_repeatably(&q, 0..460, "r").await.replayed);

    assert_eq!(rig.beat_one(&q, held[0], 2 * LEASE).await, Outcome::Applied);
    assert_eq!(rig.ack_one(&q, held[1]).await, Outcome::Applied);
    assert_eq!(rig.put_back(&q, &held[2..3]).await, [Outcome::Applied]);
    assert_eq!(rig.unsent(&q, &held[3..4], None).await, [Outcome::Applied]);
    let popped = rig.pop(&q, Pop { acks: vec![held[4]], ..attempt(2, "p", 1) }).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.acks), (vec![3, 2], vec![Outcome::Applied]));
    assert_eq!(rig.pop(&q, attempt(2, "p", 2)).await.unwrap().tasks, popped.tasks);
    assert_eq!(rig.held_released(&q, 0).await, 6);
    rig.pass(LEASE);
    assert_eq!(rig.take(&q, 200).await.len(), 200);
    assert_eq!(rig.take(&q, 200).await.len(), 200);
    rig.pass(LEASE);
    let looked = rig.look(std::slice::from_ref(&q)).await.unwrap()[0].reclaimed;
    let reaped = round(rig, 100).await.1.into_values().sum::<u64>();
    assert_eq!((looked > 0, looked + reaped), (true, 400));
    assert_eq!(rig.counted(&q).await, Counts { ready: 458, leased: 0, inserted: 460, acked: 2, ..Counts::default() });
    let mut acks = Vec::new();
    let mut waits = 0;
    while waits < 3 {
        let popped = rig.pop(&q, Pop { acks, will_wait: true, ..pop(100) }).await.unwrap();
        assert!(popped.acks.iter().all(|outcome| *outcome == Outcome::Applied));
        waits += usize::from(popped.tasks.is_empty());
        acks = tokens(&popped.tasks);
    }
    assert_eq!(rig.counted(&q).await, Counts { inserted: 460, acked: 460, ..Counts::default() });
    assert!(rig.pop(&new, Pop { will_wait: true, ..pop(1) }).await.unwrap().tasks.is_empty());
}
