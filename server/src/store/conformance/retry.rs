//! Pops that are tried again: with a request id by the caller, and twice by the way to the store.

use super::*;

/// The same request gets the same tokens, counted once, and its deadline does not move.
pub(super) async fn a_repeated_pop_gets_the_same_delivery(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..6).await;
    let done = rig.take_one(&q).await.token;
    let acks = vec![done];
    let first = rig.pop(&q, Pop { acks: acks.clone(), ..attempt(2, "r", 1) }).await.unwrap();
    assert_eq!((numbers(&first.tasks), first.acks.as_slice()), (vec![1, 2], &[Outcome::Applied][..]));
    for number in 2..5 {
        rig.pass(7_000);
        let again = rig.pop(&q, Pop { acks: acks.clone(), ..attempt(2, "r", number) }).await.unwrap();
        assert_eq!((again.acks.as_slice(), again.ready), (&[Outcome::AlreadyAcked][..], 3));
        for (again, first) in again.tasks.iter().zip(&first.tasks) {
            assert_eq!(again, &Leased { left: first.expires_at - rig.now(), ..first.clone() });
        }
        assert_eq!(again.tasks.len(), 2);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, leased: 2, inserted: 6, acked: 1, ..Counts::default() });
    rig.put_back(&q, &tokens(&first.tasks)).await;
    assert_eq!(rig.take_one(&q).await.deliveries, 2);
    // Another request is another pop.
    assert_eq!(numbers(&rig.pop(&q, attempt(1, "s", 1)).await.unwrap().tasks), [2]);
}

/// A repeated pop gets what is left of its delivery: not what was acked, put back or taken back.
pub(super) async fn a_repeated_pop_leaves_out_what_ended(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..6).await;
    let held = tokens(&rig.pop(&q, attempt(5, "r", 1)).await.unwrap().tasks);
    rig.ack_one(&q, held[0]).await;
    rig.put_back(&q, &[held[3]]).await;
    let again = rig.pop(&q, attempt(5, "r", 2)).await.unwrap();
    assert_eq!(numbers(&again.tasks), [1, 2, 4]);
    rig.heartbeat(&q, &[held[4], held[2]], Some(2 * LEASE)).await.unwrap();
    rig.pass(LEASE);
    let again = rig.pop(&q, attempt(5, "r", 3)).await.unwrap();
    assert_eq!((numbers(&again.tasks), again.reclaimed), (vec![2, 4], 1));
    assert!(tokens(&again.tasks) == [held[2], held[4]]);
    assert_eq!((again.tasks[0].left, again.tasks[0].deliveries), (LEASE, 1));
    assert_eq!(rig.drain(&q).await, [1, 3, 5]);
}

/// When all of its delivery ended, a repeated pop is a new one, with new tokens, which is then the one that is repeated.
pub(super) async fn a_repeated_pop_pops_anew_when_nothing_is_left(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let next = async |number| {
        let tasks = rig.pop(&q, attempt(1, "r", number)).await.unwrap().tasks;
        let repeated = rig.pop(&q, attempt(1, "r", number + 1)).await.unwrap().tasks;
        assert_eq!(tasks, repeated);
        (numbers(&tasks)[0], tasks[0].deliveries, tasks[0].token)
    };
    let (number, deliveries, first) = next(1).await;
    assert_eq!((number, deliveries), (0, 1));
    rig.ack_one(&q, first).await;
    let (number, deliveries, second) = next(3).await;
    assert_eq!((number, deliveries), (1, 1), "after an ack");
    rig.put_back(&q, &[second]).await;
    let (number, deliveries, third) = next(5).await;
    assert_eq!((number, deliveries), (1, 2), "after a put back");
    rig.pass(LEASE);
    let (number, deliveries, fourth) = next(7).await;
    assert_eq!((number, deliveries), (1, 3), "after the deadline");
    for number in [7, 8] {
        rig.unsent(&q, &[fourth], Some(name_of_attempt(number))).await;
    }
    let (number, deliveries, fifth) = next(9).await;
    assert_eq!((number, deliveries), (1, 3), "after it was not sent");
    let all = [first, second, third, fourth, fifth];
    assert!((0..5).all(|at| !all[..at].contains(&all[at])));
    assert_eq!(rig.ack(&q, &all[1..]).await.unwrap()[..3], [Outcome::LeaseLost; 3]);
    assert_eq!(rig.drain(&q).await, [2]);
}

