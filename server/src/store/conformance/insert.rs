//! Inserts: what goes in comes out, once and in order.

use super::*;

/// G2, G8: the envelope comes back as it was, with the time of the insert by the store's clock.
pub(super) async fn what_was_inserted_is_delivered_byte_for_byte(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let every_byte: Vec<u8> = (0..=255).collect();
    let mut random = vec![0; 300_000];
    getrandom::fill(&mut random).unwrap();
    let envelopes = [vec![0], vec![0; 17], every_byte, b"\r\n$-1\r\n".to_vec(), vec![0xff; 3], random];
    for envelope in envelopes {
        rig.pass(1);
        let inserted = rig.insert(&q, insert(vec![task(envelope.clone())])).await.unwrap();
        let inserted_at = rig.now();
        rig.pass(10);
        let leased = rig.take_one(&q).await;
        assert!(leased.envelope == envelope, "{} bytes", envelope.len());
        assert_eq!((inserted.ids, inserted.replayed), (vec![leased.id], false));
        assert_eq!((leased.inserted_at, leased.deliveries, leased.expiries), (inserted_at, 1, 0));
        assert_eq!(rig.ack_one(&q, leased.token).await, Outcome::Applied);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 0, leased: 0, inserted: 6, acked: 6, ..Counts::default() });
    assert!(rig.take(&q, 10).await.is_empty());
}

/// G11: first in, first out, over single inserts and batches.
pub(super) async fn tasks_come_out_in_the_order_they_went_in(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    for number in 0..5 {
        rig.insert_numbers(&q, number..number + 1).await;
    }
    let batch = rig.insert_numbers(&q, 5..12).await;
    assert_eq!(numbers(&rig.take(&q, 3).await), [0, 1, 2]);
    rig.insert_numbers(&q, 12..13).await;
    for number in 3..5 {
        assert_eq!(numbers(&[rig.take_one(&q).await]), [number]);
    }
    let of_batch = rig.take(&q, 7).await;
    assert_eq!(numbers(&of_batch), [5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(ids(&of_batch), batch.ids);
    assert_eq!(rig.drain(&q).await, [12]);
}

/// G1, G11: the largest batch goes in whole.
pub(super) async fn a_thousand_tasks_go_in_at_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let inserted = rig.insert_repeatably(&q, 0..1000, "r").await;
    assert_eq!(inserted.ids.len(), 1000);
    assert_eq!(rig.insert_repeatably(&q, 0..1000, "r").await, Inserted { replayed: true, ..inserted });
    assert_eq!(rig.drain(&q).await, (0..1000).collect::<Vec<_>>());
    assert_eq!(rig.counted(&q).await, Counts { leased: 1000, inserted: 1000, ..Counts::default() });
}

/// G1, G4: an ack of one of a thousand equal values ends this one alone.
pub(super) async fn equal_envelopes_are_separate_tasks(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let equal: Vec<NewTask> = (0..1000).map(|_| task("same")).collect();
    let ids = rig.insert(&q, insert(equal)).await.unwrap().ids;
    let mut last = rig.take_one(&q).await;
    for acked in 1..=1000 {
        assert_eq!((last.envelope.as_ref(), last.id), (&b"same"[..], ids[acked - 1]));
        // Acks the one before and pops the next.
        let popped = rig.pop(&q, Pop { acks: vec![last.token], ..pop(1) }).await.unwrap();
        assert_eq!(popped.acks, [Outcome::Applied]);
        match popped.tasks.into_iter().next() {
            Some(next) => last = next,
            None => assert_eq!(acked, 1000),
        }
        if acked % 250 == 0 {
            let (acked, leased) = (acked as u64, u64::from(acked < 1000));
            let ready = 1000 - acked - leased;
            assert_eq!(rig.counted(&q).await, Counts { ready, leased, inserted: 1000, acked, ..Counts::default() });
        }
    }
}

/// G3: the same request id inserts once, also after its tasks are gone.
pub(super) async fn a_repeated_request_gets_the_first_answer(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = rig.insert_repeatably(&q, 0..3, "r").await;
    assert!(!first.replayed);
    let again = Inserted { replayed: true, ..first };
    // The caller mints new ids for each try; those of the first call are answered.
    assert_eq!(rig.insert_repeatably(&q, 0..3, "r").await, again);
    let leased = rig.take(&q, 10).await;
    assert_eq!(numbers(&leased), [0, 1, 2]);
    assert_eq!(rig.insert_repeatably(&q, 0..3, "r").await, again);
    rig.ack(&q, &tokens(&leased)).await.unwrap();
    assert_eq!(rig.insert_repeatably(&q, 0..3, "r").await, again);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 3, acked: 3, ..Counts::default() });
    // Ids of any bytes, and none is taken for another.
    for id in ["R", "r ", "i", "r\0", "ü\n", &"x".repeat(200)] {
        assert!(!rig.insert_repeatably(&q, 0..1, id).await.replayed, "{id:?}");
        assert!(rig.insert_repeatably(&q, 0..1, id).await.replayed, "{id:?}");
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 6, inserted: 9, acked: 3, leased: 0, ..Counts::default() });
}

