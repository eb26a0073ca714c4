//! Tasks that come before others.

use super::*;

/// G11: strictly the highest first, whenever it came; in the order of their inserts within one.
pub(super) async fn the_highest_priority_comes_first_and_in_order_within(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let priorities = [0, 9, 5, 0, 9, 1, 5, 4];
    rig.insert_new(&q, (0..).zip(priorities).map(|(number, priority)| of_priority(number, priority)).collect()).await;
    assert_eq!(numbers(&rig.take(&q, 1).await), [1]);
    rig.insert_new(&q, vec![of_priority(8, 9)]).await;
    rig.insert_numbers(&q, 9..10).await;
    let mut one_by_one = Vec::new();
    for _ in 0..4 {
        one_by_one.extend(numbers(&rig.take(&q, 1).await));
    }
    assert_eq!(one_by_one, [4, 8, 2, 6]);
    assert_eq!(rig.drain(&q).await, [7, 5, 0, 3, 9]);
}

/// G11: a batch goes on with the next priority, and its bytes and its count are counted over all.
pub(super) async fn a_batch_goes_on_to_lower_priorities(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let insert = async || {
        let priorities = [0, 3, 0, 3, MAX_PRIORITY];
        rig.insert_new(&q, (0..).zip(priorities).map(|(number, priority)| of_priority(number, priority)).collect())
            .await;
    };
    insert().await;
    let popped = rig.pop(&q, pop(4)).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready), (vec![4, 1, 3, 0], 1));
    let orders: Vec<Token> = (0..4).map(|position| popped.tasks[0].token.stem().token(position)).collect();
    assert_eq!(tokens(&popped.tasks), orders);
    assert_eq!(rig.drain(&q).await, [2]);
    insert().await;
    let popped = rig.pop(&q, Pop { max_bytes: 2, ..pop(4) }).await.unwrap();
    assert_eq!((numbers(&popped.tasks), popped.ready), (vec![4, 1], 3));
}

/// G11: whichever way it comes back, behind all of a higher priority and before all of its own.
pub(super) async fn what_comes_back_is_at_the_head_of_its_own_priority(open: Open) {
    let rig = open(RULES);
    for (way, name) in ["put back", "unsent", "held", "ran out"].into_iter().zip(["a", "b", "c", "d"]) {
        let q = queue(name);
        let priorities = [5, 0, 5, 0, 9, 5, 0];
        rig.insert_new(&q, (0..).zip(priorities).map(|(number, priority)| of_priority(number, priority)).collect())
            .await;
        let held = rig.take(&q, 5).await;
        assert_eq!(numbers(&held), [4, 0, 2, 5, 1]);
        rig.insert_new(&q, vec![of_priority(7, 9), of_priority(8, 5)]).await;
        let mut back = tokens(&held);
        back.reverse();
        match way {
            "put back" => drop(rig.put_back(&q, &back).await),
            "unsent" => drop(rig.unsent(&q, &back, None).await),
            "held" => assert_eq!(rig.held_released(&q, 0).await, 5),
            _ => rig.pass(LEASE),
        }
        assert_eq!(rig.drain(&q).await, [4, 7, 0, 2, 5, 8, 1, 3, 6], "{way}");
    }
}

/// G11: behind those of its own priority that are ready, and before all of a lower one.
pub(super) async fn what_falls_due_joins_the_tail_of_its_own_priority(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![after(20, of_priority(0, 5)), after(10, of_priority(1, 5)), after(10, task("2"))]).await;
    rig.insert_new(&q, vec![of_priority(3, 5), task("4"), of_priority(5, 4), of_priority(6, 6)]).await;
    let held = rig.take_one(&q).await;
    assert_eq!(numbers(std::slice::from_ref(&held)), [6]);
    rig.give_back(&q, PutBack { delay: Some(15), ..back(&[held.token]) }).await;
    rig.pass(20);
    assert_eq!(rig.drain(&q).await, [6, 3, 1, 0, 5, 4, 2]);
}

/// G11: hundreds of each go in mixed and come out in order, after they ran out too.
pub(super) async fn hundreds_of_each_priority_come_out_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    const MANY: usize = 1_000;
    let priority = |number: usize| (number * 7 % 3 * 4) as u8;
    rig.insert_new(&q, (0..MANY).map(|number| of_priority(number, priority(number))).collect()).await;
    let mut expected: Vec<usize> = (0..MANY).collect();
    expected.sort_by_key(|number| (u8::MAX - priority(*number), *number));
    for part in expected.chunks(150).take(5) {
        assert_eq!(numbers(&rig.take(&q, 150).await), part);
    }
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1_000, inserted: 1_000, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, expected);
}

/// The age that is told of the head is that of the task that comes next.
pub(super) async fn the_oldest_is_the_head_of_the_highest_priority(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    rig.pass(100);
    rig.insert_new(&q, vec![of_priority(1, 1)]).await;
    rig.pass(10);
    assert_eq!(rig.count(&q).await.unwrap().oldest_ready, Some(10));
    rig.take_one(&q).await;
    assert_eq!(rig.count(&q).await.unwrap().oldest_ready, Some(110));
}