/// A pop that got nothing is not kept from getting something when it is tried again.
pub(super) async fn a_pop_that_found_nothing_pops_anew(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let held = rig.take_one(&q).await;
    assert!(rig.pop(&q, attempt(2, "r", 1)).await.unwrap().tasks.is_empty());
    rig.ack_one(&q, held.token).await;
    rig.insert_numbers(&q, 1..4).await;
    assert_eq!(numbers(&rig.pop(&q, attempt(2, "r", 2)).await.unwrap().tasks), [1, 2]);
    assert_eq!(numbers(&rig.pop(&q, attempt(2, "r", 3)).await.unwrap().tasks), [1, 2]);
}

/// G5: the same request id with other content does nothing at all; not even its acks.
pub(super) async fn a_reused_request_id_is_refused_and_acks_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = rig.pop(&q, attempt(1, "r", 1)).await.unwrap().tasks;
    let other = PopRequest { key: key("r", 2), attempt: name_of_attempt(2) };
    let refused = rig.pop(&q, Pop { acks: tokens(&held), request: Some(other), ..pop(1) }).await;
    assert!(matches!(refused, Err(StoreError::RequestIdReused)));
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, leased: 1, inserted: 3, acked: 0, ..Counts::default() });
    assert_eq!(rig.pop(&q, attempt(1, "r", 3)).await.unwrap().tasks, held);
    assert_eq!(rig.ack_one(&q, held[0].token).await, Outcome::Applied);
}

/// A pop's request is remembered for the window at least, and for twice the window at most.
pub(super) async fn a_pop_request_is_remembered_for_the_window_and_forgotten_after_two(open: Open) {
    let window = 1000;
    let (rig, q) = (open(remembering(Remember { window, ..RULES.remember })), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let first = rig.pop(&q, attempt(1, "r", 1)).await.unwrap().tasks;
    rig.pass(window - 1);
    let second = rig.pop(&q, attempt(1, "s", 1)).await.unwrap().tasks;
    rig.pass(1);
    assert_eq!(tokens(&rig.pop(&q, attempt(1, "r", 2)).await.unwrap().tasks), tokens(&first));
    rig.pass(window - 1);
    assert_eq!(tokens(&rig.pop(&q, attempt(1, "s", 2)).await.unwrap().tasks), tokens(&second));
    rig.pass(1);
    assert_eq!(numbers(&rig.pop(&q, attempt(1, "r", 3)).await.unwrap().tasks), [2]);
    // What the forgotten pop leased is still held.
    assert_eq!(rig.ack_one(&q, first[0].token).await, Outcome::Applied);
}

/// G4, G9: a step that runs twice, with the stem that was minted for it, is as one that ran once.
pub(super) async fn a_second_run_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..10).await;
    for call in [pop(3), attempt(3, "r", 1)] {
        let first = rig.pop(&q, call.clone()).await.unwrap();
        let counts = rig.counted(&q).await;
        assert_eq!(first.tasks.len(), 3);
        for _ in 0..2 {
            let again = rig.pop(&q, call.clone()).await.unwrap();
            assert_eq!((again.known, Popped { known: false, ..again }), (call.request.is_some(), first.clone()));
            assert_eq!(rig.counted(&q).await, counts);
        }
    }
    assert_eq!(rig.drain(&q).await, [6, 7, 8, 9]);
}

/// G1, G4: a second run that comes when a part of the first one's delivery ended gives no token a second task.
pub(super) async fn a_second_run_that_comes_late_takes_nothing_away(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..6).await;
    let call = pop(3);
    let held = rig.pop(&q, call.clone()).await.unwrap().tasks;
    rig.ack_one(&q, held[0].token).await;
    let again = rig.pop(&q, call).await.unwrap();
    assert_eq!(again.tasks, held[1..]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, leased: 2, inserted: 6, acked: 1, ..Counts::default() });
    rig.put_back(&q, &tokens(&again.tasks)).await;
    assert_eq!(rig.drain(&q).await, [1, 2, 3, 4, 5]);
}

