//! Dead letters that go back.

use super::*;

impl Rig {
    /// Makes dead letters of the tasks that are ready, however many.
    async fn bury(&self, q: &QueueName, count: usize) -> Vec<TaskId> {
        let mut dead = Vec::new();
        while dead.len() < count {
            let held = self.take(q, (count - dead.len()).min(RECLAIM_STEP)).await;
            self.give_back(q, rejected(&tokens(&held), "no")).await;
            dead.extend(ids(&held));
        }
        dead
    }
}

/// G11: at the tail of its priority, in the order in which they are named.
pub(super) async fn what_is_redriven_joins_the_tail(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, (0..5).map(|number| of_priority(number, u8::from(number == 2))).collect()).await;
    let dead = rig.bury(&q, 4).await;
    rig.insert_new(&q, vec![task("5"), of_priority(6, 1)]).await;
    assert_eq!(rig.redrive(&q, &[dead[3], dead[0], dead[1]]).await.unwrap(), [Redriven::Ready; 3]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 6, dead: 1, inserted: 7, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [6, 2, 4, 5, 3, 0]);
    assert_eq!(rig.list_numbers(&q, State::Dead).await, [1]);
}

/// G8: failures and expiries begin anew, so that it is not dead again at once; deliveries are counted for life.
pub(super) async fn its_failures_and_expiries_are_counted_anew(open: Open) {
    let (rig, q) = (open(Rules { max_failures: 2, max_expiries: 2, ..RULES }), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    rig.take_one(&q).await;
    rig.pass(LEASE);
    for _ in 0..2 {
        let held = rig.take_one(&q).await.token;
        rig.give_back(&q, PutBack { delay: Some(0), ..failed(&[held], "why") }).await;
    }
    let dead = rig.seen(&q, id).await.unwrap();
    assert_eq!((dead.deliveries, dead.failures, dead.expiries, dead.cause), (3, 2, 1, Some(Cause::Failures)));
    assert_eq!(rig.redrive(&q, &[id]).await.unwrap(), [Redriven::Ready]);
    let alive = Seen { state: State::Ready, at: None, failures: 0, expiries: 0, cause: None, ..dead };
    assert_eq!(rig.seen(&q, id).await, Some(alive));
    for _ in 0..2 {
        let held = rig.take_one(&q).await;
        assert_eq!((held.id, held.inserted_at, held.failures), (id, START, 0));
        rig.pass(LEASE);
    }
    assert_eq!(rig.seen(&q, id).await.unwrap().cause, Some(Cause::Expiries));
}

/// One that meets another with its key stays dead until that one is gone; then it has the key itself.
pub(super) async fn a_duplicate_stays_dead(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let mut dead = Vec::new();
    for number in 0..2 {
        rig.insert_new(&q, vec![with_key(number, "k")]).await;
        dead.extend(rig.bury(&q, 1).await);
    }
    rig.insert_new(&q, vec![with_key(2, "k")]).await;
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Duplicate; 2]);
    let held = rig.take_one(&q).await.token;
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Duplicate; 2], "while it is held too");
    rig.ack_one(&q, held).await;
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Ready, Redriven::Duplicate]);
    let again = rig.insert(&q, insert(vec![with_key(3, "k")])).await.unwrap();
    assert_eq!((&*again.ids, &*again.duplicates), (&dead[..1], &[0][..]));
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, dead: 1, inserted: 3, acked: 1, ..Counts::default() });
    // One whose time is over, though nobody dropped it yet, keeps nobody dead.
    let q = queue("over");
    rig.insert_new(&q, vec![with_key(0, "k")]).await;
    let dead = rig.bury(&q, 1).await;
    rig.insert_new(&q, vec![planned(1, Plan { ttl: Some(10), unique_key: Some("k".to_owned()), ..Plan::default() })])
        .await;
    rig.pass(10);
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Ready]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 2, expired: 1, ..Counts::default() });
}

/// G14: one whose time is over is gone, and so is one that is kept no longer.
pub(super) async fn what_is_over_is_not_redriven(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, vec![with_ttl(0, 100), with_ttl(1, 101), task("2")]).await;
    let dead = rig.bury(&q, 2).await;
    rig.pass(100);
    assert_eq!(rig.counted(&q).await.dead, 2);
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Expired, Redriven::Ready]);
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Unknown; 2]);
    rig.pass(1);
    assert_eq!(rig.drain(&q).await, [2]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 3, expired: 2, ..Counts::default() });
    let q = queue("kept");
    rig.insert_numbers(&q, 0..1).await;
    let dead = rig.bury(&q, 1).await;
    rig.set(&q, Setting::DeadLetterRetention, 100).await;
    rig.pass(100);
    assert_eq!(rig.redrive(&q, &dead).await.unwrap(), [Redriven::Expired]);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, expired: 1, ..Counts::default() });
}

/// G4: only a dead letter of this queue goes back, and once.
pub(super) async fn what_is_not_dead_is_not_redriven(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ids = rig.insert_new(&q, vec![task("0"), task("1"), after(9, task("2")), task("3")]).await;
    let dead = rig.bury(&q, 1).await[0];
    rig.take_one(&q).await;
    let nobody = TaskId::mint(1).unwrap()[0];
    assert_eq!(rig.redrive(&queue("other"), &[dead]).await.unwrap(), [Redriven::Unknown]);
    let asked = [ids[1], ids[2], ids[3], nobody, dead, dead];
    let mut answers = vec![Redriven::Unknown; 6];
    answers[4] = Redriven::Ready;
    assert_eq!(rig.redrive(&q, &asked).await.unwrap(), answers);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, scheduled: 1, leased: 1, inserted: 4, ..Counts::default() });
    assert_eq!(rig.queues(None, 10).await.unwrap(), [q]);
}

/// G11, G14: as many as one call takes, again and again.
pub(super) async fn hundreds_are_redriven_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..450).await;
    let dead = rig.bury(&q, 450).await;
    for dead in dead.chunks(RECLAIM_STEP) {
        assert_eq!(rig.redrive(&q, dead).await.unwrap(), vec![Redriven::Ready; dead.len()]);
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 450, inserted: 450, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, (0..450).collect::<Vec<_>>());
}
