//! What is given back: by the holder, or for having been held too long.

use super::*;

/// G11: tasks that are put back together are at the head in the order of their delivery, however their tokens are ordered.
pub(super) async fn what_is_put_back_is_at_the_head_in_the_order_of_delivery(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..8).await;
    let mut held = tokens(&rig.take(&q, 2).await);
    held.extend(tokens(&rig.take(&q, 3).await));
    rig.put_back(&q, &[held[3], held[0], held[4], held[1]]).await;
    let again = rig.take(&q, 5).await;
    assert_eq!(numbers(&again), [0, 1, 3, 4, 5]);
    // The order is that of this delivery, which the next one may change.
    rig.put_back(&q, &tokens(&again[2..4])).await;
    rig.put_back(&q, &tokens(&again[..1])).await;
    let mixed = rig.take(&q, 3).await;
    assert_eq!(numbers(&mixed), [0, 3, 4]);
    rig.put_back(&q, &[mixed[2].token, again[1].token]).await;
    assert_eq!(rig.drain(&q).await, [1, 4, 6, 7]);
}

/// G9, G11: the largest call keeps the order too, in one step.
pub(super) async fn a_thousand_are_put_back_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1002).await;
    let mut held = Vec::new();
    for _ in 0..5 {
        held.extend(tokens(&rig.take(&q, 200).await));
    }
    held.reverse();
    held.rotate_left(333);
    assert_eq!(rig.put_back(&q, &held).await, vec![Outcome::Applied; 1000]);
    assert_eq!(rig.drain(&q).await, (0..1002).collect::<Vec<_>>());
}

/// G4, G14: a put back that is sent again does not put the task back again.
pub(super) async fn a_task_is_put_back_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    let outcomes = rig.put_back(&q, &[held[0], held[0]]).await;
    assert_eq!(outcomes, [Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(rig.put_back(&q, &[held[0], held[1]]).await, [Outcome::LeaseLost, Outcome::Applied]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 2, ..Counts::default() });
    let again = rig.take(&q, 5).await;
    assert_eq!(numbers(&again), [1, 0]);
    assert!(again.iter().all(|task| (task.deliveries, task.expiries) == (2, 0)));
    assert_eq!(rig.put_back(&q, &held).await, [Outcome::LeaseLost; 2]);
    assert_eq!(rig.put_back(&q, &[]).await, []);
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 2, ..Counts::default() });
}

/// G5, G7: a token that is not current puts nothing back.
pub(super) async fn only_the_holder_puts_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.take(&q, 3).await);
    rig.ack_one(&q, held[0]).await;
    rig.pass(LEASE);
    // After the deadline, but not taken back yet.
    assert_eq!(rig.put_back(&q, &held[..2]).await, [Outcome::AlreadyAcked, Outcome::Applied]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, leased: 0, inserted: 3, acked: 1, ..Counts::default() });
    assert_eq!(rig.put_back(&q, &held).await, [Outcome::AlreadyAcked, Outcome::LeaseLost, Outcome::LeaseLost]);
    let again = rig.take(&q, 5).await;
    assert_eq!(numbers(&again), [2, 1]);
    assert_eq!((again[0].expiries, again[1].expiries), (1, 0));
    assert_eq!(rig.put_back(&q, &held).await, [Outcome::AlreadyAcked, Outcome::LeaseLost, Outcome::LeaseLost]);
    assert_eq!(rig.counted(&q).await.leased, 2);
}

/// G8: a put back by the holder is a delivery and not an expiry.
pub(super) async fn a_put_back_counts_a_delivery_and_no_expiry(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    for delivery in 1..5 {
        let leased = rig.take(&q, 2).await;
        assert!(leased.iter().all(|task| (task.deliveries, task.expiries) == (delivery, 0)));
        rig.put_back(&q, &tokens(&leased)).await;
    }
}

/// G6: zero means every lease, however fresh; each counts as an expiry.
pub(super) async fn held_for_zero_takes_all(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let mut held = rig.take(&q, 2).await;
    rig.pass(1);
    held.extend(rig.take(&q, 1).await);
    rig.beat_one(&q, held[0].token, 9 * LEASE).await;
    assert_eq!(rig.held_released(&q, 0).await, 3);
    assert_eq!(rig.held_released(&q, 0).await, 0);
    assert_eq!(rig.counted(&q).await, Counts { ready: 4, inserted: 4, ..Counts::default() });
    assert_eq!(rig.ack(&q, &tokens(&held)).await.unwrap(), [Outcome::LeaseLost; 3]);
    let again = rig.take(&q, 4).await;
    assert_eq!(numbers(&again), [0, 1, 2, 3]);
    let counters: Vec<_> = again.iter().map(|task| (task.deliveries, task.expiries)).collect();
    assert_eq!(counters, [(2, 1), (2, 1), (2, 1), (1, 0)]);
}

/// G6: what counts is the time since the delivery or the last heartbeat that was applied, not the deadline.
pub(super) async fn held_for_looks_at_the_delivery_or_the_last_heartbeat(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let first = rig.pop(&q, Pop { lease: Some(9 * LEASE), ..pop(2) }).await.unwrap().tasks;
    rig.pass(100);
    let second = rig.take(&q, 2).await;
    rig.pass(100);
    // Does not move the deadline, and counts as a sign of life all the same.
    rig.beat_one(&q, first[0].token, 1).await;
    // One that is not applied is no sign of life of anybody.
    assert_eq!(rig.beat_one(&q, Token([0; 16]), 1).await, Outcome::LeaseLost);
    for (held_for, released) in [(u64::MAX, 0), (rig.now() + 1, 0), (201, 0), (200, 1), (101, 0), (100, 2), (1, 0)] {
        assert_eq!(rig.held_released(&q, held_for).await, released, "{held_for}");
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, leased: 1, inserted: 4, acked: 0, ..Counts::default() });
    assert_eq!(rig.ack_one(&q, first[0].token).await, Outcome::Applied);
    assert_eq!(rig.ack(&q, &tokens(&second)).await.unwrap(), [Outcome::LeaseLost; 2]);
    assert_eq!(rig.drain(&q).await, [2, 3, 1]);
}

/// G11: however many are given back, they are at the head in the order of their delivery, whatever their deadlines.
pub(super) async fn what_was_held_comes_back_in_the_order_of_delivery(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..700).await;
    for part in 0..45 {
        rig.pass(part % 2);
        let lease = LEASE + (part * 7919) % 1000;
        rig.pop(&q, Pop { lease: Some(lease), ..pop(10) }).await.unwrap();
    }
    rig.pass(50);
    assert_eq!(rig.take(&q, 50).await.len(), 50);
    assert_eq!(rig.held_released(&q, 50).await, 450);
    assert_eq!(rig.counted(&q).await, Counts { ready: 650, leased: 50, inserted: 700, acked: 0, ..Counts::default() });
    let first = rig.take_one(&q).await;
    assert_eq!((numbers(std::slice::from_ref(&first)), first.deliveries, first.expiries), (vec![0], 2, 1));
    assert_eq!(rig.drain(&q).await, (1..450).chain(500..700).collect::<Vec<_>>());
}

/// Nothing is held where nothing is, and no queue is made by asking.
pub(super) async fn nothing_is_held_in_an_unknown_queue(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    assert_eq!(rig.held_released(&q, 0).await, 0);
    assert_eq!(rig.count(&q).await, None);
}
