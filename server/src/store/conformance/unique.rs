//! Tasks of which there is one at a time.

use super::*;

impl Rig {
    /// Inserts one task with a key, and answers whether it is new; if not, the answer has this id.
    async fn is_new(&self, q: &QueueName, key: &str, first: TaskId) -> bool {
        let task = with_key(9, key);
        let id = task.id;
        let inserted = self.insert(q, insert(vec![task])).await.unwrap();
        let is_new = inserted.duplicates.is_empty();
        let ids = vec![if is_new { id } else { first }];
        assert_eq!(
            inserted,
            Inserted { ids, duplicates: if is_new { vec![] } else { vec![0] }, replayed: false, ..Default::default() }
        );
        is_new
    }

    async fn insert_keyed(&self, q: &QueueName, number: usize, key: &str) -> TaskId {
        self.insert_new(q, vec![with_key(number, key)]).await[0]
    }
}

/// While one lives, wherever it is, a second one is not inserted, and is answered with the first one's id.
pub(super) async fn a_duplicate_is_answered_with_the_first_id(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = rig.insert_new(&q, vec![after(100, with_key(0, "k"))]).await[0];
    assert!(!rig.is_new(&q, "k", first).await, "scheduled");
    rig.pass(100);
    assert!(!rig.is_new(&q, "k", first).await, "due");
    rig.look_one(&q).await;
    assert!(!rig.is_new(&q, "k", first).await, "ready");
    let held = rig.take_one(&q).await.token;
    assert!(!rig.is_new(&q, "k", first).await, "leased");
    rig.give_back(&q, failed(&[held], "e")).await;
    assert!(!rig.is_new(&q, "k", first).await, "backed off");
    rig.pass(RULES.backoff.min);
    rig.take_one(&q).await;
    rig.pass(LEASE);
    assert!(!rig.is_new(&q, "k", first).await, "run out");
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
    assert!(rig.is_new(&q, "K", first).await, "another key");
    assert_eq!(rig.drain(&q).await, [0, 9]);
}

/// The others of the insert go in, in their order.
pub(super) async fn duplicates_within_one_insert_are_told(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = rig.insert_keyed(&q, 0, "old").await;
    let some = vec![with_key(1, "a"), task("2"), with_key(3, "a"), with_key(4, "old"), with_key(5, "b"), task("6")];
    let minted: Vec<TaskId> = some.iter().map(|task| task.id).collect();
    let inserted = rig.insert(&q, insert(some)).await.unwrap();
    assert_eq!(inserted.duplicates, [2, 3]);
    assert_eq!(inserted.ids, [minted[0], minted[1], minted[0], first, minted[4], minted[5]]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 5, inserted: 5, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [0, 1, 2, 5, 6]);
}

/// G3: a repetition is told what was told the first time, whatever became of the tasks.
pub(super) async fn a_repeated_request_tells_duplicates_again(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = rig.insert_keyed(&q, 0, "k").await;
    let call = || Insert { request: Some(key("r", 1)), ..insert(vec![with_key(1, "k"), task("2"), with_key(3, "l")]) };
    let inserted = rig.insert(&q, call()).await.unwrap();
    assert_eq!((inserted.ids[0], &*inserted.duplicates, inserted.replayed), (first, &[0][..], false));
    let again = Inserted { replayed: true, ..inserted };
    assert_eq!(rig.insert(&q, call()).await.unwrap(), again);
    let all = tokens(&rig.take(&q, 10).await);
    rig.ack(&q, &all).await.unwrap();
    assert_eq!(rig.insert(&q, call()).await.unwrap(), again);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 3, acked: 3, ..Counts::default() });
    // Also where nothing was inserted.
    let q = queue("nothing");
    rig.insert_keyed(&q, 0, "k").await;
    let call = || Insert { request: Some(key("r", 1)), ..insert(vec![with_key(1, "k")]) };
    let inserted = rig.insert(&q, call()).await.unwrap();
    let held = rig.take_one(&q).await.token;
    rig.ack_one(&q, held).await;
    assert_eq!(rig.insert(&q, call()).await.unwrap(), Inserted { replayed: true, ..inserted });
}

