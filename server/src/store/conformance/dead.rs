//! Dead letters: tasks whose leases ran out once too often.

use super::{reap::round, *};
use crate::store::Sight;

const MAX: u32 = 3;

const MORTAL: Rules = Rules { max_expiries: MAX, ..RULES };

/// Pops and lets run out, so often.
async fn expire(rig: &Rig, q: &QueueName, max_tasks: usize, times: u32) {
    for _ in 0..times {
        rig.take(q, max_tasks).await;
        rig.pass(LEASE);
    }
    rig.counted(q).await;
}

/// Leases run out so often as is allowed, and once more: not earlier, and whatever became of it before, the task is then
/// kept, counted, and never delivered again.
pub(super) async fn the_last_expiry_makes_a_dead_letter(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    for expired in 0..MAX {
        let popped = rig.pop(&q, pop(1)).await.unwrap();
        assert_eq!(numbers(&popped.tasks), [0]);
        let task = &popped.tasks[0];
        assert_eq!((task.deliveries, task.expiries, popped.reclaimed), (expired + 1, expired, u64::from(expired > 0)));
        rig.pass(LEASE - 1);
        assert_eq!(rig.counted(&q).await.dead, 0);
        rig.pass(1);
    }
    let popped = rig.pop(&q, pop(5)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed, popped.ready), (vec![1], 0, 0));
    let counts = Counts { leased: 1, dead: 1, inserted: 2, ..Counts::default() };
    assert_eq!(rig.counted(&q).await, counts);
    rig.ack_one(&q, popped.tasks[0].token).await;
    rig.pass(100 * LEASE);
    assert_eq!(rig.pop(&q, pop(5)).await.unwrap().due_in, None);
    assert_eq!(rig.held_released(&q, 0).await, 0);
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 2, acked: 1, ..Counts::default() });
    assert_eq!(rig.count(&q).await.unwrap().oldest_ready, None);
}

/// A look, a count and the reaper give up as a pop does, and tell only of what went back.
pub(super) async fn whatever_takes_back_makes_dead_letters(open: Open) {
    let rig = open(MORTAL);
    let [looked, counted, reaped] = ["looked", "counted", "reaped"].map(queue);
    for q in [&looked, &counted, &reaped] {
        rig.insert_numbers(q, 0..1).await;
        expire(&rig, q, 1, MAX - 1).await;
        rig.insert_numbers(q, 1..2).await;
        assert_eq!(rig.take(q, 2).await.len(), 2);
    }
    rig.pass(LEASE);
    let sight = rig.look(std::slice::from_ref(&looked)).await.unwrap();
    assert_eq!(sight, [Sight { ready: 1, due_in: None, reclaimed: 1 }]);
    let one_each = Counts { ready: 1, dead: 1, inserted: 2, ..Counts::default() };
    assert_eq!(rig.counted(&counted).await, one_each);
    assert_eq!(round(&rig, 10).await.1, [(reaped.clone(), 1)].into());
    for q in [&looked, &counted, &reaped] {
        assert_eq!(rig.counted(q).await, one_each);
        assert_eq!(rig.drain(q).await, [1]);
    }
    // Where all of it died, nothing went back.
    rig.pass(LEASE);
    expire(&rig, &looked, 1, MAX - 2).await;
    assert_eq!(rig.counted(&looked).await.dead, 2);
    rig.pass(LEASE);
    assert_eq!(round(&rig, 10).await.1.get(&looked), None);
}

/// Being held too long counts as the others do: the answer says what went back and what died.
pub(super) async fn what_was_held_too_often_is_dead(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    for _ in 1..MAX {
        rig.take(&q, 2).await;
        assert_eq!(rig.release_held(&q, 0).await.unwrap(), Released { put_back: 2, ready: 2, dead_lettered: 0 });
    }
    rig.insert_numbers(&q, 2..4).await;
    rig.take(&q, 3).await;
    rig.pass(10);
    rig.take(&q, 1).await;
    assert_eq!(rig.release_held(&q, 10).await.unwrap(), Released { put_back: 1, ready: 1, dead_lettered: 2 });
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 1, dead: 2, inserted: 4, ..Counts::default() });
    let again = rig.take_one(&q).await;
    assert_eq!((numbers(std::slice::from_ref(&again)), again.expiries), (vec![2], 1));
}

