//! Tasks whose time ends.

use super::{reap::round, *};
use crate::store::ReapCursor;

/// G14: to the millisecond, counted from the insert; what is gone is counted and never delivered.
pub(super) async fn a_ready_task_is_gone_when_its_time_is_over(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![with_ttl(0, 100), with_ttl(1, 101), task("2")]).await;
    rig.pass(99);
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
    rig.pass(1);
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready, popped.reclaimed), (vec![1], 1, 0));
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 1, inserted: 3, expired: 1, ..Counts::default() });
    rig.pass(10 * LEASE);
    assert_eq!(rig.drain(&q).await, [2]);
}

/// G10, G14: what would fall due when its time is over, or later, never does.
pub(super) async fn a_scheduled_task_is_gone_when_its_time_is_over(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![after(100, with_ttl(0, 99)), after(100, with_ttl(1, 100)), after(100, with_ttl(2, 101))])
        .await;
    rig.pass(99);
    assert_eq!(rig.counted(&q).await, Counts { scheduled: 2, inserted: 3, expired: 1, ..Counts::default() });
    rig.pass(1);
    assert_eq!(rig.look_one(&q).await, Sight { ready: 1, due_in: None, reclaimed: 1 });
    assert_eq!(rig.drain(&q).await, [2]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 3, expired: 2, ..Counts::default() });
}

/// G10, G14: also where nobody looked until long after both.
pub(super) async fn what_fell_due_and_ended_meanwhile_is_never_delivered(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![after(10, with_ttl(0, 20)), after(10, task("1"))]).await;
    rig.pass(100);
    let popped = rig.pop(&q, pop(5)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.reclaimed), (vec![1], 1));
    assert_eq!(rig.counted(&q).await.expired, 1);
}

/// G5, G6: whoever holds it when its time is over goes on as if nothing were.
pub(super) async fn a_leased_task_may_be_finished(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![with_ttl(0, 100)]).await;
    let held = rig.pop(&q, attempt(1, "r", 1)).await.unwrap().tasks;
    rig.pass(LEASE - 1);
    assert_eq!(rig.counted(&q).await.leased, 1);
    assert_eq!(rig.pop(&q, attempt(1, "r", 2)).await.unwrap().tasks[0].token, held[0].token);
    assert_eq!(rig.beat_one(&q, held[0].token, LEASE).await, Outcome::Applied);
    rig.pass(LEASE - 1);
    assert_eq!(rig.ack_one(&q, held[0].token).await, Outcome::Applied);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, acked: 1, ..Counts::default() });
}

/// G14: however a lease ends, a task whose time is over meanwhile does not go back.
pub(super) async fn what_would_go_back_when_its_time_is_over_is_gone(open: Open) {
    let rig = open(RULES);
    let ways = ["put back", "delayed", "failed", "unsent", "held", "ran out"];
    for (way, name) in ways.into_iter().zip(["a", "b", "c", "d", "e", "f"]) {
        let q = queue(name);
        rig.insert_new(&q, vec![with_ttl(0, 100), with_ttl(1, 100 + 2 * LEASE)]).await;
        let held = tokens(&rig.take(&q, 2).await);
        rig.pass(100);
        let one = Released { put_back: 1, ready: 1, dead_lettered: 0 };
        match way {
            "put back" => assert_eq!(rig.give_back(&q, back(&held)).await, one),
            "delayed" => {
                let released = rig.give_back(&q, PutBack { delay: Some(7), ..back(&held) }).await;
                assert_eq!(released, Released { ready: 0, ..one });
            }
            "failed" => {
                assert_eq!(rig.give_back(&q, failed(&held, "e")).await, Released { ready: 0, ..one });
            }
            "unsent" => assert_eq!(rig.unsent(&q, &held, None).await, [Outcome::Applied; 2]),
            "held" => assert_eq!(rig.release_held(&q, 0).await.unwrap(), one),
            _ => {
                rig.pass(LEASE - 100);
                assert_eq!(rig.look_one(&q).await, Sight { ready: 1, due_in: None, reclaimed: 1 });
            }
        }
        let counts = rig.counted(&q).await;
        assert_eq!((counts.expired, counts.ready + counts.scheduled), (1, 1), "{way}: {counts:?}");
        rig.pass(2 * RULES.backoff.min);
        assert_eq!(rig.drain(&q).await, [1], "{way}");
    }
}

