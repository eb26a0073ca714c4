//! Leases that run out: not early, and back in order.

use super::*;
use crate::store::{RECLAIM_STEP, Sight};

/// G6: up to its deadline a lease holds, whoever looks; with it, the task is ready.
pub(super) async fn nothing_is_taken_back_before_its_deadline(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let leased = rig.take_one(&q).await;
    rig.set_now(leased.expires_at - 1);
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((popped.tasks.len(), popped.reclaimed, popped.due_in), (0, 0, Some(1)));
    let sight = rig.look(std::slice::from_ref(&q)).await.unwrap();
    assert_eq!(sight, [Sight { ready: 0, due_in: Some(1), reclaimed: 0 }]);
    assert_eq!(rig.counted(&q).await.leased, 1);
    assert!(rig.reap(Default::default(), 1000).await.unwrap().reclaimed.is_empty());
    rig.pass(1);
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed), (vec![0], 1));
    assert_eq!((popped.tasks[0].deliveries, popped.tasks[0].expiries), (2, 1));
    assert!(popped.tasks[0].token != leased.token);
}

/// G6: an extended lease is not taken back at its old deadline.
pub(super) async fn a_heartbeat_puts_the_taking_back_off(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = rig.take(&q, 2).await;
    rig.pass(LEASE - 1);
    rig.beat_one(&q, held[0].token, LEASE).await;
    rig.pass(1);
    let popped = rig.pop(&q, pop(5)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed), (vec![1], 1));
    rig.pass(LEASE - 2);
    assert_eq!(rig.pop(&q, pop(5)).await.unwrap().due_in, Some(1));
    rig.pass(1);
    assert_eq!(numbers(&rig.take(&q, 5).await), [0]);
}

/// G11: what runs out together is at the head in the order of its delivery, whatever its deadlines.
pub(super) async fn what_ran_out_is_at_the_head_in_the_order_of_delivery(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..8).await;
    for lease in [500, 300, 400, 9 * LEASE, 100, 200] {
        rig.pop(&q, Pop { lease: Some(lease), ..pop(1) }).await.unwrap();
        rig.pass(1);
    }
    rig.pass(1000);
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed, popped.ready), (vec![0], 5, 6));
    assert_eq!(rig.drain(&q).await, [1, 2, 4, 5, 6, 7]);
}

async fn lease_hundreds(rig: &Rig, q: &QueueName, between: Millis) {
    rig.insert_numbers(q, 0..455).await;
    for _ in 0..30 {
        assert_eq!(rig.take(q, 15).await.len(), 15);
        rig.pass(between);
    }
}

async fn hundreds_come_back_in_order(rig: &Rig, q: &QueueName) {
    let popped = rig.pop(q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed, popped.ready), (vec![0], 450, 454));
    assert_eq!((popped.tasks[0].deliveries, popped.tasks[0].expiries), (2, 1));
    assert_eq!(rig.counted(q).await, Counts { ready: 454, leased: 1, inserted: 455, acked: 0, ..Counts::default() });
    assert_eq!(rig.drain(q).await, (1..455).collect::<Vec<_>>());
}

/// G11, G15: more leases than one step takes back run out: the next pop gets what was delivered first, the others follow.
pub(super) async fn hundreds_that_ran_out_come_back_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    lease_hundreds(&rig, &q, 1).await;
    rig.pass(LEASE);
    hundreds_come_back_in_order(&rig, &q).await;
}

/// G11: also when the same millisecond is the deadline of all, as after one large batch or one heartbeat for all.
pub(super) async fn hundreds_that_run_out_in_the_same_instant_come_back_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    lease_hundreds(&rig, &q, 0).await;
    rig.pass(LEASE);
    hundreds_come_back_in_order(&rig, &q).await;
}

/// Of more leases than one step takes back, those with the latest deadlines go back first, so that the others end in front.
pub(super) async fn of_many_that_ran_out_the_latest_deadlines_go_back_first(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    const MANY: usize = 450;
    rig.insert_numbers(&q, 0..MANY).await;
    let mut left = Vec::new();
    for number in 0..MANY {
        let lease = 1000 + (number as u64 * 7919) % 449;
        rig.pop(&q, Pop { lease: Some(lease), ..pop(1) }).await.unwrap();
        left.push((lease, number));
    }
    rig.pass(2000);
    left.sort_unstable();
    let mut expected = Vec::new();
    while !left.is_empty() {
        let mut step: Vec<usize> =
            left.split_off(left.len().saturating_sub(RECLAIM_STEP)).into_iter().map(|(_, number)| number).collect();
        step.sort_unstable();
        expected.splice(0..0, step);
    }
    assert_eq!(rig.drain(&q).await, expected);
}

/// G15: a look takes back what ran out, and tells when to look again.
pub(super) async fn a_look_takes_back_and_tells(open: Open) {
    let (rig, one, two) = (open(RULES), queue("one"), queue("two"));
    let look = async || rig.look(&[two.clone(), queue("unknown"), one.clone()]).await.unwrap();
    rig.insert_numbers(&one, 0..3).await;
    rig.insert_numbers(&two, 0..2).await;
    for lease in [1000, 400] {
        rig.pop(&one, Pop { lease: Some(lease), ..pop(1) }).await.unwrap();
    }
    let nothing = Sight::default();
    assert_eq!(
        look().await,
        [Sight { ready: 2, ..nothing }, nothing, Sight { ready: 1, due_in: Some(400), reclaimed: 0 }]
    );
    rig.pass(999);
    assert_eq!(look().await[2], Sight { ready: 2, due_in: Some(1), reclaimed: 1 });
    rig.pass(1);
    assert_eq!(look().await[2], Sight { ready: 3, due_in: None, reclaimed: 1 });
    assert_eq!(look().await[2], Sight { ready: 3, ..nothing });
    assert_eq!(rig.look(&[]).await.unwrap(), []);
    // However many ran out, looking again and again takes all of them back.
    let many = queue("many");
    lease_hundreds(&rig, &many, 1).await;
    rig.pass(LEASE);
    let mut reclaimed = 0;
    while reclaimed < 450 {
        let sight = rig.look(std::slice::from_ref(&many)).await.unwrap()[0];
        assert!(sight.reclaimed > 0, "after {reclaimed}");
        reclaimed += sight.reclaimed;
        assert_eq!(sight.ready, 5 + reclaimed);
    }
    assert_eq!(rig.drain(&many).await, (0..455).collect::<Vec<_>>());
}

/// G14: counts are of the moment, so what ran out is taken back before it is counted.
pub(super) async fn counting_takes_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    lease_hundreds(&rig, &q, 0).await;
    rig.pass(LEASE - 1);
    assert_eq!(rig.counted(&q).await, Counts { ready: 5, leased: 450, inserted: 455, acked: 0, ..Counts::default() });
    rig.pass(1);
    assert_eq!(rig.counted(&q).await, Counts { ready: 455, leased: 0, inserted: 455, acked: 0, ..Counts::default() });
}