/// G8: the clean-up of a try that was not sent leaves what a later try was given.
pub(super) async fn an_earlier_attempt_takes_nothing_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.pop(&q, attempt(2, "r", 1)).await.unwrap().tasks);
    rig.pop(&q, attempt(2, "r", 2)).await.unwrap();
    for not_the_last in [Some(name_of_attempt(1)), Some(name_of_attempt(3)), None] {
        assert_eq!(rig.unsent(&q, &held, not_the_last).await, [Outcome::LeaseLost; 2]);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, leased: 2, inserted: 3, acked: 0, ..Counts::default() });
    // A heartbeat does not change whose it is.
    rig.heartbeat(&q, &held, Some(2 * LEASE)).await.unwrap();
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(1))).await, [Outcome::LeaseLost; 2]);
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::Applied; 2]);
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(2))).await, [Outcome::AlreadyAcked; 2]);
}

/// G8, G11: what every try was given and none sent is at the head again, in order and as if never delivered.
pub(super) async fn when_every_attempt_gave_up_it_goes_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    rig.pop(&q, attempt(3, "r", 1)).await.unwrap();
    let held = tokens(&rig.pop(&q, attempt(3, "r", 2)).await.unwrap().tasks);
    rig.heartbeat(&q, &held, Some(2 * LEASE)).await.unwrap();
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(1))).await, [Outcome::LeaseLost; 3]);
    let back = [held[2], held[0], held[2]];
    let outcomes = rig.unsent(&q, &back, Some(name_of_attempt(2))).await;
    assert_eq!(outcomes, [Outcome::Applied, Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(2))).await[1], Outcome::Applied);
    assert_eq!(rig.counted(&q).await, Counts { ready: 4, inserted: 4, ..Counts::default() });
    let again = rig.take(&q, 4).await;
    assert_eq!(numbers(&again), [1, 0, 2, 3]);
    assert!(again.iter().all(|task| (task.deliveries, task.expiries) == (1, 0)));
}

/// G4, G5: tries may reach the store in another order than they were made, so none of them takes back from another.
pub(super) async fn a_later_attempt_takes_nothing_back_either(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let held = tokens(&rig.pop(&q, attempt(1, "r", 1)).await.unwrap().tasks);
    for later in 2..=20 {
        assert_eq!(tokens(&rig.pop(&q, attempt(1, "r", later)).await.unwrap().tasks), held);
        assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(later))).await, [Outcome::LeaseLost]);
    }
    assert_eq!(rig.heartbeat(&q, &held, Some(LEASE)).await.unwrap().outcomes, [Outcome::Applied]);
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(1))).await, [Outcome::Applied]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
}

/// G4: of more tries at once than are kept apart, none takes anything back; the lease runs out.
pub(super) async fn too_many_attempts_take_nothing_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let mut held = Vec::new();
    for one in 1..=12 {
        held = tokens(&rig.pop(&q, attempt(1, "r", one)).await.unwrap().tasks);
    }
    for one in 1..=12 {
        assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(one))).await, [Outcome::LeaseLost]);
    }
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 1, ..Counts::default() });
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
}

/// G8: a pop without a request has one try, and what it did not send goes back, once.
pub(super) async fn without_a_request_the_unsent_goes_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.take(&q, 2).await);
    assert_eq!(rig.unsent(&q, &held, Some(name_of_attempt(0))).await, [Outcome::LeaseLost; 2]);
    assert_eq!(rig.unsent(&q, &[held[1], held[0]], None).await, [Outcome::Applied; 2]);
    assert_eq!(rig.unsent(&q, &held, None).await, [Outcome::LeaseLost; 2]);
    let again = rig.take(&q, 3).await;
    assert_eq!(numbers(&again), [0, 1, 2]);
    assert!(again.iter().all(|task| (task.deliveries, task.expiries) == (1, 0)));
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::LeaseLost; 2]);
}

