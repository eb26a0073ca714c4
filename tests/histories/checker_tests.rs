//! The checker finds what is wrong, and nothing else.

use std::{collections::BTreeSet, time::Duration};

use data_queue_proto::v1::Outcome::{self, AlreadyAcked, Applied, LeaseLost};

use super::{
    checker::{Fault, faults},
    recorder::{Answer, Delivery, History, Insert, Intent, Leaving, Reclaim, Try},
};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn insert(id: &str) -> Insert {
    Insert { texts: vec![format!("\"{id}\"")], ids: vec![id.to_owned()], replayed: false, sent: 1 }
}

/// Received 1 ms after it was asked for, with a lease of a second.
fn delivery(id: &str, token: &str, deliveries: u32, at: u64) -> Delivery {
    Delivery {
        call: String::new(),
        session: None,
        id: id.to_owned(),
        token: token.to_owned(),
        text: format!("\"{id}\""),
        deliveries,
        expiries: deliveries - 1,
        first_sent: ms(at),
        sent: ms(at),
        answered: ms(at + 1),
        left: ms(1_000),
    }
}

/// Answered after 1 ms, if at all.
fn tried(intent: Intent, token: &str, at: u64, outcome: impl Into<Option<Outcome>>) -> Try {
    let outcome = outcome.into();
    let left = (intent == Intent::Heartbeat && outcome == Some(Applied)).then_some(ms(1_000));
    let answer = outcome.map(|outcome| Answer { at: ms(at + 1), outcome, left });
    Try { token: token.to_owned(), intent, sent: ms(at), answer }
}

fn ack(token: &str, at: u64, outcome: impl Into<Option<Outcome>>) -> Try {
    tried(Intent::Ack, token, at, outcome)
}

fn history(inserts: Vec<Insert>, deliveries: Vec<Delivery>, tries: Vec<Try>) -> History {
    History { inserts, deliveries, tries, ..History::default() }
}

#[track_caller]
fn judged(history: &History, expected: impl IntoIterator<Item = Fault>) {
    assert_eq!(faults(history), expected.into_iter().collect::<BTreeSet<_>>(), "{history:#?}");
}

fn id() -> String {
    "a".to_owned()
}

#[test]
fn a_good_history_has_no_faults() {
    let replayed = Insert { replayed: true, sent: 2, ..insert("b") };
    let deliveries = vec![
        // Abandoned, taken back when its lease ran out, acked late, given to another.
        delivery("a", "t1", 1, 10),
        delivery("a", "t2", 2, 1_012),
        // Put back by an unanswered call, then acked by an answer that was lost at first.
        delivery("b", "t3", 1, 20),
        delivery("b", "t4", 2, 40),
    ];
    let tries = vec![
        ack("t1", 1_100, LeaseLost),
        tried(Intent::Heartbeat, "t2", 1_900, Applied),
        ack("t2", 2_800, Applied),
        tried(Intent::PutBack, "t3", 30, None),
        tried(Intent::PutBack, "t3", 45, LeaseLost),
        ack("t4", 50, None),
        ack("t4", 60, AlreadyAcked),
    ];
    let mut tasks = history(vec![insert("a"), replayed], deliveries, tries);
    tasks.deliveries[3].expiries = 0;
    judged(&tasks, []);
    judged(&History::default(), []);
}

#[test]
fn lost_tasks_are_found() {
    judged(&history(vec![insert("a")], vec![], vec![]), [Fault::Lost { id: id() }]);
    let never_acked = vec![tried(Intent::PutBack, "t1", 20, Applied), ack("t1", 30, LeaseLost)];
    judged(&history(vec![insert("a")], vec![delivery("a", "t1", 1, 10)], never_acked), [Fault::Lost { id: id() }]);
}

#[test]
fn phantoms_and_altered_values_are_found() {
    let acked = || vec![ack("t1", 20, Applied)];
    judged(&history(vec![], vec![delivery("a", "t1", 1, 10)], acked()), [Fault::Phantom { id: id() }]);
    let altered = Delivery { text: "\"A\"".to_owned(), ..delivery("a", "t1", 1, 10) };
    judged(&history(vec![insert("a")], vec![altered], acked()), [Fault::Altered { id: id() }]);
}

#[test]
fn inserts_that_happened_twice_are_found() {
    let good = || (vec![delivery("a", "t1", 1, 10)], vec![ack("t1", 20, Applied)]);
    let (deliveries, tries) = good();
    let one_id = history(vec![insert("a"), insert("a")], deliveries, tries);
    judged(&one_id, [Fault::Misnumbered { id: id() }]);
    let (deliveries, tries) = good();
    let replayed = Insert { replayed: true, ..insert("a") };
    judged(&history(vec![replayed], deliveries, tries), [Fault::ReplayedAtFirst { id: id() }]);
    let (mut deliveries, tries) = good();
    // The second copy, under an id that no answer told.
    deliveries.push(Delivery { text: "\"a\"".to_owned(), ..delivery("copy", "t2", 1, 30) });
    let copy = history(vec![insert("a")], deliveries, tries);
    judged(&copy, [Fault::Phantom { id: "copy".to_owned() }]);
}

