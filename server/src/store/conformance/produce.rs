//! Inserts of producers, who number them: each is done once, in order, however often it is sent.

use super::*;
use crate::store::PRODUCER_ANSWERS;

fn numbered(number: u64, values: Range<usize>) -> NumberedInsert {
    NumberedInsert { number, fingerprint: Fingerprint([1; 16]), tasks: tasks(values) }
}

fn produce(producer: &str, inserts: Vec<NumberedInsert>) -> Produce {
    Produce { producer: producer.to_owned(), inserts, waiting_here: 0, ..Default::default() }
}

/// An insert of one task for each number, whose value is the number too.
fn one_each(numbers: Range<usize>) -> Vec<NumberedInsert> {
    numbers.map(|number| numbered(number as u64, number..number + 1)).collect()
}

fn ids_of(inserts: &[NumberedInsert]) -> Vec<Vec<TaskId>> {
    inserts.iter().map(|insert| insert.tasks.iter().map(|task| task.id).collect()).collect()
}

impl Rig {
    /// All of them are done, or were; answers the ids and whether they were.
    async fn produced(&self, q: &QueueName, producer: &str, inserts: Vec<NumberedInsert>) -> Vec<(Vec<TaskId>, bool)> {
        let count = inserts.len();
        let Produced { inserted, refused } = self.produce(q, produce(producer, inserts)).await.unwrap();
        assert!(refused.is_none(), "{refused:?}");
        assert_eq!(inserted.len(), count);
        inserted.into_iter().map(|inserted| (inserted.ids, inserted.replayed)).collect()
    }

    /// All of them are new.
    async fn produced_new(&self, q: &QueueName, producer: &str, inserts: Vec<NumberedInsert>) -> Vec<Vec<TaskId>> {
        let minted = ids_of(&inserts);
        let answers = self.produced(q, producer, inserts).await;
        assert!(answers.iter().all(|(_, replayed)| !replayed), "{answers:?}");
        assert_eq!(answers.into_iter().map(|(ids, _)| ids).collect::<Vec<_>>(), minted);
        minted
    }

    /// All of them were answered before, and so.
    async fn produced_before(&self, q: &QueueName, producer: &str, inserts: Vec<NumberedInsert>, ids: &[Vec<TaskId>]) {
        let answers = self.produced(q, producer, inserts).await;
        assert!(answers.iter().all(|(_, replayed)| *replayed), "{answers:?}");
        assert_eq!(answers.into_iter().map(|(ids, _)| ids).collect::<Vec<_>>(), ids);
    }
}

/// G2, G11: the numbers may have gaps.
pub(super) async fn inserts_of_a_producer_come_out_in_the_order_of_their_numbers(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let inserts = vec![numbered(1, 0..1), numbered(2, 1..4), numbered(7, 4..6)];
    let mut minted = rig.produced_new(&q, "p", inserts).await;
    minted.extend(rig.produced_new(&q, "p", vec![numbered(8, 6..7)]).await);
    let leased = rig.take(&q, 100).await;
    assert_eq!(numbers(&leased), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(ids(&leased), minted.concat());
    assert!(leased.iter().all(|task| task.inserted_at == START));
    assert_eq!(rig.counted(&q).await, Counts { leased: 7, inserted: 7, ..Counts::default() });
}

/// As many as an insert may have.
pub(super) async fn a_thousand_tasks_go_in_with_one_number(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let minted = rig.produced_new(&q, "p", vec![numbered(1, 0..1_000)]).await;
    rig.produced_before(&q, "p", vec![numbered(1, 0..1_000)], &minted).await;
    assert_eq!(rig.drain(&q).await, (0..1_000).collect::<Vec<_>>());
}

/// G3: also when its tasks are gone.
pub(super) async fn a_number_that_was_used_is_answered_again(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let inserts = || vec![numbered(3, 0..2), numbered(5, 2..3), numbered(9, 3..5)];
    let minted = rig.produced_new(&q, "p", inserts()).await;
    rig.produced_before(&q, "p", inserts(), &minted).await;
    // One alone, two with a gap, and one that is in the middle of what was one call.
    rig.produced_before(&q, "p", vec![numbered(9, 3..5)], &minted[2..]).await;
    rig.produced_before(&q, "p", vec![numbered(5, 2..3)], &minted[1..2]).await;
    rig.produced_before(&q, "p", vec![numbered(3, 0..2), numbered(9, 3..5)], &[minted[0].clone(), minted[2].clone()])
        .await;
    let leased = rig.take(&q, 100).await;
    assert_eq!(numbers(&leased), [0, 1, 2, 3, 4]);
    rig.ack(&q, &tokens(&leased)).await.unwrap();
    rig.produced_before(&q, "p", inserts(), &minted).await;
    assert_eq!(rig.counted(&q).await, Counts { inserted: 5, acked: 5, ..Counts::default() });
    // A number that was left out is one of the past, and was never answered.
    let answer = rig.produce(&q, produce("p", vec![numbered(4, 9..10)])).await.unwrap();
    assert!(answer.inserted.is_empty() && matches!(answer.refused, Some(StoreError::NumberForgotten)));
}

/// G3: what a producer sends whose stream broke.
pub(super) async fn known_numbers_and_new_ones_may_come_together(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let minted = rig.produced_new(&q, "p", one_each(1..101)).await;
    let again = one_each(51..151);
    let fresh = ids_of(&again[50..]);
    let answers = rig.produced(&q, "p", again).await;
    let (known, new) = answers.split_at(50);
    assert!(known.iter().all(|(_, replayed)| *replayed) && new.iter().all(|(_, replayed)| !replayed));
    assert_eq!(known.iter().map(|(ids, _)| ids.clone()).collect::<Vec<_>>(), minted[50..]);
    assert_eq!(new.iter().map(|(ids, _)| ids.clone()).collect::<Vec<_>>(), fresh);
    assert_eq!(rig.drain(&q).await, (1..151).collect::<Vec<_>>());
}

/// G3, G9: a step that runs twice is as one that ran once, and answers so.
pub(super) async fn a_second_run_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let call = produce("p", one_each(1..4));
    for _ in 0..2 {
        let Produced { inserted, refused } = rig.produce(&q, call.clone()).await.unwrap();
        assert!(refused.is_none() && inserted.iter().all(|inserted| !inserted.replayed));
        assert_eq!(inserted.into_iter().map(|inserted| inserted.ids).collect::<Vec<_>>(), ids_of(&call.inserts));
    }
    let gone = rig.take_one(&q).await;
    rig.ack_one(&q, gone.token).await;
    assert!(rig.produce(&q, call).await.unwrap().refused.is_none());
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 3, acked: 1, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [2, 3]);
}