fn withdrawal(pop: &Pop) -> Withdrawal {
    Withdrawal { stem: pop.stem, max_tasks: pop.max_tasks, request: pop.request.clone() }
}

/// G8: what a pop leased whose answer was lost is at the head again, in order, and as if never delivered; but for what
/// ended meanwhile.
pub(super) async fn a_withdrawn_pop_gives_back(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..5).await;
    let lost = pop(4);
    let held = tokens(&rig.pop(&q, lost.clone()).await.unwrap().tasks);
    rig.ack_one(&q, held[1]).await;
    assert_eq!(rig.withdraw(&q, withdrawal(&lost)).await.unwrap(), 3);
    assert_eq!(rig.withdraw(&q, withdrawal(&lost)).await.unwrap(), 0);
    assert_eq!(rig.counted(&q).await, Counts { ready: 4, inserted: 5, acked: 1, ..Counts::default() });
    let again = rig.take(&q, 5).await;
    assert_eq!(numbers(&again), [0, 2, 3, 4]);
    assert!(again.iter().all(|task| (task.deliveries, task.expiries) == (1, 0)));
}

/// G4, G8: a pop that arrives after it was withdrawn leases nothing, though what it was done with is acked.
pub(super) async fn a_pop_that_comes_after_its_withdrawal_leases_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let done = rig.take_one(&q).await;
    for late in [Pop { acks: vec![done.token], ..pop(1) }, attempt(1, "r", 1)] {
        assert_eq!(rig.withdraw(&q, withdrawal(&late)).await.unwrap(), 0);
        assert_eq!(rig.pop(&q, late).await.unwrap().tasks, []);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 2, acked: 1, ..Counts::default() });
    let another_try = rig.pop(&q, attempt(1, "r", 2)).await.unwrap().tasks;
    assert_eq!((numbers(&another_try), another_try[0].deliveries), (vec![1], 1));
}

/// G4, G8: of several tries whose answers were lost, the last one withdrawn gives back; one that was answered keeps.
pub(super) async fn all_tries_of_a_pop_are_withdrawn(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let tries = [attempt(1, "r", 1), attempt(1, "r", 2), attempt(1, "r", 3)];
    let mut held = Vec::new();
    for one in &tries {
        held = tokens(&rig.pop(&q, one.clone()).await.unwrap().tasks);
    }
    for one in &tries[..2] {
        assert_eq!(rig.withdraw(&q, withdrawal(one)).await.unwrap(), 0);
        assert_eq!(rig.heartbeat(&q, &held, Some(LEASE)).await.unwrap().outcomes, [Outcome::Applied]);
    }
    assert_eq!(rig.withdraw(&q, withdrawal(&tries[2])).await.unwrap(), 1);
    let again = rig.take_one(&q).await;
    assert_eq!((again.deliveries, again.expiries), (1, 0));
}

/// A pop of no task leases nothing: it tells what the request holds, and whether it is known.
pub(super) async fn a_pop_of_nothing_answers_what_is_held(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..5).await;
    let ask = async |try_number| rig.pop(&q, attempt(0, "r", try_number)).await.unwrap();
    let first = ask(1).await;
    assert_eq!((first.tasks.len(), first.known), (0, false));
    let leased = rig.pop(&q, attempt(3, "r", 2)).await.unwrap();
    assert_eq!((leased.tasks.len(), leased.known), (3, false));
    rig.ack_one(&q, leased.tasks[1].token).await;
    let again = ask(3).await;
    assert_eq!((tokens(&again.tasks), again.known), (vec![leased.tasks[0].token, leased.tasks[2].token], true));
    rig.ack(&q, &tokens(&again.tasks)).await.unwrap();
    let nothing = ask(4).await;
    assert_eq!((nothing.tasks.len(), nothing.known), (0, true));
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 5, acked: 3, ..Counts::default() });
    assert!(!rig.pop(&q, pop(0)).await.unwrap().known);
}
