//! Tasks that are not due yet.

use super::{reap::round, *};

/// G10, G14: a delay is counted from the insert, by the store's clock, to the millisecond.
pub(super) async fn a_delayed_task_is_delivered_when_it_is_due_and_not_before(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_new(&q, vec![after(1_000, task("0"))]).await[0];
    let waits = Counts { scheduled: 1, inserted: 1, ..Counts::default() };
    for passed in [0, 1, 998] {
        rig.pass(passed);
        let popped = rig.pop(&q, pop(1)).await.unwrap();
        assert_eq!((popped.tasks, popped.ready, popped.reclaimed), (vec![], 0, 0));
        assert_eq!(popped.due_in, Some(START + 1_000 - rig.now()));
        assert_eq!(rig.counted(&q).await, waits);
        assert_eq!(rig.seen(&q, id).await.unwrap().at, Some(START + 1_000));
    }
    rig.pass(1);
    let popped = rig.pop(&q, pop(1)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready, popped.reclaimed), (vec![0], 0, 1));
    let Leased { id: delivered, inserted_at, deliveries, failures, expiries, .. } = popped.tasks[0].clone();
    assert_eq!((delivered, inserted_at, deliveries, failures, expiries), (id, START, 1, 0, 0));
}

/// G10: a time to deliver at is met to the millisecond.
pub(super) async fn a_task_is_delivered_at_its_time(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let at = |number: usize, time| NewTask { due: Some(Due::At(time)), ..task(number.to_string()) };
    rig.insert_new(&q, vec![at(0, START + 50), at(1, START + 49)]).await;
    rig.pass(48);
    assert_eq!(rig.take(&q, 5).await, []);
    rig.pass(1);
    assert_eq!(numbers(&rig.take(&q, 5).await), [1]);
    rig.pass(1);
    assert_eq!(numbers(&rig.take(&q, 5).await), [0]);
}

/// G11: a time that has passed, or a delay of nothing, is as if it were not there: the task is at the tail at once.
pub(super) async fn a_time_that_has_passed_is_now(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let due = |number: usize, due| NewTask { due: Some(due), ..task(number.to_string()) };
    let past = [Due::At(START - 1), Due::At(0), Due::At(START), Due::In(0)];
    rig.insert_numbers(&q, 0..1).await;
    rig.insert_new(&q, past.into_iter().zip(1..).map(|(past, number)| due(number, past)).collect()).await;
    rig.insert_numbers(&q, 5..6).await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 6, inserted: 6, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [0, 1, 2, 3, 4, 5]);
}

/// G11: behind what is ready already, those that fall due first come first, and those inserted first of equal ones.
pub(super) async fn what_falls_due_joins_the_tail_in_due_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let delays = [300, 100, 200, 100, 300, 100];
    rig.insert_new(&q, (0..).zip(delays).map(|(at, delay): (usize, _)| after(delay, task(at.to_string()))).collect())
        .await;
    rig.pass(50);
    rig.insert_new(&q, vec![after(50, task("6"))]).await;
    rig.insert_numbers(&q, 7..9).await;
    rig.pass(450);
    assert_eq!(numbers(&rig.take(&q, 4).await), [7, 8, 1, 3]);
    rig.insert_numbers(&q, 9..10).await;
    assert_eq!(rig.drain(&q).await, [5, 6, 2, 0, 4, 9]);
}

/// G11: more than one step makes ready.
pub(super) async fn hundreds_fall_due_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let delay = |number: usize| 1 + (number as u64 * 7_919) % 449;
    rig.insert_new(&q, (0..450).map(|number| after(delay(number), task(number.to_string()))).collect()).await;
    let mut expected: Vec<usize> = (0..450).collect();
    expected.sort_by_key(|number| delay(*number));
    rig.pass(450);
    assert_eq!(rig.counted(&q).await, Counts { ready: 450, inserted: 450, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, expected);
    // And in one instant.
    rig.insert_new(&q, (0..450).map(|number| after(10, task(number.to_string()))).collect()).await;
    rig.pass(10);
    assert_eq!(rig.drain(&q).await, (0..450).collect::<Vec<_>>());
}

