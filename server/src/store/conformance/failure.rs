//! Tasks whose holders say that they failed, or that they are to be given up.

use super::*;

const MAX: u32 = 3;

const MORTAL: Rules = Rules { max_failures: MAX, max_expiries: MAX, ..RULES };

/// After how long a task can be popped again that failed so often, when it failed alone.
async fn backoff(rig: &Rig, q: &QueueName, chance: u16) -> Millis {
    let held = rig.take_one(q).await;
    rig.give_back(q, PutBack { chance, ..failed(&[held.token], "e") }).await;
    let wait = rig.look_one(q).await.due_in.expect("it is scheduled");
    rig.pass(wait - 1);
    assert_eq!(rig.take(q, 1).await, [], "G10");
    rig.pass(1);
    wait
}

/// G8, G10: the failure is counted and told, and the task waits for the backoff.
pub(super) async fn a_failure_is_counted_and_waits(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    let held = rig.take_one(&q).await.token;
    let released = rig.give_back(&q, failed(&[held], "no disk")).await;
    assert_eq!(released, Released { put_back: 1, ready: 0, dead_lettered: 0 });
    assert_eq!(rig.counted(&q).await, Counts { scheduled: 1, inserted: 1, ..Counts::default() });
    let Seen { state, at, deliveries, failures, expiries, last_error, .. } = rig.seen(&q, id).await.unwrap();
    assert_eq!((state, at), (State::Scheduled, Some(START + RULES.backoff.min)));
    assert_eq!((deliveries, failures, expiries, &*last_error), (1, 1, 0, "no disk"));
    rig.pass(RULES.backoff.min);
    let again = rig.take_one(&q).await;
    assert_eq!((again.deliveries, again.failures, again.expiries), (2, 1, 0));
}

/// Twice as long after each failure, and never longer than the maximum; with a minimum of nothing, at once.
pub(super) async fn the_backoff_doubles_up_to_its_maximum(open: Open) {
    let rig = open(Rules { backoff: Backoff { min: 100, max: 1_000 }, ..RULES });
    let q = queue("q");
    rig.insert_numbers(&q, 0..1).await;
    for wait in [100, 200, 400, 800, 1_000, 1_000] {
        assert_eq!(backoff(&rig, &q, 0).await, wait);
    }
    rig.change(&q, &[(Setting::BackoffMin, Some(0)), (Setting::BackoffMax, Some(0))]).await.unwrap();
    let held = rig.take_one(&q).await.token;
    assert_eq!(rig.give_back(&q, failed(&[held], "e")).await.ready, 1, "it is at the head again");
    rig.take_one(&q).await;
}

/// Up to a quarter longer, the maximum included; and what failed together comes back apart.
pub(super) async fn the_backoff_has_a_random_part(open: Open) {
    let rig = open(Rules { backoff: Backoff { min: 1_000, max: 2_000 }, ..RULES });
    let q = queue("q");
    rig.insert_numbers(&q, 0..1).await;
    for (chance, wait) in [(0, 1_000), (u16::MAX, 2_499), (1 << 15, 2_250), (1, 2_000)] {
        assert_eq!(backoff(&rig, &q, chance).await, wait);
    }
    let together = queue("together");
    rig.insert_numbers(&together, 0..5).await;
    let mut held = tokens(&rig.take(&together, 5).await);
    held.reverse();
    let now = rig.now();
    rig.give_back(&together, PutBack { chance: 1 << 15, ..failed(&held, "e") }).await;
    // The second in the order of delivery, whatever the order of the tokens, has 40,503 65536ths more, and so on.
    let parts = [32_768, 7_735, 48_238, 23_205, 63_708];
    let mut expected: Vec<(Millis, usize)> =
        parts.iter().map(|part| now + 1_000 + 250 * part / 65_536).zip(0..).collect();
    expected.sort_unstable();
    let listed = rig.listed(&together, State::Scheduled, 100).await;
    let found: Vec<_> = listed.iter().map(|seen| (seen.at.unwrap(), number(&seen.envelope))).collect();
    assert_eq!(found, expected);
}

