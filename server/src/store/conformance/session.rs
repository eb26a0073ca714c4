//! Sessions: what a stream of deliveries leased, and what becomes of it when the stream breaks.

use super::*;

impl Rig {
    async fn consume(&self, queue: &QueueName, consumer: Consumer, max_tasks: usize) -> Vec<Leased> {
        let popped = self.pop(queue, Pop { consumer: Some(consumer), ..pop(max_tasks) }).await.unwrap();
        assert!(!popped.taken_over);
        popped.tasks
    }

    async fn is_taken_over(&self, queue: &QueueName, consumer: Consumer) -> bool {
        let popped = self.pop(queue, Pop { consumer: Some(consumer), ..pop(1) }).await.unwrap();
        assert!(!popped.taken_over || popped.tasks.is_empty());
        popped.taken_over
    }

    async fn resumed(&self, queue: &QueueName, consumer: Consumer, lease: Millis) -> Vec<Token> {
        self.resume(queue, consumer, lease, Millis::MAX).await.unwrap().into_iter().map(|(token, _)| token).collect()
    }

    async fn reclaimed(&self, queue: &QueueName) -> u64 {
        self.look(std::slice::from_ref(queue)).await.unwrap()[0].reclaimed
    }
}

/// What keeping answers when nothing is to be deleted.
fn kept_all(outcomes: &[Outcome]) -> Option<Kept> {
    Some(Kept { outcomes: outcomes.to_vec(), cancelled: Vec::new() })
}

/// What is held is answered in the order of its delivery, with its deadlines moved; what ended is left out.
pub(super) async fn a_stream_resumes_what_its_session_holds(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    assert_eq!(rig.resumed(&q, consumer(1, 1), LEASE).await, []);
    rig.insert_numbers(&q, 0..6).await;
    let mut held = rig.consume(&q, consumer(1, 1), 2).await;
    let other = rig.take_one(&q).await;
    held.extend(rig.consume(&q, consumer(1, 1), 3).await);
    let held = tokens(&held);
    assert_eq!(rig.ack_one(&q, held[1]).await, Outcome::Applied);
    assert_eq!(rig.put_back(&q, &held[3..4]).await, [Outcome::Applied]);
    rig.pass(LEASE / 2);
    let resumed = rig.resumed(&q, consumer(1, 2), LEASE).await;
    assert_eq!(resumed, [held[0], held[2], held[4]]);
    rig.pass(LEASE / 2);
    assert_eq!(rig.reclaimed(&q).await, 1, "only what the session does not hold");
    assert_eq!(rig.ack_one(&q, other.token).await, Outcome::LeaseLost);
    assert_eq!(rig.ack(&q, &resumed).await.unwrap(), [Outcome::Applied; 3]);
    assert_eq!(rig.resumed(&q, consumer(1, 3), LEASE).await, []);
    rig.pass(LEASE);
    let counts = rig.counted(&q).await;
    assert_eq!(counts, Counts { ready: 2, inserted: 6, acked: 4, ..Counts::default() });
}

/// G4, G5: the earlier stream leases nothing and keeps nothing any more; its acks are applied nevertheless.
pub(super) async fn the_stream_that_came_last_has_the_session(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..4).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 2).await);
    rig.resumed(&q, consumer(1, 2), LEASE).await;
    let acking = Pop { consumer: Some(consumer(1, 1)), acks: held[..1].to_vec(), ..pop(2) };
    let popped = rig.pop(&q, acking).await.unwrap();
    assert_eq!((popped.taken_over, popped.acks, popped.tasks.len()), (true, vec![Outcome::Applied], 0));
    assert_eq!(rig.keep(&q, consumer(1, 1), &held, LEASE).await.unwrap(), None);
    assert_eq!(rig.consume(&q, consumer(1, 2), 1).await.len(), 1);
    assert_eq!(rig.resumed(&q, consumer(1, 1), LEASE).await.len(), 2, "it may come back");
    assert!(rig.is_taken_over(&q, consumer(1, 2)).await);
}

