//! Heartbeats: the holder moves its deadline, and nobody else does.

use super::*;

/// G6: the deadline becomes now + lease, unless it is later already.
pub(super) async fn a_heartbeat_extends_and_never_shortens(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let leased = rig.take_one(&q).await;
    rig.pass(10_000);
    let beat = async |lease| rig.heartbeat(&q, &[leased.token], Some(lease)).await.unwrap();
    let answer = beat(1_000).await;
    assert_eq!((answer.outcomes, answer.earliest), (vec![Outcome::Applied], Some((20_000, leased.expires_at))));
    let answer = beat(20_001).await;
    assert_eq!(answer.earliest, Some((20_001, leased.expires_at + 1)));
    let answer = beat(5).await;
    assert_eq!(answer.earliest, Some((20_001, leased.expires_at + 1)));
    rig.set_now(leased.expires_at);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].due_in, Some(1));
    rig.pass(1);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].reclaimed, 1);
    // The heartbeats left no mark on the task.
    let again = rig.take_one(&q).await;
    assert_eq!((again.deliveries, again.expiries), (2, 1));
}

/// G5: after its deadline a lease can still be extended, until its task was taken back.
pub(super) async fn an_expired_lease_can_be_extended_until_it_is_taken_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    rig.pass(3 * LEASE);
    let answer = rig.heartbeat(&q, &held[..1], Some(LEASE)).await.unwrap();
    assert_eq!((answer.outcomes, answer.earliest), (vec![Outcome::Applied], Some((LEASE, rig.now() + LEASE))));
    let popped = rig.pop(&q, pop(5)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed), (vec![1], 1));
    assert_eq!(rig.heartbeat(&q, &held, Some(LEASE)).await.unwrap().outcomes, [Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(rig.ack_one(&q, held[0]).await, Outcome::Applied);
}

/// G5: whoever lost the lease, or ended it, is told so and moves nothing.
pub(super) async fn a_heartbeat_needs_the_current_token(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let held = tokens(&rig.take(&q, 4).await);
    rig.ack_one(&q, held[0]).await;
    rig.put_back(&q, &[held[1]]).await;
    rig.pass(LEASE - 1);
    rig.beat_one(&q, held[3], LEASE).await;
    rig.pass(1);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].reclaimed, 1);
    let answer = rig.heartbeat(&q, &held[..3], Some(LEASE)).await.unwrap();
    assert_eq!(answer.outcomes, [Outcome::AlreadyAcked, Outcome::LeaseLost, Outcome::LeaseLost]);
    assert_eq!(answer.earliest, None);
    let counts = rig.counted(&q).await;
    assert_eq!(counts, Counts { ready: 2, leased: 1, inserted: 4, acked: 1, ..Counts::default() });
    // The tasks that were lost have other holders now, whose deadlines the old tokens do not move.
    let again = rig.take(&q, 2).await;
    assert_eq!(rig.heartbeat(&q, &held[1..3], Some(9 * LEASE)).await.unwrap().outcomes, [Outcome::LeaseLost; 2]);
    rig.pass(LEASE);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].reclaimed, 3);
    assert_eq!(again.len(), 2);
}

/// The answer's lease is the earliest of those extended, so that a client that beats in time for it is in time for all.
pub(super) async fn the_answer_tells_the_lease_that_ends_first(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let mut held = Vec::new();
    for lease in [60_000, 40_000, 5_000] {
        held.extend(tokens(&rig.pop(&q, Pop { lease: Some(lease), ..pop(1) }).await.unwrap().tasks));
    }
    let now = rig.now();
    let earliest = async |tokens: &[Token], lease| rig.heartbeat(&q, tokens, Some(lease)).await.unwrap().earliest;
    assert_eq!(earliest(&held[..2], 1).await, Some((40_000, now + 40_000)));
    assert_eq!(earliest(&held, 10_000).await, Some((10_000, now + 10_000)));
    assert_eq!(earliest(&held, 50_000).await, Some((50_000, now + 50_000)));
    // One that is not extended does not matter.
    assert_eq!(earliest(&[Token([0; 16]), held[0]], 1).await, Some((60_000, now + 60_000)));
    assert_eq!(earliest(&[], 1).await, None);
}

/// G5: a token twice in one call is the same lease twice.
pub(super) async fn a_token_twice_in_one_call_is_extended_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    let answer = rig.heartbeat(&q, &[held[0], held[1], held[0], Token([1; 16])], Some(2 * LEASE)).await.unwrap();
    assert_eq!(answer.outcomes, [Outcome::Applied, Outcome::Applied, Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(answer.earliest, Some((2 * LEASE, rig.now() + 2 * LEASE)));
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 2, ..Counts::default() });
}

/// G5: the outcomes of a large call are in the order of its tokens, and its earliest lease is of all of them.
pub(super) async fn hundreds_are_extended_in_one_call(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..500).await;
    let mut all = Vec::new();
    for part in 0..5 {
        let lease = if part == 3 { LEASE } else { 4 * LEASE };
        all.extend(tokens(&rig.pop(&q, Pop { lease: Some(lease), ..pop(100) }).await.unwrap().tasks));
    }
    all[450] = Token([9; 16]);
    let answer = rig.heartbeat(&q, &all, Some(2 * LEASE)).await.unwrap();
    assert_eq!(answer.earliest, Some((2 * LEASE, rig.now() + 2 * LEASE)));
    let lost: Vec<usize> = (0..500).filter(|at| answer.outcomes[*at] != Outcome::Applied).collect();
    assert_eq!((answer.outcomes.len(), lost), (500, vec![450]));
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await.leased, 500);
}
