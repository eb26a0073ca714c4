//! Queues that are full.

use super::*;

impl Rig {
    /// Whether so many tasks of so many bytes are let in; if not, for this limit.
    async fn lets_in(&self, q: &QueueName, count: usize, size: usize, limit: (Setting, u64)) -> bool {
        match self.insert(q, insert((0..count).map(|_| task(vec![b'0'; size])).collect())).await {
            Ok(inserted) => inserted.ids.len() == count,
            Err(StoreError::QueueFull(setting, max)) if (setting, max) == limit => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// G13, G14: exactly so many tasks that are ready, scheduled or leased; an insert that is refused leaves nothing behind.
pub(super) async fn a_queue_has_at_most_its_number_of_tasks(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let limit = (Setting::MaxTasks, 5);
    rig.set(&q, limit.0, limit.1).await;
    assert!(!rig.lets_in(&q, 6, 1, limit).await);
    assert_eq!(rig.counted(&q).await, Counts::default());
    assert!(rig.lets_in(&q, 3, 1, limit).await);
    rig.insert_new(&q, vec![after(10, task("0"))]).await;
    rig.take_one(&q).await;
    assert!(!rig.lets_in(&q, 2, 1, limit).await);
    assert!(rig.lets_in(&q, 1, 1, limit).await);
    assert!(!rig.lets_in(&q, 1, 1, limit).await);
    let refused = Produce {
        producer: "p".to_owned(),
        inserts: vec![NumberedInsert { number: 1, fingerprint: Fingerprint([1; 16]), tasks: tasks(0..1) }],
        waiting_here: 0,
        ..Default::default()
    };
    let produced = rig.produce(&q, refused.clone()).await.unwrap();
    assert!(
        matches!(produced.refused, Some(StoreError::QueueFull(Setting::MaxTasks, 5))) && produced.inserted.is_empty()
    );
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, scheduled: 1, leased: 1, inserted: 5, ..Counts::default() });
    rig.set(&q, Setting::MaxTasks, 6).await;
    assert!(rig.produce(&q, refused).await.unwrap().refused.is_none(), "the number is as good as before");
}

/// G13: whatever makes room does it at once, and what is not an insert goes on.
pub(super) async fn full_is_not_stuck(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let limit = (Setting::MaxTasks, 4);
    rig.set(&q, limit.0, limit.1).await;
    rig.insert_repeatably(&q, 0..4, "r").await;
    let held = tokens(&rig.take(&q, 4).await);
    assert_eq!(rig.put_back(&q, &held[..1]).await, [Outcome::Applied]);
    assert_eq!(rig.beat_one(&q, held[1], LEASE).await, Outcome::Applied);
    rig.give_back(&q, failed(&held[1..2], "e")).await;
    assert!(!rig.lets_in(&q, 1, 1, limit).await);
    assert!(rig.insert_repeatably(&q, 0..4, "r").await.replayed);
    rig.ack_one(&q, held[2]).await;
    assert!(rig.lets_in(&q, 1, 1, limit).await && !rig.lets_in(&q, 1, 1, limit).await);
    // A dead letter counts no more, nor does it need room to go back.
    rig.give_back(&q, rejected(&held[3..], "no")).await;
    assert!(rig.lets_in(&q, 1, 1, limit).await && !rig.lets_in(&q, 1, 1, limit).await);
    let dead: Vec<TaskId> = rig.listed(&q, State::Dead, 10).await.iter().map(|seen| seen.id).collect();
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Ready]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 4, scheduled: 1, inserted: 6, acked: 1, ..Counts::default() });
    rig.delete(&q, &dead).await.unwrap();
    assert!(!rig.lets_in(&q, 1, 1, limit).await);
    rig.purge(&q, State::Scheduled).await.unwrap();
    assert!(rig.lets_in(&q, 1, 1, limit).await && !rig.lets_in(&q, 1, 1, limit).await);
}

/// G14: the bytes of envelopes, to the byte, of plain tasks and of those with plans, whatever becomes of them.
pub(super) async fn a_queue_has_at_most_its_number_of_bytes(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let limit = (Setting::MaxBytes, 1_000);
    rig.set(&q, limit.0, limit.1).await;
    assert!(!rig.lets_in(&q, 1, 1_001, limit).await);
    assert!(rig.lets_in(&q, 2, 300, limit).await);
    assert!(!rig.lets_in(&q, 1, 401, limit).await);
    let plan = || Some(Plan { priority: 3, unique_key: Some("k".repeat(99)), ..Plan::default() });
    let planned = |size| NewTask::new(TaskId::mint(1).unwrap()[0], vec![b'0'; size].into(), plan());
    rig.insert_new(&q, vec![after(9, planned(400))]).await;
    assert!(!rig.lets_in(&q, 1, 1, limit).await);
    assert!(rig.lets_in(&q, 1, 0, limit).await, "of nothing, there is room for any number");
    let held = tokens(&rig.take(&q, 2).await);
    rig.ack_one(&q, held[0]).await;
    assert!(!rig.lets_in(&q, 1, 301, limit).await && rig.lets_in(&q, 1, 300, limit).await);
    rig.give_back(&q, rejected(&held[1..], "no")).await;
    assert!(!rig.lets_in(&q, 1, 301, limit).await && rig.lets_in(&q, 1, 300, limit).await);
    assert_eq!(rig.purge(&q, State::Scheduled).await.unwrap(), 1);
    assert!(!rig.lets_in(&q, 1, 401, limit).await && rig.lets_in(&q, 1, 400, limit).await);
    let dead = rig.listed(&q, State::Dead, 1).await[0].id;
    assert_eq!(rig.redrive(&q, &[dead]).await.unwrap(), [Redriven::Ready]);
    rig.set(&q, limit.0, 1_300).await;
    assert!(!rig.lets_in(&q, 1, 1, (limit.0, 1_300)).await, "what was redriven counts again");
}