/// G1, G4: no task is in a queue twice.
pub(super) async fn a_second_run_that_comes_when_the_producer_is_forgotten_changes_nothing(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let call = produce("p", vec![numbered(1, 0..3)]);
    rig.produce(&q, call.clone()).await.unwrap();
    let gone = rig.take_one(&q).await;
    rig.ack_one(&q, gone.token).await;
    rig.pass(2 * RULES.remember.window);
    let answer = rig.produce(&q, call.clone()).await.unwrap();
    assert_eq!(answer.inserted[0].ids, ids_of(&call.inserts)[0]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 3, acked: 1, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [1, 2]);
}

/// G3, G13: those before it are done, and it can be sent again as it was.
pub(super) async fn a_number_with_other_content_is_refused_with_all_behind_it(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let minted = rig.produced_new(&q, "p", one_each(1..4)).await;
    let other = NumberedInsert { fingerprint: Fingerprint([2; 16]), ..numbered(2, 7..8) };
    let answer = rig.produce(&q, produce("p", vec![numbered(1, 1..2), other, numbered(4, 4..5)])).await.unwrap();
    assert!(matches!(answer.refused, Some(StoreError::RequestIdReused)));
    assert_eq!(answer.inserted, [Inserted { ids: minted[0].clone(), replayed: true, ..Inserted::default() }]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, inserted: 3, ..Counts::default() });
    rig.produced_new(&q, "p", vec![numbered(4, 4..5)]).await;
    assert_eq!(rig.drain(&q).await, [1, 2, 3, 4]);
}

/// G3: exactly so many, however they came.
pub(super) async fn the_last_1024_answers_are_remembered(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let mut minted = vec![Vec::new()];
    for step in [1..2, 2..3, 3..203, 203..403, 403..603, 603..803, 803..1_003, 1_003..1_103, 1_103..1_203, 1_203..1_303]
    {
        minted.extend(rig.produced_new(&q, "p", one_each(step)).await);
    }
    let last = minted.len() - 1;
    let first = last + 1 - PRODUCER_ANSWERS;
    for known in [first, first + 1, 500, 1_000, last] {
        rig.produced_before(&q, "p", one_each(known..known + 1), &minted[known..=known]).await;
    }
    rig.produced_before(&q, "p", one_each(first..first + 200), &minted[first..first + 200]).await;
    for forgotten in [first - 1, first - 2, 3, 2, 1] {
        let answer = rig.produce(&q, produce("p", one_each(forgotten..forgotten + 3))).await.unwrap();
        assert!(
            answer.inserted.is_empty() && matches!(answer.refused, Some(StoreError::NumberForgotten)),
            "{forgotten}"
        );
    }
    assert_eq!(rig.counted(&q).await.inserted, 1_302);
}

/// All of them, those that a double or a signed number has no room for included.
pub(super) async fn numbers_have_64_bits(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let high = [1, 255, 256, u64::from(u32::MAX), 1 << 32, 1 << 53, (1 << 53) + 1, i64::MAX as u64, 1 << 63, u64::MAX];
    let inserts = || high.iter().enumerate().map(|(at, number)| numbered(*number, at..at + 1));
    let mut minted = Vec::new();
    for insert in inserts() {
        minted.extend(rig.produced_new(&q, "p", vec![insert]).await);
    }
    rig.produced_before(&q, "p", inserts().collect(), &minted).await;
    for (at, insert) in inserts().enumerate() {
        rig.produced_before(&q, "p", vec![insert], &minted[at..=at]).await;
    }
    assert_eq!(rig.drain(&q).await, (0..high.len()).collect::<Vec<_>>());
}

