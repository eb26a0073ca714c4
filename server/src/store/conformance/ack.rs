//! Acks: final, fenced and repeatable.

use super::*;

/// G7: an acked task never comes back, and an ack that is sent again says that it was done.
pub(super) async fn an_ack_is_final_and_can_be_repeated(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let token = rig.take_one(&q).await.token;
    assert_eq!(rig.ack_one(&q, token).await, Outcome::Applied);
    for _ in 0..2 {
        assert_eq!(rig.ack_one(&q, token).await, Outcome::AlreadyAcked);
        assert_eq!(rig.beat_one(&q, token, LEASE).await, Outcome::AlreadyAcked);
        assert_eq!(rig.put_back(&q, &[token]).await, [Outcome::AlreadyAcked]);
        assert_eq!(rig.unsent(&q, &[token], None).await, [Outcome::AlreadyAcked]);
        assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 0, inserted: 2, acked: 1, ..Counts::default() });
        rig.pass(LEASE);
    }
    assert_eq!(rig.held_released(&q, 0).await, 0);
    assert_eq!(rig.drain(&q).await, [1]);
}

/// G5, G7: tokens of one pop that follow each other are acked together, however those parts lie.
pub(super) async fn parts_of_a_batch_are_acked_one_after_the_other(open: Open) {
    use Outcome::{AlreadyAcked, Applied, LeaseLost};
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..10).await;
    let call = pop(10);
    let held = tokens(&rig.pop(&q, call.clone()).await.unwrap().tasks);
    let behind = call.stem.token(10);
    assert_eq!(rig.ack(&q, &held[2..5]).await.unwrap(), [Applied; 3]);
    assert_eq!(rig.ack(&q, &held[3..7]).await.unwrap(), [AlreadyAcked, AlreadyAcked, Applied, Applied]);
    assert_eq!(rig.put_back(&q, &held[..1]).await, [Applied]);
    assert_eq!(rig.ack(&q, &held[..2]).await.unwrap(), [LeaseLost, Applied]);
    assert_eq!(rig.ack(&q, &[held[8], held[9], behind]).await.unwrap(), [Applied, Applied, LeaseLost]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 1, inserted: 10, acked: 8, ..Counts::default() });
    assert_eq!(rig.ack(&q, &held[7..8]).await.unwrap(), [Applied]);
    let mut again = [AlreadyAcked; 10];
    again[0] = LeaseLost;
    assert_eq!(rig.ack(&q, &held).await.unwrap(), again);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 0, inserted: 10, acked: 9, ..Counts::default() });
}

/// G14: a token twice in one call ends one task.
pub(super) async fn a_token_twice_in_one_call_is_acked_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.take(&q, 3).await);
    let outcomes = rig.ack(&q, &[held[0], held[2], held[0], held[0]]).await.unwrap();
    assert_eq!(outcomes, [Outcome::Applied, Outcome::Applied, Outcome::AlreadyAcked, Outcome::AlreadyAcked]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 0, leased: 1, inserted: 3, acked: 2, ..Counts::default() });
    assert_eq!(rig.ack(&q, &[]).await.unwrap(), []);
    // However they were popped, and in whatever order they are named.
    rig.insert_numbers(&q, 3..5).await;
    let (one, two) = (rig.take_one(&q).await.token, rig.take_one(&q).await.token);
    let outcomes = rig.ack(&q, &[one, two, one, one, held[1], two]).await.unwrap();
    use Outcome::{AlreadyAcked, Applied};
    assert_eq!(outcomes, [Applied, Applied, AlreadyAcked, AlreadyAcked, Applied, AlreadyAcked]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 0, leased: 0, inserted: 5, acked: 5, ..Counts::default() });
}

/// G5, G12: a token that this queue did not give for the delivery under way does nothing, and says so.
pub(super) async fn a_token_that_is_not_held_changes_nothing(open: Open) {
    let (rig, q, other) = (open(RULES), queue("q"), queue("other"));
    rig.insert_numbers(&q, 0..2).await;
    rig.insert_numbers(&other, 0..2).await;
    let call = pop(1);
    let mine = rig.pop(&q, call.clone()).await.unwrap().tasks[0].token;
    let others = rig.take_one(&other).await.token;
    let (mut last_bit, mut first_bit) = (mine, mine);
    last_bit.0[15] ^= 1;
    first_bit.0[0] ^= 0x80;
    let strangers = [
        Token([0; 16]),
        Token([0xff; 16]),
        Stem::mint().unwrap().token(0),
        call.stem.token(1),
        call.stem.token(u16::MAX),
        last_bit,
        first_bit,
        others,
    ];
    let lost = vec![Outcome::LeaseLost; strangers.len()];
    assert_eq!(rig.ack(&q, &strangers).await.unwrap(), lost);
    assert_eq!(rig.heartbeat(&q, &strangers, Some(LEASE)).await.unwrap().outcomes, lost);
    assert_eq!(rig.put_back(&q, &strangers).await, lost);
    assert_eq!(rig.unsent(&q, &strangers, None).await, lost);
    for each in [&q, &other] {
        assert_eq!(rig.counted(each).await, Counts { ready: 1, leased: 1, inserted: 2, acked: 0, ..Counts::default() });
    }
    // Among strangers, the one that is held is still found.
    assert_eq!(rig.ack(&q, &[strangers[0], mine, others]).await.unwrap()[1], Outcome::Applied);
    assert_eq!(rig.ack_one(&other, others).await, Outcome::Applied);
}