/// A limit that is set late counts exactly what is there.
pub(super) async fn bytes_that_are_there_already_are_counted(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let limit = |max| (Setting::MaxBytes, max);
    rig.insert(&q, insert((0..455).map(|number| task(vec![b'0'; 1 + number % 7])).collect())).await.unwrap();
    rig.insert_new(&q, vec![after(9, of_priority(12_345, 5)), with_key(678, "k")]).await;
    let held = tokens(&rig.take(&q, 200).await);
    rig.ack(&q, &held[..50]).await.unwrap();
    rig.give_back(&q, rejected(&held[50..60], "no")).await;
    let sizes = (60..455).map(|number| 1 + number as u64 % 7).sum::<u64>() + 5 + 3;
    rig.set(&q, Setting::MaxBytes, sizes + 10).await;
    assert!(!rig.lets_in(&q, 1, 11, limit(sizes + 10)).await);
    assert!(rig.lets_in(&q, 1, 10, limit(sizes + 10)).await);
    assert!(!rig.lets_in(&q, 1, 1, limit(sizes + 10)).await);
    // Unset, and set again after more has come and gone.
    rig.set(&q, Setting::MaxBytes, None).await;
    assert!(rig.lets_in(&q, 5, 100, limit(0)).await);
    let large = tokens(&rig.take(&q, 3).await);
    rig.ack(&q, &large).await.unwrap();
    let mut bytes = 0;
    for state in [State::Ready, State::Scheduled, State::Leased] {
        bytes += rig.listed(&q, state, 200).await.iter().map(|seen| seen.envelope.len() as u64).sum::<u64>();
    }
    rig.set(&q, Setting::MaxBytes, bytes + 1).await;
    assert!(!rig.lets_in(&q, 1, 2, limit(bytes + 1)).await && rig.lets_in(&q, 1, 1, limit(bytes + 1)).await);
}

/// Duplicates need no room, and neither does a repetition or a second run.
pub(super) async fn duplicates_need_no_room(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.change(&q, &[(Setting::MaxTasks, Some(2)), (Setting::MaxBytes, Some(2))]).await.unwrap();
    let call = insert(vec![with_key(1, "k"), with_key(2, "k"), with_key(3, "l"), with_key(4, "l")]);
    let first = rig.insert(&q, call.clone()).await.unwrap();
    assert_eq!(first.duplicates, [1, 3]);
    assert_eq!(rig.insert(&q, call).await.unwrap(), first);
    assert_eq!(rig.insert(&q, insert(vec![with_key(5, "l")])).await.unwrap().duplicates, [0]);
    let refused = rig.insert(&q, insert(vec![with_key(5, "l"), with_key(6, "m")])).await;
    assert!(matches!(refused, Err(StoreError::QueueFull(Setting::MaxTasks, 2))), "{refused:?}");
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 2, ..Counts::default() });
    // What was refused has no key.
    let held = tokens(&rig.take(&q, 2).await);
    rig.ack(&q, &held).await.unwrap();
    rig.insert_new(&q, vec![with_key(7, "m")]).await;
}

/// G1: a limit that is lowered drops nothing, and lets nothing in until there is room again.
pub(super) async fn a_limit_may_be_lower_than_what_is_there(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..5).await;
    for limit in [(Setting::MaxTasks, 3), (Setting::MaxBytes, 3)] {
        rig.set(&q, limit.0, limit.1).await;
        assert!(!rig.lets_in(&q, 1, 1, limit).await);
        let held = tokens(&rig.take(&q, 2).await);
        rig.ack(&q, &held).await.unwrap();
        assert!(!rig.lets_in(&q, 1, 1, limit).await);
        let held = rig.take_one(&q).await.token;
        rig.ack_one(&q, held).await;
        assert!(rig.lets_in(&q, 1, 1, limit).await && !rig.lets_in(&q, 1, 1, limit).await);
        rig.set(&q, limit.0, None).await;
        assert!(rig.lets_in(&q, 2, 1, limit).await);
    }
    assert_eq!(rig.counted(&q).await.ready, 5);
}