/// A holder who gives back, and a delivery that was never sent, are no expiries, however often.
pub(super) async fn what_is_given_back_never_dies(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    expire(&rig, &q, 1, MAX - 1).await;
    for times in 0..2 * MAX {
        let held = rig.take_one(&q).await;
        assert_eq!((held.deliveries, held.expiries), (MAX + times, MAX - 1));
        assert_eq!(rig.put_back(&q, &[held.token]).await, [Outcome::Applied]);
        let held = rig.take_one(&q).await;
        assert_eq!(rig.unsent(&q, &[held.token], None).await, [Outcome::Applied]);
        let lost = pop(1);
        assert_eq!(rig.pop(&q, lost.clone()).await.unwrap().tasks.len(), 1);
        let withdrawal = Withdrawal { stem: lost.stem, max_tasks: 1, request: None };
        assert_eq!(rig.withdraw(&q, withdrawal).await.unwrap(), 1);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
    expire(&rig, &q, 1, 1).await;
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 1, ..Counts::default() });
}

/// G5: nobody holds a dead letter, so that nothing is done to it with a token, and its request finds nothing of it.
pub(super) async fn the_token_of_a_dead_task_is_lost(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    let first = rig.insert_repeatably(&q, 0..1, "i").await;
    expire(&rig, &q, 1, MAX - 1).await;
    let held = rig.pop(&q, attempt(1, "r", 1)).await.unwrap().tasks[0].token;
    rig.pass(LEASE);
    assert_eq!(rig.beat_one(&q, held, LEASE).await, Outcome::Applied, "until it is taken back");
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await.dead, 1);
    assert_eq!(rig.beat_one(&q, held, LEASE).await, Outcome::LeaseLost);
    assert_eq!(rig.put_back(&q, &[held]).await, [Outcome::LeaseLost]);
    assert_eq!(rig.unsent(&q, &[held], Some(name_of_attempt(1))).await, [Outcome::LeaseLost]);
    assert_eq!(rig.ack_one(&q, held).await, Outcome::LeaseLost);
    assert_eq!(rig.pop(&q, attempt(1, "r", 2)).await.unwrap().tasks, []);
    // G3: it was inserted, and a repetition does not do it again.
    assert_eq!(rig.insert_repeatably(&q, 0..1, "i").await, Inserted { replayed: true, ..first.clone() });
    let second_run = insert(vec![NewTask::new(first.ids[0], "0".into(), None)]);
    rig.insert(&q, second_run).await.unwrap();
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 1, ..Counts::default() });
}

/// The smallest limit.
pub(super) async fn one_expiry_may_be_enough(open: Open) {
    let (rig, q) = (open(Rules { max_expiries: 1, ..RULES }), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = rig.take(&q, 2).await;
    rig.beat_one(&q, held[1].token, 2 * LEASE).await;
    rig.pass(LEASE);
    assert_eq!(numbers(&rig.take(&q, 5).await), [2]);
    assert_eq!(rig.release_held(&q, 0).await.unwrap(), Released { put_back: 0, ready: 0, dead_lettered: 2 });
    assert_eq!(rig.counted(&q).await, Counts { dead: 3, inserted: 3, ..Counts::default() });
}

/// G11, G14: of more than one step takes back, every third dies, in whichever way; the others keep their order.
pub(super) async fn hundreds_die_and_the_others_keep_their_order(open: Open) {
    const MANY: usize = 450;
    let rig = open(Rules { max_expiries: 2, ..RULES });
    for by_age in [true, false] {
        let q = queue(if by_age { "held" } else { "expired" });
        rig.insert_numbers(&q, 0..MANY).await;
        let mut held = Vec::new();
        for _ in 0..MANY / 150 {
            held.extend(rig.take(&q, 150).await);
        }
        let dies = |task: &Leased| numbers(std::slice::from_ref(task))[0].is_multiple_of(3);
        let others: Vec<Token> = held.iter().filter(|task| !dies(task)).map(|task| task.token).collect();
        assert_eq!(rig.put_back(&q, &others).await.len(), MANY / 3 * 2);
        rig.pass(LEASE);
        assert_eq!(rig.counted(&q).await.ready, MANY as u64);
        for _ in 0..MANY / 150 {
            assert_eq!(rig.take(&q, 150).await.len(), 150);
        }
        if by_age {
            let released = rig.release_held(&q, 0).await.unwrap();
            assert_eq!(released, Released { put_back: 300, ready: 300, dead_lettered: 150 });
        } else {
            rig.pass(LEASE);
            let popped = rig.pop(&q, Pop { max_bytes: 1, ..pop(1) }).await.unwrap();
            assert_eq!(popped.reclaimed, 300);
            rig.unsent(&q, &tokens(&popped.tasks), None).await;
        }
        assert_eq!(rig.counted(&q).await, Counts { ready: 300, dead: 150, inserted: 450, ..Counts::default() });
        let left = rig.drain(&q).await;
        assert_eq!(left, (0..MANY).filter(|number| number % 3 > 0).collect::<Vec<_>>());
    }
}