#[test]
fn repeated_tokens_are_found() {
    let deliveries = vec![delivery("a", "t1", 1, 10), delivery("b", "t1", 1, 30)];
    let tries = vec![ack("t1", 40, Applied)];
    let repeated = Fault::TokenRepeated { token: "t1".to_owned() };
    judged(&history(vec![insert("a"), insert("b")], deliveries, tries), [repeated]);
}

#[test]
fn overlapping_holds_are_found() {
    // While the first lease runs.
    let leased = vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, 500)];
    let tries = vec![ack("t2", 600, Applied)];
    judged(&history(vec![insert("a")], leased, tries), [Fault::HeldTwice { id: id() }]);
    // The first lease ran out, and yet its token was good after the second delivery.
    let proven = vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, 1_500)];
    let tries = vec![tried(Intent::Heartbeat, "t1", 1_600, Applied), ack("t2", 1_700, Applied)];
    judged(&history(vec![insert("a")], proven, tries), [Fault::HeldTwice { id: id() }]);
    // A heartbeat had moved the deadline.
    let extended = vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, 1_500)];
    let tries = vec![tried(Intent::Heartbeat, "t1", 900, Applied), ack("t2", 1_700, Applied)];
    judged(&history(vec![insert("a")], extended, tries), [Fault::HeldTwice { id: id() }]);
}

#[test]
fn what_was_held_for_long_may_be_put_back_by_anyone() {
    // Put back at 500 ms at the earliest, which is 100 ms before it is missed.
    let deliveries = |again| vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, again)];
    let reclaim = |held_for, sent, over| Reclaim { held_for: ms(held_for), sent: ms(sent), over: ms(over) };
    let tries = || vec![ack("t1", 600, LeaseLost), ack("t2", 1_700, Applied)];
    let judge = |reclaim, again, expected: &[Fault]| {
        let reclaims = vec![reclaim];
        let history = History { reclaims, ..history(vec![insert("a")], deliveries(again), tries()) };
        judged(&history, expected.to_vec());
    };
    let early = || Fault::LostEarly { token: "t1".to_owned() };
    judge(reclaim(450, 500, 550), 590, &[]);
    // Not yet held for so long, and put back only after it was missed.
    judge(reclaim(600, 500, 550), 590, &[Fault::HeldTwice { id: id() }, early()]);
    judge(reclaim(450, 700, 750), 800, &[early()]);
    // A heartbeat had renewed it.
    let beat = tried(Intent::Heartbeat, "t1", 300, Applied);
    let tries = [vec![beat], tries()].concat();
    let renewed =
        History { reclaims: vec![reclaim(450, 500, 550)], ..history(vec![insert("a")], deliveries(590), tries) };
    judged(&renewed, [Fault::HeldTwice { id: id() }, early()]);
}

#[test]
fn leases_lost_early_and_tokens_that_revive_are_found() {
    let deliveries = || vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, 1_500)];
    let early = vec![tried(Intent::Heartbeat, "t1", 500, LeaseLost), ack("t2", 1_700, Applied)];
    let token = || "t1".to_owned();
    judged(&history(vec![insert("a")], deliveries(), early), [Fault::LostEarly { token: token() }]);
    let revived = vec![ack("t1", 1_100, LeaseLost), ack("t1", 1_200, Applied)];
    judged(&history(vec![insert("a")], vec![delivery("a", "t1", 1, 10)], revived), [Fault::Revived { token: token() }]);
}

#[test]
fn acks_that_count_twice_or_too_early_are_found() {
    let deliveries = || vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 2, 1_500)];
    let both = vec![ack("t1", 1_400, Applied), ack("t2", 1_700, Applied)];
    let again = [Fault::AckedTwice { id: id() }, Fault::AfterAck { id: id() }];
    judged(&history(vec![insert("a")], deliveries(), both), again);
    let twice = vec![ack("t1", 20, Applied), ack("t1", 30, Applied)];
    judged(&history(vec![insert("a")], vec![delivery("a", "t1", 1, 10)], twice), [Fault::AckedTwice { id: id() }]);
    let already = vec![ack("t1", 20, AlreadyAcked)];
    let before = Fault::AckedBefore { token: "t1".to_owned() };
    judged(&history(vec![insert("a")], vec![delivery("a", "t1", 1, 10)], already), [before]);
    let after = vec![ack("t1", 20, Applied), ack("t2", 1_700, LeaseLost)];
    let late_loss = [Fault::AfterAck { id: id() }, Fault::LostEarly { token: "t2".to_owned() }];
    judged(&history(vec![insert("a")], deliveries(), after), late_loss);
    let strange = vec![ack("t1", 20, Applied), ack("t9", 30, Applied)];
    let forged = Fault::Forged { token: "t9".to_owned() };
    judged(&history(vec![insert("a")], vec![delivery("a", "t1", 1, 10)], strange), [forged]);
}