/// G3: a producer is told so too, at once and when it sends again.
pub(super) async fn a_producer_is_told_of_duplicates(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let numbered = |number, tasks| NumberedInsert { number, fingerprint: Fingerprint([1; 16]), tasks };
    let call = |inserts| Produce { producer: "p".to_owned(), inserts, waiting_here: 0, ..Default::default() };
    let inserts = || {
        let one = numbered(1, vec![with_key(0, "k"), task("1")]);
        call(vec![one, numbered(2, vec![with_key(2, "k"), task("3")]), numbered(3, vec![with_key(4, "k")])])
    };
    let first_call = inserts();
    let ids: Vec<Vec<TaskId>> =
        first_call.inserts.iter().map(|insert| insert.tasks.iter().map(|task| task.id).collect()).collect();
    let expected = |replayed| {
        vec![
            Inserted { ids: ids[0].clone(), duplicates: vec![], replayed, ..Default::default() },
            Inserted { ids: vec![ids[0][0], ids[1][1]], duplicates: vec![0], replayed, ..Default::default() },
            Inserted { ids: vec![ids[0][0]], duplicates: vec![0], replayed, ..Default::default() },
        ]
    };
    let Produced { inserted, refused } = rig.produce(&q, first_call).await.unwrap();
    assert!(refused.is_none() && inserted == expected(false), "{inserted:?}");
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
    let all = tokens(&rig.take(&q, 10).await);
    rig.ack(&q, &all).await.unwrap();
    let Produced { inserted, refused } = rig.produce(&q, inserts()).await.unwrap();
    assert!(refused.is_none() && inserted == expected(true), "{inserted:?}");
    assert_eq!(rig.counted(&q).await, Counts { inserted: 3, acked: 3, ..Counts::default() });
}

/// Whatever ends a task frees its key, and so does what makes it a dead letter.
pub(super) async fn the_key_is_free_when_its_task_is_gone(open: Open) {
    let rig = open(Rules { max_failures: 1, max_expiries: 1, ..RULES });
    let ways = ["acked", "failed", "rejected", "expired", "held", "deleted", "cancelled", "purged", "dropped"];
    for (at, way) in ways.into_iter().enumerate() {
        let q = queue(&format!("q{at}"));
        let id = rig.insert_keyed(&q, 0, "k").await;
        let held = match way {
            "deleted" | "purged" | "dropped" => None,
            _ => Some(rig.take_one(&q).await.token),
        };
        let held = held.as_slice();
        match way {
            "acked" => drop(rig.ack(&q, held).await.unwrap()),
            "failed" => drop(rig.give_back(&q, failed(held, "e")).await),
            "rejected" => drop(rig.give_back(&q, rejected(held, "e")).await),
            "expired" => {
                rig.pass(LEASE);
                rig.look_one(&q).await;
            }
            "held" => assert_eq!(rig.release_held(&q, 0).await.unwrap().dead_lettered, 1),
            "deleted" => assert_eq!(rig.delete(&q, &[id]).await.unwrap(), [Deleted::Gone]),
            "cancelled" => {
                assert_eq!(rig.delete(&q, &[id]).await.unwrap(), [Deleted::Cancelled]);
                assert!(!rig.is_new(&q, "k", id).await);
                rig.put_back(&q, held).await;
            }
            "purged" => assert_eq!(rig.purge(&q, State::Ready).await.unwrap(), 1),
            _ => assert!(rig.drop_queue(&q, true).await.unwrap()),
        }
        assert!(rig.is_new(&q, "k", id).await, "{way}");
        assert!(rig.insert(&q, insert(vec![with_key(8, "k")])).await.unwrap().duplicates == [0], "{way}");
        assert_eq!(rig.drain(&q).await, [9], "{way}");
    }
}