/// G5, G6: nothing but the taking back of its task ends a lease; then it is lost, though nobody else has the task.
pub(super) async fn after_the_deadline_a_token_is_good_until_its_task_is_taken_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.take(&q, 2).await);
    rig.pass(10 * LEASE);
    assert_eq!(rig.ack_one(&q, held[0]).await, Outcome::Applied);
    assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].reclaimed, 1);
    assert_eq!(rig.ack_one(&q, held[1]).await, Outcome::LeaseLost);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 0, inserted: 2, acked: 1, ..Counts::default() });
    // Nor does the old token end the next delivery.
    let again = rig.take_one(&q).await;
    assert_eq!((again.deliveries, again.expiries), (2, 1));
    assert_eq!(rig.ack_one(&q, held[1]).await, Outcome::LeaseLost);
    assert_eq!(rig.ack_one(&q, again.token).await, Outcome::Applied);
}

/// G7: an acked token is remembered for the window at least, and for twice the window at most; then it is as if never seen.
pub(super) async fn acks_are_remembered_for_the_window_and_forgotten_after_two(open: Open) {
    let window = 1000;
    let (rig, q) = (open(remembering(Remember { window, ..RULES.remember })), queue("q"));
    rig.insert_numbers(&q, 0..13).await;
    let held = tokens(&rig.take(&q, 13).await);
    let times = [0, 1, 999, 1000, 1001, 1500, 1999, 2000, 2500, 2999, 3000, 3500, 4000];
    for (token, at) in held.iter().zip(times) {
        rig.set_now(START + at);
        assert_eq!(rig.ack_one(&q, *token).await, Outcome::Applied, "{at}");
    }
    for (token, at) in held.iter().zip(times) {
        let outcome = rig.ack_one(&q, *token).await;
        if at >= 3000 {
            assert_eq!(outcome, Outcome::AlreadyAcked, "{at}");
        } else if at <= 2000 {
            assert_eq!(outcome, Outcome::LeaseLost, "{at}");
        }
    }
    rig.pass(window);
    assert_eq!(rig.ack_one(&q, held[12]).await, Outcome::AlreadyAcked);
    rig.pass(window);
    assert_eq!(rig.ack_one(&q, held[12]).await, Outcome::LeaseLost);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 13, acked: 13, ..Counts::default() });
}

/// G7: of more acked tokens than are to be remembered, the older ones go; the newest half stays.
pub(super) async fn the_newest_half_of_the_acks_is_remembered(open: Open) {
    let (rig, q) = (open(remembering(Remember { entries: 10, ..RULES.remember })), queue("q"));
    rig.insert_numbers(&q, 0..100).await;
    let held = tokens(&rig.take(&q, 100).await);
    for token in &held {
        rig.ack_one(&q, *token).await;
    }
    assert_eq!(rig.ack(&q, &held[95..]).await.unwrap(), [Outcome::AlreadyAcked; 5]);
    assert_eq!(rig.ack(&q, &held[..90]).await.unwrap(), [Outcome::LeaseLost; 90]);
}

/// G5: the outcomes of a large call are in the order of its tokens.
pub(super) async fn hundreds_are_acked_in_one_call(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1000).await;
    let mut all = Vec::new();
    let mut expected = Vec::new();
    for _ in 0..5 {
        all.extend(tokens(&rig.take(&q, 200).await));
    }
    all.truncate(998);
    for (at, token) in all.iter_mut().enumerate() {
        expected.push(if at % 7 == 3 { Outcome::LeaseLost } else { Outcome::Applied });
        if at % 7 == 3 {
            *token = Stem::mint().unwrap().token(0);
        }
    }
    all.push(all[0]);
    expected.push(Outcome::AlreadyAcked);
    let acked = expected.iter().filter(|outcome| **outcome == Outcome::Applied).count() as u64;
    assert_eq!(rig.ack(&q, &all).await.unwrap(), expected);
    assert_eq!(
        rig.counted(&q).await,
        Counts { ready: 0, leased: 1000 - acked, inserted: 1000, acked, ..Counts::default() }
    );
}