/// G14: going back gives a task no more time than it had.
pub(super) async fn what_was_put_back_ends_when_it_would_have_ended(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_new(&q, vec![with_ttl(0, 100)]).await[0];
    rig.pass(60);
    let held = rig.take_one(&q).await.token;
    rig.put_back(&q, &[held]).await;
    rig.pass(39);
    let seen = rig.seen(&q, id).await.unwrap();
    assert_eq!((seen.ends_at, seen.state), (Some(START + 100), State::Ready));
    rig.pass(1);
    assert_eq!(rig.seen(&q, id).await, None);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, expired: 1, ..Counts::default() });
}

/// G10, G14: of more than one step drops, none comes out, be they ready, scheduled or leased.
pub(super) async fn hundreds_that_end_at_once_are_never_delivered(open: Open) {
    let rig = open(RULES);
    let [ready, scheduled, leased] = ["ready", "scheduled", "leased"].map(queue);
    let some = |delay| {
        (0..455).map(move |at| after(delay, if at % 91 == 90 { task(at.to_string()) } else { with_ttl(at, 100) }))
    };
    for (q, delay) in [(&ready, 0), (&scheduled, 50), (&leased, 0)] {
        rig.insert_new(q, some(delay).collect()).await;
    }
    for _ in 0..5 {
        assert_eq!(rig.pop(&leased, Pop { lease: Some(100), ..pop(91) }).await.unwrap().tasks.len(), 91);
    }
    rig.pass(100);
    for q in [&ready, &scheduled, &leased] {
        assert_eq!(rig.drain(q).await, [90, 181, 272, 363, 454], "{q:?}");
        assert_eq!(rig.counted(q).await, Counts { leased: 5, inserted: 455, expired: 450, ..Counts::default() });
    }
}

/// The same of more than a pop waits for: it may find nothing then, but never one of them; and one step of the reaper goes on with it.
pub(super) async fn thousands_that_end_at_once_are_never_delivered(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    for thousand in 0..28 {
        rig.insert_new(&q, (0..1_000).map(|at| with_ttl(1_000 * thousand + at, 100)).collect()).await;
    }
    rig.insert_numbers(&q, 0..1).await;
    rig.pass(100);
    let mut taken = Vec::new();
    while taken.is_empty() {
        taken = numbers(&rig.take(&q, 5).await);
        assert!(taken.is_empty() || taken == [0], "{taken:?}");
        rig.reap(ReapCursor::default(), 10).await.unwrap();
    }
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 28_001, expired: 28_000, ..Counts::default() });
}

/// G14: where nobody pops, the reaper drops them, and tells of nothing that went back.
pub(super) async fn the_reaper_drops_what_ended(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![with_ttl(0, 100), after(1_000, with_ttl(1, 100))]).await;
    rig.pass(100);
    assert_eq!(round(&rig, 10).await.1, [].into());
    assert_eq!(rig.counted(&q).await, Counts { inserted: 2, expired: 2, ..Counts::default() });
}

/// G1, G14: a dead letter is kept, whatever its time, for as long as the queue is set to keep it.
pub(super) async fn dead_letters_are_gone_when_they_were_kept_long_enough(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![with_ttl(0, 10), task("1"), task("2")]).await;
    for _ in 0..3 {
        let held = rig.take_one(&q).await.token;
        rig.give_back(&q, rejected(&[held], "no")).await;
        rig.pass(1);
    }
    rig.pass(1_000);
    assert_eq!(rig.counted(&q).await, Counts { dead: 3, inserted: 3, ..Counts::default() });
    rig.set(&q, Setting::DeadLetterRetention, 1_003).await;
    assert_eq!(rig.list_numbers(&q, State::Dead).await, [1, 2]);
    rig.pass(1);
    assert_eq!(rig.list_numbers(&q, State::Dead).await, [2]);
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 3, expired: 2, ..Counts::default() });
    rig.set(&q, Setting::DeadLetterRetention, None).await;
    rig.pass(1_000_000);
    assert_eq!(rig.counted(&q).await, Counts { dead: 1, inserted: 3, expired: 2, ..Counts::default() });
}
