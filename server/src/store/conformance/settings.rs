//! What is set for a queue.

use super::{reap::round, *};

/// Each alone and several at once; what is not named stays.
pub(super) async fn settings_are_changed_and_read(open: Open) {
    let (rig, q, other) = (open(RULES), queue("q"), queue("q::other"));
    rig.insert_numbers(&q, 0..1).await;
    assert_eq!(rig.settings(&q).await.unwrap(), Some(Settings::default()));
    let mut expected = Settings::default();
    // That of shards has cases of its own.
    let all = Setting::ALL.into_iter().filter(|setting| *setting != Setting::Shards);
    for (value, setting) in (0..).zip(all) {
        expected.set(setting, Some(value));
        assert_eq!(rig.set(&q, setting, value).await, expected);
        assert_eq!(rig.settings(&q).await.unwrap(), Some(expected.clone()));
    }
    let changes = [(Setting::MaxTasks, None), (Setting::MaxBytes, Some(1 << 52)), (Setting::Lease, Some(5))];
    changes.iter().for_each(|(setting, value)| expected.set(*setting, *value));
    assert_eq!(rig.change(&q, &changes).await.unwrap(), expected);
    assert_eq!(rig.change(&q, &[]).await.unwrap(), expected);
    assert_eq!(rig.settings(&other).await.unwrap(), None);
    let nothing: Vec<_> = Setting::ALL.into_iter().map(|setting| (setting, None)).collect();
    assert_eq!(rig.change(&q, &nothing).await.unwrap(), Settings::default());
    assert_eq!(rig.settings(&q).await.unwrap(), Some(Settings::default()));
}

/// It is known from then on, and has nothing in it.
pub(super) async fn a_setting_makes_a_queue(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    assert_eq!(rig.settings(&q).await.unwrap(), None);
    rig.set(&q, Setting::Lease, 77).await;
    assert_eq!(rig.queues(None, 10).await.unwrap(), std::slice::from_ref(&q));
    assert_eq!(rig.counted(&q).await, Counts::default());
    assert_eq!(rig.list(&q, State::Ready, None, 10).await.unwrap(), Some(Default::default()));
    rig.insert_numbers(&q, 0..1).await;
    let popped = rig.pop(&q, Pop { lease: None, ..pop(1) }).await.unwrap();
    assert_eq!(popped.tasks[0].left, 77);
}

/// For pops and heartbeats that do not say, at once, and again by the rules when it is unset.
pub(super) async fn the_lease_is_that_of_the_queue(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let take = async |lease| rig.pop(&q, Pop { lease, ..pop(1) }).await.unwrap().tasks.remove(0);
    assert_eq!(take(None).await.left, LEASE);
    rig.set(&q, Setting::Lease, 500).await;
    let held = take(None).await;
    assert_eq!((held.left, held.expires_at), (500, START + 500));
    assert_eq!(take(Some(7)).await.left, 7);
    rig.pass(100);
    let beat = async |lease| rig.heartbeat(&q, &[held.token], lease).await.unwrap().earliest;
    assert_eq!(beat(None).await, Some((500, START + 600)));
    rig.set(&q, Setting::Lease, None).await;
    assert_eq!(beat(None).await, Some((LEASE, START + 100 + LEASE)));
}

/// Both limits hold at once for what is there already: the next failure or expiry is held against them.
pub(super) async fn limits_of_counters_hold_at_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ids = rig.insert_numbers(&q, 0..2).await.ids;
    let one_fails_the_other_runs_out = async || {
        for task in rig.take(&q, 2).await.iter().filter(|task| task.id == ids[0]) {
            rig.give_back(&q, PutBack { delay: Some(0), ..failed(&[task.token], "e") }).await;
        }
        rig.pass(LEASE);
        rig.look_one(&q).await;
    };
    one_fails_the_other_runs_out().await;
    one_fails_the_other_runs_out().await;
    rig.change(&q, &[(Setting::MaxFailures, Some(2)), (Setting::MaxExpiries, Some(2))]).await.unwrap();
    assert_eq!(rig.counted(&q).await.dead, 0);
    one_fails_the_other_runs_out().await;
    let dead = rig.tasks(&q, &ids).await.unwrap().into_iter().flatten();
    assert_eq!(
        dead.map(|seen| (seen.cause, seen.failures, seen.expiries)).collect::<Vec<_>>(),
        [(Some(Cause::Failures), 3, 0), (Some(Cause::Expiries), 0, 3)]
    );
}

