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

/// G12: nor does what a task has beside its value, nor what administration does: ids, keys, priorities and settings are equal in
/// all of them.
pub(super) async fn plans_settings_and_administration_are_of_one_queue(open: Open) {
    let rig = open(RULES);
    let names = NAMES.map(queue);
    let plan = |unique_key: &str| Plan { priority: 3, ttl: Some(LEASE), unique_key: Some(unique_key.to_owned()) };
    let call = insert(vec![
        planned(0, plan("k")),
        after(100, planned(1, plan("l"))),
        of_priority(2, 5),
        of_priority(3, 4),
        task("4"),
        after(50, task("5")),
    ]);
    let ids: Vec<TaskId> = call.tasks.iter().map(|task| task.id).collect();
    let take = attempt(2, "r", 1);
    for q in &names {
        assert!(rig.insert(q, call.clone()).await.unwrap().duplicates.is_empty(), "{q:?}");
        let held = rig.pop(q, take.clone()).await.unwrap().tasks;
        assert_eq!(numbers(&held), [2, 3], "{q:?}");
        rig.give_back(q, rejected(&[held[1].token], "no")).await;
    }
    let all =
        async |q: &QueueName| (rig.settings(q).await.unwrap(), rig.count(q).await, rig.tasks(q, &ids).await.unwrap());
    let untouched = all(&names[0]).await;
    for (at, q) in names.iter().enumerate() {
        assert_eq!(all(q).await, untouched, "{q:?}");
        rig.change(q, &[(Setting::Paused, Some(1)), (Setting::MaxTasks, Some(1))]).await.unwrap();
        assert_eq!(rig.delete(q, &ids[..3]).await.unwrap(), [Deleted::Gone, Deleted::Gone, Deleted::Cancelled]);
        assert_eq!(rig.redrive(q, &ids[3..4]).await.unwrap(), [Redriven::Ready]);
        assert_eq!(rig.purge(q, State::Ready).await.unwrap(), 2);
        assert_eq!(
            rig.counted(q).await,
            Counts { scheduled: 1, leased: 1, inserted: 6, deleted: 2, purged: 2, paused: true, ..Counts::default() }
        );
        for other in &names[at + 1..] {
            assert_eq!(all(other).await, untouched, "{other:?} after {q:?}");
        }
    }
    let touched = all(&names[0]).await;
    for (at, q) in names.iter().enumerate() {
        assert!(rig.drop_queue(q, true).await.unwrap());
        for other in &names[at + 1..] {
            assert_eq!(all(other).await, touched, "{other:?} after {q:?}");
        }
    }
    assert_eq!(rig.queues(None, 100).await.unwrap(), []);
}