/// The end of the first one's time frees its key at once, though nobody dropped it yet; but not of one that is held.
pub(super) async fn the_key_of_a_task_is_free_when_its_time_is_over(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let mortal = |number, key: &str| {
        planned(number, Plan { ttl: Some(100), unique_key: Some(key.to_owned()), ..Plan::default() })
    };
    let first = rig.insert_new(&q, vec![mortal(0, "held"), mortal(1, "ready"), after(500, mortal(2, "waits"))]).await;
    rig.take_one(&q).await;
    rig.pass(99);
    assert!(!rig.is_new(&q, "ready", first[1]).await && !rig.is_new(&q, "waits", first[2]).await);
    rig.pass(1);
    assert!(rig.is_new(&q, "ready", first[1]).await && rig.is_new(&q, "waits", first[2]).await);
    assert!(!rig.is_new(&q, "held", first[0]).await);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, leased: 1, inserted: 5, expired: 2, ..Counts::default() });
    rig.pass(LEASE - 100);
    rig.look_one(&q).await;
    assert!(rig.is_new(&q, "held", first[0]).await, "it ran out, and was gone");
}

/// What ends later than its key was free again does not free the key of the next one.
pub(super) async fn a_dead_letter_does_not_free_the_key_of_another(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let mut dead = Vec::new();
    for number in 0..3 {
        dead.push(rig.insert_keyed(&q, number, "k").await);
        let held = rig.take_one(&q).await.token;
        rig.give_back(&q, rejected(&[held], "e")).await;
    }
    let live = rig.insert_keyed(&q, 3, "k").await;
    assert_eq!(rig.delete(&q, &dead[..1]).await.unwrap(), [Deleted::Gone]);
    assert!(!rig.is_new(&q, "k", live).await);
    assert_eq!(rig.purge(&q, State::Dead).await.unwrap(), 2);
    assert!(!rig.is_new(&q, "k", live).await);
}

/// G3, G9: a step that runs twice is as one that ran once.
pub(super) async fn a_second_run_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let old = rig.insert_keyed(&q, 0, "old").await;
    let call = insert(vec![with_key(1, "k"), with_key(2, "old"), with_key(3, "k"), task("4")]);
    let first = rig.insert(&q, call.clone()).await.unwrap();
    assert_eq!((first.ids[1], &*first.duplicates), (old, &[1, 2][..]));
    assert_eq!(rig.insert(&q, call).await.unwrap(), first);
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [0, 1, 4]);
}

/// G12: a key means something in its queue only, whatever its letters.
pub(super) async fn keys_are_apart(open: Open) {
    let (rig, q, other) = (open(RULES), queue("q"), queue("q::other"));
    let long = "ü".repeat(64);
    let keys = ["k", "K", " ", "0", "a:b", "{q}", "a\0b", "a", "1e3", "1000", &*long];
    for q in [&q, &other] {
        for (number, key) in keys.iter().enumerate() {
            rig.insert_keyed(q, number, key).await;
        }
    }
    for key in keys {
        let again = rig.insert(&q, insert(vec![with_key(9, key)])).await.unwrap();
        assert_eq!(again.duplicates, [0], "{key}");
    }
    assert_eq!(rig.drain(&q).await, (0..keys.len()).collect::<Vec<_>>());
    assert_eq!(rig.counted(&other).await.ready, keys.len() as u64);
}

/// More keys than a step of anything else takes.
pub(super) async fn a_thousand_keys_go_in_at_once(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let some = || (0..1_000).map(|number| with_key(number, &format!("k{number}"))).collect::<Vec<_>>();
    let ids = rig.insert_new(&q, some()).await;
    let again = rig.insert(&q, insert(some())).await.unwrap();
    assert_eq!(again, Inserted { ids, duplicates: (0..1_000).collect(), replayed: false, ..Default::default() });
    assert_eq!(rig.drain(&q).await, (0..1_000).collect::<Vec<_>>());
}
