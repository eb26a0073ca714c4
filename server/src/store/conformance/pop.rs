//! Pops: what a delivery says, and where a batch ends.

use super::*;

/// A queue is made by its first insert, and by nothing else.
pub(super) async fn an_unknown_queue_is_empty_and_is_not_made(open: Open) {
    let (rig, q) = (open(RULES), queue("unknown"));
    for will_wait in [false, true] {
        let popped = rig.pop(&q, Pop { will_wait, ..attempt(5, "r", 1) }).await.unwrap();
        assert!(popped.tasks.is_empty() && popped.acks.is_empty());
        assert_eq!((popped.ready, popped.reclaimed, popped.due_in), (0, 0, None));
    }
    let token = Stem::mint().unwrap().token(0);
    assert_eq!(rig.ack_one(&q, token).await, Outcome::LeaseLost);
    assert_eq!(rig.beat_one(&q, token, LEASE).await, Outcome::LeaseLost);
    assert_eq!(rig.put_back(&q, &[token]).await, [Outcome::LeaseLost]);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap(), [crate::store::Sight::default()]);
    assert_eq!(rig.count(&q).await, None);
    rig.insert_numbers(&q, 0..1).await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
    // It stays known when it is empty.
    let leased = rig.take_one(&q).await;
    rig.ack_one(&q, leased.token).await;
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, acked: 1, ..Counts::default() });
}

/// G11: a pop takes what it asked for from the head, or less when there is less.
pub(super) async fn a_batch_has_at_most_max_tasks(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..350).await;
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready, popped.due_in), (vec![0], 349, None));
    let popped = rig.pop(&q, pop(200)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready), ((1..201).collect(), 149));
    let popped = rig.pop(&q, pop(200)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready), ((201..350).collect(), 0));
    let popped = rig.pop(&q, pop(200)).await.unwrap();
    assert_eq!((popped.tasks.len(), popped.ready, popped.due_in), (0, 0, Some(LEASE)));
}

/// A batch ends with the envelope that reaches the bytes, and is never empty for want of bytes.
pub(super) async fn a_batch_ends_at_max_bytes_but_has_one_task(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert(&q, insert((0..40).map(|_| task(vec![7; 100])).collect())).await.unwrap();
    for (max_bytes, expected) in [(1, 1), (99, 1), (100, 1), (101, 2), (200, 2), (201, 3), (1100, 11), (1801, 19)] {
        let popped = rig.pop(&q, Pop { max_bytes, ..pop(200) }).await.unwrap();
        assert_eq!(popped.tasks.len(), expected, "{max_bytes}");
    }
    assert_eq!(rig.counted(&q).await.ready, 0);
    rig.insert(&q, insert(vec![task(vec![7; 5000]), task("small")])).await.unwrap();
    assert_eq!(rig.pop(&q, Pop { max_bytes: 1, ..pop(200) }).await.unwrap().tasks[0].envelope.len(), 5000);
    assert_eq!(rig.take_one(&q).await.envelope, "small");
}

/// G4: a token names its pop and its place in the batch, so no two deliveries share one.
pub(super) async fn tokens_are_the_stem_and_the_position(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..400).await;
    let mut seen = std::collections::HashSet::new();
    for _ in 0..2 {
        let call = pop(200);
        let popped = rig.pop(&q, call.clone()).await.unwrap();
        let expected: Vec<Token> = (0..200).map(|position| call.stem.token(position)).collect();
        assert!(tokens(&popped.tasks) == expected);
        assert!(expected.into_iter().all(|token| seen.insert(token)));
    }
}

/// G6: the deadline that is told is the one that holds, and is now + lease by the store's clock.
pub(super) async fn a_delivery_tells_its_lease(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    for lease in [12 * 3_600_000, 1] {
        rig.pass(5);
        let popped = rig.pop(&q, Pop { lease: Some(lease), ..pop(1) }).await.unwrap();
        assert_eq!((popped.tasks[0].left, popped.tasks[0].expires_at), (lease, rig.now() + lease));
    }
    let empty = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((empty.tasks.len(), empty.due_in), (0, Some(1)));
}