/// G6: a lease is extended as long as its stream keeps it, and not shortened.
pub(super) async fn what_a_stream_keeps_does_not_run_out(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 3).await);
    for _ in 0..3 {
        rig.pass(LEASE - 1);
        let kept = rig.keep(&q, consumer(1, 1), &held[..2], LEASE).await.unwrap();
        assert!(kept == kept_all(&[Outcome::Applied; 2]));
    }
    assert_eq!(rig.reclaimed(&q).await, 1);
    assert_eq!(rig.ack_one(&q, held[0]).await, Outcome::Applied);
    // No time at all only asks.
    let kept = rig.keep(&q, consumer(1, 1), &held, 0).await.unwrap();
    assert_eq!(kept, kept_all(&[Outcome::AlreadyAcked, Outcome::Applied, Outcome::LeaseLost]));
    rig.pass(LEASE - 1);
    assert_eq!(rig.reclaimed(&q).await, 0);
    rig.pass(1);
    assert_eq!(rig.reclaimed(&q).await, 1);
    assert_eq!(
        rig.keep(&queue("unknown"), consumer(1, 1), &held[..1], LEASE).await.unwrap(),
        kept_all(&[Outcome::LeaseLost])
    );
}

/// What hangs in a worker whose stream lives can be taken back by its age.
pub(super) async fn keeping_is_no_heartbeat_of_the_holder(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 2).await);
    rig.pass(10_000);
    rig.keep(&q, consumer(1, 1), &held, LEASE).await.unwrap();
    rig.beat_one(&q, held[1], LEASE).await;
    assert_eq!(rig.held_released(&q, 10_000).await, 1);
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::LeaseLost, Outcome::Applied]);
}

/// G15: not before the grace, and not later; it counts as an expiry.
pub(super) async fn what_is_abandoned_comes_back_after_the_grace(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 3).await);
    rig.pass(LEASE - 1_000);
    rig.beat_one(&q, held[2], LEASE).await;
    rig.abandon(&q, consumer(1, 1), &held[1..], 2_000).await.unwrap();
    rig.pass(1_000);
    assert_eq!(rig.reclaimed(&q).await, 2, "one had less left than the grace");
    rig.pass(999);
    assert_eq!(rig.reclaimed(&q).await, 0);
    assert_eq!(rig.beat_one(&q, held[2], 1).await, Outcome::Applied);
    rig.pass(1);
    assert_eq!(rig.reclaimed(&q).await, 1);
    let again = rig.take(&q, 3).await;
    assert_eq!(numbers(&again).len(), 3);
    assert!(again.iter().all(|task| (task.deliveries, task.expiries) == (2, 1)));
}

/// The break of a stream is noticed late now and then: the session has another one already.
pub(super) async fn what_was_taken_over_is_not_abandoned(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 2).await);
    assert_eq!(rig.resumed(&q, consumer(1, 2), LEASE).await, held);
    rig.abandon(&q, consumer(1, 1), &held, 0).await.unwrap();
    rig.pass(LEASE - 1);
    assert_eq!(rig.reclaimed(&q).await, 0);
    rig.abandon(&q, consumer(1, 2), &held, 0).await.unwrap();
    assert_eq!(rig.reclaimed(&q).await, 2);
}

