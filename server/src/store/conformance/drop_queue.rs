//! Queues that are dropped.

use super::*;

/// One with tasks, in whichever state, is dropped only by force.
pub(super) async fn a_queue_with_tasks_is_kept_without_force(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    assert!(!rig.drop_queue(&q, false).await.unwrap());
    assert!(!rig.drop_queue(&q, true).await.unwrap());
    let refused = async || matches!(rig.drop_queue(&q, false).await, Err(StoreError::NotEmpty));
    rig.insert_new(&q, vec![after(10, task("0"))]).await;
    assert!(refused().await, "scheduled");
    rig.pass(10);
    rig.look_one(&q).await;
    assert!(refused().await, "ready");
    let held = rig.take_one(&q).await.token;
    assert!(refused().await, "leased");
    rig.give_back(&q, rejected(&[held], "no")).await;
    assert!(refused().await, "dead");
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 1, ..Counts::default() });
    rig.purge(&q, State::Dead).await.unwrap();
    assert!(rig.drop_queue(&q, false).await.unwrap());
    assert_eq!((rig.count(&q).await, rig.queues(None, 10).await.unwrap()), (None, vec![]));
    // What is over is no task.
    rig.insert_new(&q, vec![with_ttl(0, 10)]).await;
    rig.pass(10);
    assert!(rig.drop_queue(&q, false).await.unwrap());
    rig.set(&q, Setting::Paused, 1).await;
    assert!(rig.drop_queue(&q, false).await.unwrap());
}

/// G12: a queue that is made anew remembers nothing of the old one, and others are not touched.
pub(super) async fn nothing_is_remembered_of_a_dropped_queue(open: Open) {
    let rig = open(Rules { max_failures: 1, ..RULES });
    let (q, other) = (queue("q"), queue("q::other"));
    let produce = || {
        let tasks = vec![task("1")];
        let inserts = vec![NumberedInsert { number: 1, fingerprint: Fingerprint([1; 16]), tasks }];
        Produce { producer: "p".to_owned(), inserts, waiting_here: 0, ..Default::default() }
    };
    let stream = consumer(1, 1);
    let mut kept = Vec::new();
    for q in [&q, &other] {
        rig.insert_repeatably(q, 0..1, "r").await;
        rig.produce(q, produce()).await.unwrap();
        let planned = planned(2, Plan { priority: 5, ttl: Some(10 * LEASE), unique_key: Some("k".to_owned()) });
        rig.insert_new(q, vec![planned, after(50, task("3")), after(60, with_ttl(4, 5_000)), task("5"), task("6")])
            .await;
        let held = rig.pop(q, Pop { consumer: Some(stream), ..attempt(2, "p", 1) }).await.unwrap().tasks;
        assert_eq!(numbers(&held), [2, 0]);
        let acked = rig.take(q, 2).await;
        assert_eq!(rig.ack_one(q, acked[0].token).await, Outcome::Applied);
        rig.give_back(q, failed(&[acked[1].token], "e")).await;
        rig.change(q, &[(Setting::Lease, Some(5)), (Setting::MaxTasks, Some(50))]).await.unwrap();
        kept = vec![held[0].token, held[1].token, acked[0].token];
    }
    let before = rig.counted(&other).await;
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!((rig.count(&q).await, rig.settings(&q).await.unwrap()), (None, None));
    assert_eq!(rig.queues(None, 10).await.unwrap(), std::slice::from_ref(&other));
    assert_eq!(rig.take(&q, 10).await, []);
    assert_eq!(rig.ack(&q, &kept).await.unwrap(), [Outcome::LeaseLost; 3]);

    assert!(!rig.insert_repeatably(&q, 0..1, "r").await.replayed);
    assert!(!rig.produce(&q, produce()).await.unwrap().inserted[0].replayed);
    rig.insert_new(&q, vec![with_key(2, "k")]).await;
    assert_eq!(rig.settings(&q).await.unwrap(), Some(Settings::default()));
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
    assert_eq!(rig.resume(&q, stream, LEASE, LEASE).await.unwrap(), []);
    let popped = rig.pop(&q, attempt(2, "p", 1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.known), (vec![0, 1], false));
    assert_eq!(rig.beat_one(&q, kept[0], LEASE).await, Outcome::LeaseLost);
    rig.pass(100);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 2, inserted: 3, ..Counts::default() });
    for state in [State::Scheduled, State::Dead] {
        assert!(rig.list_numbers(&q, state).await.is_empty());
    }
    assert_eq!(rig.counted(&other).await, Counts { ready: before.ready + 2, scheduled: 0, ..before });
}

/// However many tasks it has.
pub(super) async fn a_queue_with_thousands_is_dropped(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    for _ in 0..3 {
        rig.insert_numbers(&q, 0..1_000).await;
    }
    rig.insert_new(&q, (0..1_000).map(|number| with_key(number, &number.to_string())).collect()).await;
    for _ in 0..10 {
        rig.take(&q, 100).await;
    }
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!(rig.count(&q).await, None);
    rig.insert_new(&q, (0..10).map(|number| with_key(number, &number.to_string())).collect()).await;
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await, Counts { ready: 10, inserted: 10, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, (0..10).collect::<Vec<_>>());
}