/// G3: the same request id with other content is refused, and nothing is inserted.
pub(super) async fn a_reused_request_id_is_refused(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_repeatably(&q, 0..1, "r").await;
    let other = Insert { request: Some(key("r", 2)), ..insert(tasks(1..3)) };
    for _ in 0..2 {
        assert!(matches!(rig.insert(&q, other.clone()).await, Err(StoreError::RequestIdReused)));
        assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
    }
    assert!(rig.insert_repeatably(&q, 0..1, "r").await.replayed);
    assert_eq!(rig.drain(&q).await, [0]);
}

/// G12: a request id means something in its queue only, and an insert's is not a pop's.
pub(super) async fn request_ids_are_per_queue_and_per_operation(open: Open) {
    let (rig, q, other) = (open(RULES), queue("q"), queue("q::other"));
    rig.insert_repeatably(&q, 0..1, "r").await;
    let elsewhere = Insert { request: Some(key("r", 9)), ..insert(tasks(5..6)) };
    assert!(!rig.insert(&other, elsewhere).await.unwrap().replayed);
    let mut popping = attempt(1, "r", 1);
    popping.request.as_mut().unwrap().key = key("r", 7);
    assert_eq!(numbers(&rig.pop(&q, popping).await.unwrap().tasks), [0]);
    assert!(rig.insert_repeatably(&q, 0..1, "r").await.replayed);
    assert_eq!(rig.drain(&other).await, [5]);
}

/// G3: without a request id, equal calls are different inserts.
pub(super) async fn without_a_request_nothing_is_remembered(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = rig.insert_numbers(&q, 0..2).await;
    let second = rig.insert_numbers(&q, 0..2).await;
    assert!(!first.replayed && !second.replayed && first.ids != second.ids);
    assert_eq!(rig.drain(&q).await, [0, 1, 0, 1]);
}

/// G3, G9: a step that runs twice, with the ids that were minted for it, is as one that ran once.
pub(super) async fn a_second_run_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let call = insert(tasks(0..3));
    let first = rig.insert(&q, call.clone()).await.unwrap();
    assert_eq!(rig.insert(&q, call.clone()).await.unwrap(), first);
    let repeatable = Insert { request: Some(key("r", 1)), ..insert(tasks(3..5)) };
    let second = rig.insert(&q, repeatable.clone()).await.unwrap();
    assert_eq!(rig.insert(&q, repeatable).await.unwrap().ids, second.ids);
    assert_eq!(rig.counted(&q).await, Counts { ready: 5, inserted: 5, ..Counts::default() });
    let leased = rig.take(&q, 5).await;
    assert_eq!(numbers(&leased), [0, 1, 2, 3, 4]);
    assert_eq!(rig.insert(&q, call).await.unwrap(), first);
    assert_eq!(rig.counted(&q).await, Counts { leased: 5, inserted: 5, ..Counts::default() });
}

/// G1, G4: nor does a second run that comes when some of its tasks are gone put the others in twice.
pub(super) async fn a_second_run_that_comes_late_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let call = insert(tasks(0..3));
    let first = rig.insert(&q, call.clone()).await.unwrap();
    let gone = rig.take_one(&q).await;
    rig.ack_one(&q, gone.token).await;
    assert_eq!(rig.insert(&q, call).await.unwrap(), first);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, leased: 0, inserted: 3, acked: 1, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [1, 2]);
}

/// G3: a request id is remembered for the window at least, and for twice the window at most.
pub(super) async fn a_request_is_remembered_for_the_window_and_forgotten_after_two(open: Open) {
    let window = 1000;
    let (rig, q) = (open(remembering(Remember { window, ..RULES.remember })), queue("q"));
    for at in [0, 1, 999, 1000, 1001, 1500, 1999, 2000, 2500, 2999, 3000, 3500, 4000] {
        rig.set_now(START + at);
        assert!(!rig.insert_repeatably(&q, 0..1, &at.to_string()).await.replayed, "{at}");
    }
    for remembered in [4000, 3500, 3000] {
        assert!(rig.insert_repeatably(&q, 0..1, &remembered.to_string()).await.replayed, "{remembered}");
    }
    for forgotten in [0, 1, 999, 1000, 1001, 1500, 1999, 2000] {
        assert!(!rig.insert_repeatably(&q, 0..1, &forgotten.to_string()).await.replayed, "{forgotten}");
    }
    // Also where nobody inserts any more.
    rig.pass(window);
    assert!(rig.insert_repeatably(&q, 0..1, "4000").await.replayed);
    rig.pass(window);
    assert!(!rig.insert_repeatably(&q, 0..1, "4000").await.replayed);
}

/// G3: of more request ids than are to be remembered, the older ones go; the newest half stays.
pub(super) async fn the_newest_half_of_the_requests_is_remembered(open: Open) {
    let (rig, q) = (open(remembering(Remember { entries: 10, ..RULES.remember })), queue("q"));
    for number in 0..100 {
        assert!(!rig.insert_repeatably(&q, number..number + 1, &number.to_string()).await.replayed);
    }
    for newest in 95..100 {
        assert!(rig.insert_repeatably(&q, newest..newest + 1, &newest.to_string()).await.replayed, "{newest}");
    }
    for oldest in [89, 50, 0] {
        assert!(!rig.insert_repeatably(&q, oldest..oldest + 1, &oldest.to_string()).await.replayed, "{oldest}");
    }
}