/// G8: each way back to the queue leaves its mark and no other.
pub(super) async fn counters_tell_what_happened_to_a_task(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let seen = async || {
        let leased = rig.take_one(&q).await;
        ((leased.deliveries, leased.expiries), leased.token)
    };
    let (counters, token) = seen().await;
    assert_eq!(counters, (1, 0));
    rig.unsent(&q, &[token], None).await;
    let (counters, token) = seen().await;
    assert_eq!(counters, (1, 0), "unsent");
    rig.put_back(&q, &[token]).await;
    let (counters, _) = seen().await;
    assert_eq!(counters, (2, 0), "put back");
    rig.pass(LEASE);
    let (counters, _) = seen().await;
    assert_eq!(counters, (3, 1), "ran out");
    assert_eq!(rig.held_released(&q, 0).await, 1);
    let (counters, token) = seen().await;
    assert_eq!(counters, (4, 2), "held");
    rig.beat_one(&q, token, LEASE).await;
    rig.unsent(&q, &[token], None).await;
    let (counters, _) = seen().await;
    assert_eq!(counters, (4, 2), "unsent after others");
    // What the counters count is the task, not its queue.
    rig.insert_numbers(&q, 1..2).await;
    assert_eq!(seen().await.0, (1, 0), "another task");
}

/// G8: counters survive any number of put backs.
pub(super) async fn counters_survive_many_put_backs(open: Open) {
    let (rig, q) = (open(Rules { max_expiries: 1_000, ..RULES }), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    for delivery in 1..=150 {
        let leased = rig.take_one(&q).await;
        assert_eq!((leased.deliveries, leased.expiries), (delivery, (delivery - 1) / 2));
        if delivery % 2 == 0 {
            rig.pass(LEASE);
        } else {
            rig.put_back(&q, &[leased.token]).await;
        }
    }
}

/// G7: acks that ride with a pop are applied though there is nothing to pop, and answered in order.
pub(super) async fn acks_are_applied_even_if_nothing_is_found(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    let stranger = Stem::mint().unwrap().token(0);
    let acks = vec![held[1], stranger, held[0], held[1]];
    let popped = rig.pop(&q, Pop { acks, will_wait: true, ..pop(1) }).await.unwrap();
    assert_eq!(popped.acks, [Outcome::Applied, Outcome::LeaseLost, Outcome::Applied, Outcome::AlreadyAcked]);
    assert_eq!((popped.tasks.len(), popped.due_in), (0, None));
    assert_eq!(rig.counted(&q).await, Counts { inserted: 2, acked: 2, ..Counts::default() });
    let popped = rig.pop(&q, Pop { acks: held, ..pop(1) }).await.unwrap();
    assert_eq!(popped.acks, [Outcome::AlreadyAcked; 2]);
}

/// G7, G5: acks come first: one whose lease ran out is still good, and is not taken back by the pop that carries it.
pub(super) async fn acks_come_before_everything_else(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    rig.pass(LEASE);
    let popped = rig.pop(&q, Pop { acks: vec![held[0]], ..pop(5) }).await.unwrap();
    assert_eq!((popped.acks, popped.reclaimed), (vec![Outcome::Applied], 1));
    assert_eq!(numbers(&popped.tasks), [1]);
    // The other was taken back, so its old token is nothing now, and the new holder is not disturbed.
    let popped = rig.pop(&q, Pop { acks: vec![held[1]], ..pop(5) }).await.unwrap();
    assert_eq!((popped.acks, popped.tasks.len()), (vec![Outcome::LeaseLost], 0));
    assert_eq!(rig.counted(&q).await, Counts { ready: 0, leased: 1, inserted: 2, acked: 1, ..Counts::default() });
}