/// G15: a look, a count and the reaper make ready as a pop does, wherever nobody pops.
pub(super) async fn whoever_looks_makes_ready_what_is_due(open: Open) {
    let rig = open(RULES);
    let [looked, counted, reaped] = ["looked", "counted", "reaped"].map(queue);
    for q in [&looked, &counted, &reaped] {
        rig.insert_new(q, vec![after(10, task("0")), after(30, task("1"))]).await;
    }
    assert_eq!(rig.look_one(&looked).await, Sight { ready: 0, due_in: Some(10), reclaimed: 0 });
    rig.pass(10);
    assert_eq!(rig.look_one(&looked).await, Sight { ready: 1, due_in: Some(20), reclaimed: 1 });
    assert_eq!(rig.look_one(&looked).await, Sight { ready: 1, due_in: Some(20), reclaimed: 0 });
    let one_each = Counts { ready: 1, scheduled: 1, inserted: 2, ..Counts::default() };
    assert_eq!(rig.counted(&counted).await, one_each);
    assert_eq!(round(&rig, 10).await.1, [(reaped.clone(), 1)].into());
    for q in [&looked, &counted, &reaped] {
        assert_eq!(rig.counted(q).await, one_each);
        assert_eq!(rig.drain(q).await, [0]);
    }
}

/// G15: the first lease that ends, or the first task that falls due, whichever is first.
pub(super) async fn an_empty_pop_tells_what_comes_first(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let due_in = async || rig.pop(&q, pop(1)).await.unwrap().due_in;
    rig.insert_numbers(&q, 0..1).await;
    rig.take_one(&q).await;
    rig.insert_new(&q, vec![after(LEASE + 1, task("1"))]).await;
    assert_eq!(due_in().await, Some(LEASE));
    rig.insert_new(&q, vec![after(LEASE - 1, task("2"))]).await;
    assert_eq!(due_in().await, Some(LEASE - 1));
    rig.insert_new(&q, vec![after(5, task("3"))]).await;
    assert_eq!(due_in().await, Some(5));
    assert_eq!(rig.look_one(&q).await.due_in, Some(5));
    rig.pass(5);
    assert_eq!(due_in().await, None, "a pop that finds something tells nothing");
    assert_eq!(due_in().await, Some(LEASE - 6));
}

/// G10, G11: it is a delivery that counts, and the task joins the tail when the delay is over; no delay is the head.
pub(super) async fn what_is_put_back_with_a_delay_waits(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let held = tokens(&rig.take(&q, 3).await);
    let put_back = PutBack { delay: Some(100), ..back(&[held[2], held[0]]) };
    assert_eq!(rig.give_back(&q, put_back).await, Released { put_back: 2, ready: 0, dead_lettered: 0 });
    let put_back = PutBack { delay: Some(0), ..back(&held[1..2]) };
    assert_eq!(rig.give_back(&q, put_back).await, Released { put_back: 1, ready: 1, dead_lettered: 0 });
    assert_eq!(rig.put_back(&q, &held).await, [Outcome::LeaseLost; 3]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, scheduled: 2, inserted: 4, ..Counts::default() });
    assert_eq!(rig.look_one(&q).await, Sight { ready: 2, due_in: Some(100), reclaimed: 0 });
    rig.pass(99);
    assert_eq!(numbers(&rig.take(&q, 1).await), [1]);
    rig.pass(1);
    let rest = rig.take(&q, 4).await;
    assert_eq!(numbers(&rest), [3, 0, 2], "of one call, in the order of their delivery");
    let counters: Vec<_> = rest.iter().map(|task| (task.deliveries, task.failures, task.expiries)).collect();
    assert_eq!(counters, [(1, 0, 0), (2, 0, 0), (2, 0, 0)]);
}

/// G5: nobody holds a task that waits, whatever token it had.
pub(super) async fn what_waits_is_not_held(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let held = rig.take_one(&q).await.token;
    rig.give_back(&q, PutBack { delay: Some(10 * LEASE), ..back(&[held]) }).await;
    assert_eq!(rig.ack_one(&q, held).await, Outcome::LeaseLost);
    assert_eq!(rig.beat_one(&q, held, LEASE).await, Outcome::LeaseLost);
    assert_eq!(rig.held_released(&q, 0).await, 0);
    rig.pass(10 * LEASE - 1);
    assert_eq!(rig.counted(&q).await, Counts { scheduled: 1, inserted: 1, ..Counts::default() });
}