/// A delay that the holder names is taken instead of the backoff, and nothing is added to it.
pub(super) async fn a_delay_is_taken_instead_of_the_backoff(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = rig.take_one(&q).await.token;
    rig.give_back(&q, PutBack { delay: Some(7), chance: u16::MAX, ..failed(&[held], "e") }).await;
    assert_eq!(rig.look_one(&q).await.due_in, Some(7));
    rig.pass(7);
    assert_eq!(numbers(&rig.take(&q, 1).await), [1]);
    let held = rig.take_one(&q).await;
    let released = rig.give_back(&q, PutBack { delay: Some(0), ..failed(&[held.token], "e") }).await;
    assert_eq!(released, Released { put_back: 1, ready: 1, dead_lettered: 0 });
    assert_eq!(rig.take_one(&q).await.failures, 2);
}

/// G1, G14: it is kept, with why and when, and never delivered again.
pub(super) async fn the_last_failure_makes_a_dead_letter(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    let ids = rig.insert_numbers(&q, 0..2).await.ids;
    for failures in 1..=MAX {
        let held = rig.take_one(&q).await;
        assert_eq!((held.id, held.failures), (ids[0], failures - 1));
        // The delay of the last one is for nothing.
        let reason = format!("number {failures}");
        let released = rig.give_back(&q, PutBack { delay: Some(0), ..failed(&[held.token], &reason) }).await;
        let dead = u64::from(failures == MAX);
        assert_eq!(released, Released { put_back: 1 - dead, ready: 1 - dead, dead_lettered: dead });
    }
    rig.pass(1_000);
    let seen = rig.seen(&q, ids[0]).await.unwrap();
    assert_eq!((seen.state, seen.at, seen.cause), (State::Dead, Some(START), Some(Cause::Failures)));
    assert_eq!((seen.deliveries, seen.failures, seen.expiries, &*seen.last_error), (MAX, MAX, 0, "number 3"));
    assert_eq!((&*seen.envelope, seen.inserted_at), (&b"0"[..], START));
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, dead: 1, inserted: 2, ..Counts::default() });
    rig.pass(10 * RULES.backoff.max);
    assert_eq!(rig.drain(&q).await, [1]);
}

/// G8: what runs out did not fail, and what failed did not run out: each limit is reached by its own counter.
pub(super) async fn failures_and_expiries_are_counted_apart(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    let ids = rig.insert_numbers(&q, 0..2).await.ids;
    for times in 1..MAX {
        rig.take(&q, 2).await;
        rig.pass(LEASE);
        let held = rig.take(&q, 2).await;
        assert!(held.iter().all(|task| (task.failures, task.expiries) == (times - 1, times)));
        rig.give_back(&q, PutBack { delay: Some(0), ..failed(&tokens(&held), "e") }).await;
        let held = rig.take(&q, 2).await;
        assert!(held.iter().all(|task| (task.failures, task.expiries) == (times, times)));
        assert_eq!(rig.put_back(&q, &tokens(&held)).await, [Outcome::Applied; 2]);
    }
    assert_eq!(rig.counted(&q).await.dead, 0);
    let held = rig.take(&q, 2).await;
    assert!(held.iter().all(|task| task.deliveries == 3 * (MAX - 1) + 1));
    rig.give_back(&q, failed(&tokens(&held[..1]), "e")).await;
    rig.pass(LEASE);
    let dead = rig.tasks(&q, &ids).await.unwrap().into_iter().map(Option::unwrap);
    let causes: Vec<_> = dead.map(|seen| (seen.cause.unwrap(), seen.failures, seen.expiries)).collect();
    assert_eq!(causes, [(Cause::Failures, MAX, MAX - 1), (Cause::Expiries, MAX - 1, MAX)]);
}