/// G12: a number means something of its producer in its queue only, and is no request id.
pub(super) async fn producers_and_queues_are_apart(open: Open) {
    let (rig, q, other) = (open(RULES), queue("q"), queue("q::other"));
    let long = "ü".repeat(64);
    for (q, producer, value) in [(&q, "p", 0), (&q, "{p}:0", 1), (&q, &*long, 2), (&other, "p", 3)] {
        rig.produced_new(q, producer, vec![numbered(1, value..value + 1)]).await;
        let answers = rig.produced(q, producer, vec![numbered(1, 9..10)]).await;
        assert!(answers[0].1, "{producer}");
    }
    assert!(!rig.insert_repeatably(&q, 4..5, "p").await.replayed);
    assert_eq!((rig.drain(&q).await, rig.drain(&other).await), (vec![0, 1, 2, 4], vec![3]));
}

/// G3: to the millisecond, counted from what it last inserted; a repetition is nothing new.
pub(super) async fn a_producer_is_forgotten_when_it_was_quiet_for_two_windows(open: Open) {
    let window = 1_000;
    let (rig, q) = (open(remembering(Remember { window, ..RULES.remember })), queue("q"));
    let first = rig.produced_new(&q, "p", one_each(1..3)).await;
    rig.pass(2 * window - 1);
    rig.produced_before(&q, "p", one_each(1..3), &first).await;
    let second = rig.produced_new(&q, "p", one_each(3..4)).await;
    rig.pass(2 * window - 1);
    rig.produced_before(&q, "p", one_each(1..4), &[first, second].concat()).await;
    rig.pass(1);
    rig.produced_new(&q, "p", one_each(1..2)).await;
    // It begins anew.
    rig.produced_new(&q, "p", one_each(3..4)).await;
    // Also where others go on.
    rig.pass(window);
    rig.produced_new(&q, "other", one_each(1..2)).await;
    rig.pass(window);
    rig.produced_before(&q, "other", one_each(1..2), &[rig.taken_last(&q).await]).await;
    rig.produced_new(&q, "p", one_each(1..2)).await;
}

impl Rig {
    /// The id of the task at the tail.
    async fn taken_last(&self, q: &QueueName) -> Vec<TaskId> {
        ids(&self.take(q, 100).await).into_iter().next_back().into_iter().collect()
    }
}

/// G3: of more producers than are to be remembered, those go that inserted something before all others.
pub(super) async fn of_too_many_producers_the_oldest_is_forgotten(open: Open) {
    let (rig, q) = (open(remembering(Remember { entries: 300, ..RULES.remember })), queue("q"));
    for producer in ["a", "b", "c"] {
        rig.produced_new(&q, producer, one_each(1..3)).await;
        rig.pass(1);
    }
    rig.produced_new(&q, "a", one_each(3..4)).await;
    rig.pass(1);
    rig.produced_new(&q, "d", one_each(1..2)).await;
    for known in ["c", "a", "d"] {
        assert!(rig.produced(&q, known, one_each(1..2)).await[0].1, "{known}");
    }
    rig.pass(1);
    rig.produced_new(&q, "b", one_each(1..2)).await;
    for known in ["a", "d", "b"] {
        assert!(rig.produced(&q, known, one_each(1..2)).await[0].1, "{known}");
    }
    rig.produced_new(&q, "c", one_each(1..2)).await;
}

/// G13: nothing of what is refused is done, and the number is as good as before.
pub(super) async fn a_full_store_refuses_new_numbers_and_answers_known_ones(open: Open) {
    let (rig, q, new) = (open(RULES), queue("q"), queue("new"));
    let minted = rig.produced_new(&q, "p", one_each(1..3)).await;
    rig.engine.fill().await;
    let large = || NumberedInsert { tasks: (0..200).map(|_| task(vec![1; 1_000])).collect(), ..numbered(3, 0..1) };
    for (q, producer) in [(&q, "p"), (&q, "other"), (&new, "p")] {
        let refused = match rig.produce(q, produce(producer, vec![large()])).await {
            Ok(Produced { inserted, refused }) => {
                assert!(inserted.is_empty(), "{producer}");
                refused.expect("a refusal")
            }
            Err(error) => error,
        };
        assert!(matches!(refused, StoreError::Full(_)), "{producer}: {refused:?}");
    }
    assert_eq!(rig.count(&new).await, None);
    rig.produced_before(&q, "p", one_each(1..3), &minted).await;
    let both = vec![numbered(1, 1..2), numbered(2, 2..3), large()];
    let answer = rig.produce(&q, produce("p", both)).await.unwrap();
    assert_eq!(answer.inserted.into_iter().map(|inserted| inserted.ids).collect::<Vec<_>>(), minted);
    assert!(matches!(answer.refused, Some(StoreError::Full(_))));
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 2, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [1, 2]);
}