#[test]
fn counters_that_lie_are_found() {
    let tries = || vec![ack("t2", 1_700, Applied)];
    for (first, second) in [((1, 0), (1, 0)), ((2, 1), (1, 0)), ((1, 0), (2, 2)), ((3, 2), (4, 1))] {
        let mut deliveries = vec![delivery("a", "t1", 1, 10), delivery("a", "t2", 1, 1_500)];
        for (delivery, (count, expiries)) in deliveries.iter_mut().zip([first, second]) {
            (delivery.deliveries, delivery.expiries) = (count, expiries);
        }
        judged(&history(vec![insert("a")], deliveries, tries()), [Fault::Miscounted { id: id() }]);
    }
}

/// On a stream of session 7, with a lease of 5 s.
fn streamed(token: &str, deliveries: u32, at: u64) -> Delivery {
    Delivery { session: Some(7), left: ms(5_000), ..delivery("a", token, deliveries, at) }
}

fn left(token: &str, at: u64) -> Leaving {
    Leaving { token: token.to_owned(), at: ms(at) }
}

/// A stream opened with this session was told that it took the token over, for 5 s.
fn resumed(session: u64, token: &str, at: u64) -> Try {
    let answer = Answer { at: ms(at + 1), outcome: Applied, left: Some(ms(5_000)) };
    Try { token: token.to_owned(), intent: Intent::Resume(session), sent: ms(at), answer: Some(answer) }
}

#[test]
fn what_was_held_on_a_stream_that_was_left_is_held_for_the_grace() {
    let judge = |leavings: &[Leaving], again, expected: &[Fault]| {
        let tries = vec![ack("t1", again + 10, LeaseLost), ack("t2", again + 20, Applied)];
        let history = history(vec![insert("a")], vec![streamed("t1", 1, 10), streamed("t2", 2, again)], tries);
        judged(&History { leavings: leavings.to_vec(), ..history }, expected.to_vec());
    };
    let taken_early = || [Fault::HeldTwice { id: id() }, Fault::LostEarly { token: "t1".to_owned() }];
    // Until 2.5 s.
    judge(&[left("t1", 500)], 2_510, &[]);
    judge(&[left("t1", 500)], 2_400, &taken_early());
    judge(&[left("t1", 500), left("t1", 200)], 2_400, &[]);
    // Another stream was left; and none at all, so that the lease runs until 5 s.
    judge(&[left("t2", 500)], 2_510, &taken_early());
    judge(&[], 4_900, &taken_early());
    // Never beyond the lease.
    judge(&[left("t1", 4_000)], 5_100, &[]);
}

#[test]
fn what_was_taken_over_is_held_as_before() {
    let judge = |left_at, again, expected: &[Fault]| {
        let tries = vec![resumed(7, "t1", 1_000), ack("t1", again + 10, LeaseLost), ack("t2", again + 20, Applied)];
        let history = history(vec![insert("a")], vec![streamed("t1", 1, 10), streamed("t2", 2, again)], tries);
        judged(&History { leavings: vec![left("t1", left_at)], ..history }, expected.to_vec());
    };
    let taken_early = || [Fault::HeldTwice { id: id() }, Fault::LostEarly { token: "t1".to_owned() }];
    // Until 6 s, and no stream was left since.
    judge(500, 2_600, &taken_early());
    judge(500, 5_900, &taken_early());
    judge(500, 6_100, &[]);
    // That stream was left, too.
    judge(1_500, 3_400, &taken_early());
    judge(1_500, 3_600, &[]);
}

#[test]
fn take_overs_that_must_not_be_are_found() {
    let token = || "t1".to_owned();
    let judge = |delivery: Delivery, tries: Vec<Try>, expected: &[Fault]| {
        judged(&history(vec![insert("a")], vec![delivery], tries), expected.to_vec());
    };
    let acked = || ack("t1", 2_000, Applied);
    judge(streamed("t1", 1, 10), vec![resumed(7, "t1", 500), acked()], &[]);
    judge(streamed("t1", 1, 10), vec![resumed(8, "t1", 500), acked()], &[Fault::TakenAway { token: token() }]);
    let unary = Delivery { session: None, ..streamed("t1", 1, 10) };
    judge(unary, vec![resumed(7, "t1", 500), acked()], &[Fault::TakenAway { token: token() }]);
    // What is done is held by nobody, and what is lost stays so.
    judge(streamed("t1", 1, 10), vec![acked(), resumed(7, "t1", 2_500)], &[Fault::Revived { token: token() }]);
    let lost = vec![ack("t1", 5_500, LeaseLost), resumed(7, "t1", 6_000), ack("t1", 6_500, Applied)];
    judge(streamed("t1", 1, 10), lost, &[Fault::LostEarly { token: token() }, Fault::Revived { token: token() }]);
    // Under way at the same time; and lost before the worker read it.
    judge(streamed("t1", 1, 10), vec![acked(), resumed(7, "t1", 2_000)], &[]);
    let unread = vec![resumed(7, "t0", 500), tried(Intent::PutBack, "t0", 600, Applied), acked()];
    judge(streamed("t1", 1, 10), unread, &[]);
    let forged = vec![tried(Intent::PutBack, "t0", 600, Applied), acked()];
    judge(streamed("t1", 1, 10), forged, &[Fault::Forged { token: "t0".to_owned() }]);
}