/// Each end of it alone.
pub(super) async fn the_backoff_is_that_of_the_queue(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let min = Setting::BackoffMin;
    let max = Setting::BackoffMax;
    let steps = [(min, Some(70), 70), (max, Some(100), 100), (min, Some(150), 150), (min, None, 1_000)];
    for (setting, value, expected) in steps {
        rig.set(&q, setting, value).await;
        let held = rig.take_one(&q).await.token;
        rig.give_back(&q, failed(&[held], "e")).await;
        assert_eq!(rig.look_one(&q).await.due_in, Some(expected), "{setting:?} {value:?}");
        rig.pass(expected);
    }
}

/// Nothing is delivered, and nobody is told to come: not by inserts, nor by what falls due, runs out or is put back.
pub(super) async fn a_paused_queue_delivers_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    rig.insert_new(&q, vec![after(10, task("3"))]).await;
    let held = rig.take(&q, 2).await;
    assert!(rig.set(&q, Setting::Paused, 1).await.paused());
    rig.insert_numbers(&q, 4..5).await;
    let popped = rig.pop(&q, Pop { will_wait: true, ..pop(5) }).await.unwrap();
    assert_eq!((popped.tasks, popped.ready, popped.due_in), (vec![], 0, None));
    assert_eq!(rig.put_back(&q, &[held[0].token]).await, [Outcome::Applied]);
    rig.pass(LEASE);
    assert_eq!(rig.look_one(&q).await, Sight { ready: 0, due_in: None, reclaimed: 2 });
    assert_eq!(rig.take(&q, 5).await, []);
    assert_eq!(rig.counted(&q).await, Counts { ready: 5, inserted: 5, paused: true, ..Counts::default() });
    assert_eq!(rig.list_numbers(&q, State::Ready).await, [1, 0, 2, 4, 3]);
    rig.set(&q, Setting::Paused, 0).await;
    assert_eq!(rig.look_one(&q).await, Sight { ready: 5, due_in: None, reclaimed: 0 });
    assert_eq!(rig.drain(&q).await, [1, 0, 2, 4, 3]);
}

/// What is held may be finished, extended, repeated and given back; the reaper goes on.
pub(super) async fn what_is_held_may_be_finished_while_a_queue_is_paused(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..6).await;
    let held = rig.pop(&q, attempt(5, "r", 1)).await.unwrap().tasks;
    let tokens = tokens(&held);
    rig.set(&q, Setting::Paused, 1).await;
    assert_eq!(rig.pop(&q, attempt(5, "r", 1)).await.unwrap().tasks, held, "the answer was lost");
    assert_eq!(rig.ack_one(&q, tokens[0]).await, Outcome::Applied);
    assert_eq!(rig.beat_one(&q, tokens[1], 9 * LEASE).await, Outcome::Applied);
    let popped = rig.pop(&q, Pop { acks: vec![tokens[2]], ..pop(5) }).await.unwrap();
    assert_eq!((popped.acks, popped.tasks), (vec![Outcome::Applied], vec![]));
    rig.give_back(&q, failed(&tokens[3..4], "e")).await;
    rig.pass(LEASE);
    assert_eq!(round(&rig, 10).await.1, [(q.clone(), 2)].into());
    assert_eq!(
        rig.counted(&q).await,
        Counts { ready: 3, leased: 1, inserted: 6, acked: 2, paused: true, ..Counts::default() }
    );
    rig.set(&q, Setting::Paused, None).await;
    assert_eq!(rig.drain(&q).await, [4, 5, 3]);
}