/// A session that nobody uses leaves nothing behind; one that is used stays.
pub(super) async fn a_session_is_forgotten_some_time_after_its_last_step(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let long = Pop { lease: Some(3 * SESSION_KEPT), consumer: Some(consumer(1, 1)), ..pop(1) };
    let held = tokens(&rig.pop(&q, long).await.unwrap().tasks);
    rig.pass(SESSION_KEPT - 1);
    assert_eq!(rig.keep(&q, consumer(1, 1), &held, 0).await.unwrap(), kept_all(&[Outcome::Applied]));
    rig.pass(SESSION_KEPT - 1);
    assert_eq!(rig.keep(&q, consumer(1, 2), &held, 0).await.unwrap(), None);
    assert_eq!(rig.resumed(&q, consumer(1, 2), 1).await, held);
    rig.pass(SESSION_KEPT);
    assert_eq!(rig.resumed(&q, consumer(1, 3), 1).await, []);
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::Applied]);
    assert_eq!(rig.consume(&q, consumer(1, 3), 1).await.len(), 1);
}

/// G12: neither those of other clients nor those of other queues.
pub(super) async fn sessions_do_not_touch_each_other(open: Open) {
    let (rig, q, r) = (open(RULES), queue("q"), queue("r"));
    rig.insert_numbers(&q, 0..4).await;
    rig.insert_numbers(&r, 0..4).await;
    let first = tokens(&rig.consume(&q, consumer(1, 1), 1).await);
    let second = tokens(&rig.consume(&q, consumer(2, 2), 1).await);
    let elsewhere = tokens(&rig.consume(&r, consumer(1, 1), 1).await);
    assert_eq!(rig.resumed(&q, consumer(1, 3), LEASE).await, first);
    assert!(!rig.is_taken_over(&q, consumer(2, 2)).await);
    assert!(!rig.is_taken_over(&r, consumer(1, 1)).await);
    assert_eq!(rig.resumed(&q, consumer(2, 3), LEASE).await[..1], second);
    assert_eq!(rig.resumed(&r, consumer(1, 3), LEASE).await[..1], elsewhere);
}

/// Whatever the number of pops; those of which nothing is left may be named as spent.
pub(super) async fn hundreds_of_pops_are_resumed_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1_500).await;
    let (mut held, mut spent) = (Vec::new(), Vec::new());
    for round in 0..350 {
        let stem = Stem::mint().unwrap();
        let step = Pop { stem, consumer: Some(consumer(1, 1)), spent: std::mem::take(&mut spent), ..pop(4) };
        let leased = tokens(&rig.pop(&q, step).await.unwrap().tasks);
        assert_eq!(leased.len(), 4);
        if round % 7 == 0 {
            rig.ack(&q, &leased).await.unwrap();
            spent.push(stem);
        } else {
            rig.ack(&q, &leased[1..2]).await.unwrap();
            held.extend([leased[0], leased[2], leased[3]]);
        }
    }
    assert_eq!(rig.resumed(&q, consumer(1, 2), LEASE).await, held);
}

/// For how long a task has been held is not forgotten when another stream takes it over; the holder's heartbeat begins anew.
pub(super) async fn what_is_resumed_tells_its_age(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.consume(&q, consumer(1, 1), 2).await);
    rig.pass(1_000);
    let later = tokens(&rig.consume(&q, consumer(1, 1), 1).await);
    rig.keep(&q, consumer(1, 1), &held, LEASE).await.unwrap();
    rig.pass(500);
    rig.beat_one(&q, held[1], LEASE).await;
    rig.pass(10);
    for stream in [2, 3] {
        let ages = rig.resume(&q, consumer(1, stream), LEASE, Millis::MAX).await.unwrap();
        let mut wanted = [(held[0], 1_510), (held[1], 10), (later[0], 510)];
        wanted.sort_by_key(|(token, _)| ages.iter().position(|(other, _)| other == token));
        assert_eq!(ages, wanted);
    }
    // What has been held for so long is not extended.
    rig.pass(100);
    assert_eq!(rig.resume(&q, consumer(1, 4), 2 * LEASE, 1_610).await.unwrap().len(), 3);
    rig.pass(LEASE);
    assert_eq!(rig.reclaimed(&q).await, 1);
    assert_eq!(rig.ack(&q, &[held[0], held[1], later[0]]).await.unwrap()[0], Outcome::LeaseLost);
}