/// G8: a plain put back is neither a failure nor an error, whatever it says.
pub(super) async fn a_put_back_is_no_failure(open: Open) {
    let (rig, q) = (open(MORTAL), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    for delivery in 1..3 * MAX {
        let held = rig.take_one(&q).await;
        assert_eq!((held.deliveries, held.failures, held.expiries), (delivery, 0, 0));
        rig.give_back(&q, PutBack { reason: "later".to_owned(), ..back(&[held.token]) }).await;
    }
    assert_eq!(rig.seen(&q, id).await.unwrap().last_error, "");
}

/// It is dead at once, and its counters stay as they are.
pub(super) async fn a_rejected_task_is_a_dead_letter_at_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ids = rig.insert_numbers(&q, 0..3).await.ids;
    let held = tokens(&rig.take(&q, 3).await);
    let released = rig.give_back(&q, PutBack { delay: Some(5), ..rejected(&held[..1], "poison") }).await;
    assert_eq!(released, Released { put_back: 0, ready: 0, dead_lettered: 1 });
    rig.give_back(&q, PutBack { failed: true, ..rejected(&held[1..2], "poison and worse") }).await;
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, dead: 2, inserted: 3, ..Counts::default() });
    for (id, failures, error) in [(ids[0], 0, "poison"), (ids[1], 1, "poison and worse")] {
        let seen = rig.seen(&q, id).await.unwrap();
        assert_eq!((seen.cause, seen.deliveries, seen.failures), (Some(Cause::Rejected), 1, failures));
        assert_eq!((&*seen.last_error, seen.at), (error, Some(START)));
    }
    assert_eq!(rig.put_back(&q, &held[..2]).await, [Outcome::LeaseLost; 2]);
    // The last failure allowed, of a task that is rejected as well, is a failure too many.
    let q = queue("both");
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    rig.set(&q, Setting::MaxFailures, 1).await;
    let held = rig.take_one(&q).await.token;
    rig.give_back(&q, PutBack { failed: true, ..rejected(&[held], "e") }).await;
    assert_eq!(rig.seen(&q, id).await.unwrap().cause, Some(Cause::Failures));
}

/// What was said last, byte for byte, for as long as the task is there.
pub(super) async fn the_last_error_is_kept(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    let long = "ü\0\n\"'".repeat(1_024 / 6);
    for error in ["first", &*long, ""] {
        let held = rig.take_one(&q).await.token;
        rig.give_back(&q, PutBack { delay: Some(0), ..failed(&[held], error) }).await;
        assert_eq!(rig.seen(&q, id).await.unwrap().last_error, error);
        let held = rig.take_one(&q).await.token;
        assert_eq!(rig.seen(&q, id).await.unwrap().last_error, error, "while it is held");
        rig.put_back(&q, &[held]).await;
        rig.take_one(&q).await;
        rig.pass(LEASE);
        assert_eq!(rig.seen(&q, id).await.unwrap().last_error, error, "after it ran out");
    }
}

/// G5, G8: sent again, it counts no second failure.
pub(super) async fn a_failure_is_counted_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    let held = rig.take_one(&q).await.token;
    let release = || Release::PutBack(failed(&[held, held], "e"));
    assert_eq!(rig.release(&q, release()).await.unwrap().0, [Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(rig.release(&q, release()).await.unwrap().0, [Outcome::LeaseLost; 2]);
    assert_eq!(rig.seen(&q, id).await.unwrap().failures, 1);
}

/// G9, G14: the largest call, of which some die.
pub(super) async fn hundreds_fail_in_one_call(open: Open) {
    let (rig, q) = (open(Rules { max_failures: 2, ..RULES }), queue("q"));
    rig.insert_numbers(&q, 0..1_000).await;
    let mut held = Vec::new();
    for _ in 0..5 {
        held.extend(tokens(&rig.take(&q, 200).await));
    }
    let thirds: Vec<Token> = held.iter().step_by(3).copied().collect();
    rig.give_back(&q, PutBack { delay: Some(0), ..failed(&thirds, "first") }).await;
    let again = tokens(&rig.take(&q, 200).await);
    let again = [again, tokens(&rig.take(&q, 200).await)].concat();
    assert_eq!(again.len(), thirds.len());
    let all: Vec<Token> = held.iter().filter(|token| !thirds.contains(token)).chain(&again).copied().collect();
    let released = rig.give_back(&q, PutBack { delay: Some(0), ..failed(&all, "second") }).await;
    assert_eq!(released, Released { put_back: 666, ready: 666, dead_lettered: 334 });
    assert_eq!(rig.counted(&q).await, Counts { ready: 666, dead: 334, inserted: 1_000, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, (0..1_000).filter(|number| number % 3 > 0).collect::<Vec<_>>());
}
