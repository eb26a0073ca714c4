//! Tasks that are deleted one by one, and those that are held meanwhile.

use super::*;

impl Rig {
    async fn delete_one(&self, q: &QueueName, id: TaskId) -> Deleted {
        self.delete(q, &[id]).await.unwrap()[0]
    }

    /// One task, which is held and was cancelled.
    async fn cancelled(&self, q: &QueueName) -> (TaskId, Token) {
        let id = self.insert_numbers(q, 0..1).await.ids[0];
        let held = self.take_one(q).await.token;
        assert_eq!(self.delete_one(q, id).await, Deleted::Cancelled);
        (id, held)
    }
}

/// G1, G14: what nobody holds is gone at once, and counted.
pub(super) async fn a_task_is_deleted_wherever_it_is(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let plan = Plan { priority: 3, ttl: Some(LEASE), unique_key: Some("k".to_owned()) };
    let some = vec![
        task("0"),
        after(10, task("1")),
        task("2"),
        planned(3, plan.clone()),
        after(10, planned(4, Plan { unique_key: None, ..plan })),
    ];
    let ids = rig.insert_new(&q, some).await;
    let held = rig.pop(&q, pop(2)).await.unwrap().tasks;
    assert_eq!(numbers(&held), [3, 0]);
    rig.give_back(&q, rejected(&[held[1].token], "no")).await;
    rig.put_back(&q, &[held[0].token]).await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, scheduled: 2, dead: 1, inserted: 5, ..Counts::default() });
    let unknown = TaskId::mint(1).unwrap()[0];
    let asked = [ids[4], ids[1], unknown, ids[0], ids[3], ids[3]];
    let gone = [Deleted::Gone, Deleted::Gone, Deleted::Unknown, Deleted::Gone, Deleted::Gone, Deleted::Unknown];
    assert_eq!(rig.delete(&q, &asked).await.unwrap(), gone);
    assert_eq!(rig.delete(&q, &asked).await.unwrap(), [Deleted::Unknown; 6]);
    assert_eq!(rig.delete(&queue("other"), &ids).await.unwrap(), [Deleted::Unknown; 5]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 5, deleted: 4, ..Counts::default() });
    rig.pass(2 * LEASE);
    assert_eq!(rig.drain(&q).await, [2]);
    assert_eq!(rig.counted(&q).await.expired, 0);
}

/// Its holder is told with each heartbeat, and with what its stream keeps; other tasks are not touched.
pub(super) async fn the_holder_of_a_cancelled_task_is_told(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ids = rig.insert_numbers(&q, 0..4).await.ids;
    let stream = consumer(1, 1);
    let held = rig.pop(&q, Pop { consumer: Some(stream), ..pop(4) }).await.unwrap().tasks;
    let [a, b, c, d] = tokens(&held).try_into().unwrap();
    assert_eq!(rig.delete(&q, &[ids[1], ids[2], ids[1]]).await.unwrap(), [Deleted::Cancelled; 3]);
    let seen = rig.tasks(&q, &ids).await.unwrap();
    assert_eq!(seen.iter().flatten().map(|seen| seen.cancelled).collect::<Vec<_>>(), [false, true, true, false]);
    for _ in 0..2 {
        let beaten = rig.heartbeat(&q, &[c, a, c, b, d], Some(LEASE)).await.unwrap();
        assert_eq!((beaten.outcomes, beaten.cancelled), (vec![Outcome::Applied; 5], vec![c, b]));
        let kept = rig.keep(&q, stream, &[b, a, c, d], LEASE).await.unwrap().unwrap();
        assert_eq!((kept.outcomes, kept.cancelled), (vec![Outcome::Applied; 4], vec![b, c]));
    }
    rig.ack_one(&q, b).await;
    assert_eq!(rig.heartbeat(&q, &[a, b, c], None).await.unwrap().cancelled, [c]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 3, inserted: 4, acked: 1, ..Counts::default() });
}

/// G5, G7: until then it is the holder's, whose ack counts as one.
pub(super) async fn a_cancelled_task_may_be_finished(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let (id, held) = rig.cancelled(&q).await;
    assert_eq!(rig.delete_one(&q, id).await, Deleted::Cancelled);
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 1, ..Counts::default() });
    assert_eq!(rig.ack_one(&q, held).await, Outcome::Applied);
    assert_eq!(rig.delete_one(&q, id).await, Deleted::Unknown);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, acked: 1, ..Counts::default() });
}

/// G14: however its lease ends, it is deleted then, and neither goes back nor dies.
pub(super) async fn a_cancelled_task_is_deleted_when_it_would_go_back(open: Open) {
    let rig = open(Rules { max_failures: 1, max_expiries: 1, ..RULES });
    let ways = ["put back", "delayed", "failed", "rejected", "unsent", "withdrawn", "held", "ran out"];
    for (at, way) in ways.into_iter().enumerate() {
        let q = queue(&format!("q{at}"));
        let (id, held) = rig.cancelled(&q).await;
        let nothing = Released::default();
        match way {
            "put back" => assert_eq!(rig.give_back(&q, back(&[held])).await, nothing),
            "delayed" => assert_eq!(rig.give_back(&q, PutBack { delay: Some(5), ..back(&[held]) }).await, nothing),
            "failed" => assert_eq!(rig.give_back(&q, failed(&[held], "e")).await, nothing),
            "rejected" => assert_eq!(rig.give_back(&q, rejected(&[held], "e")).await, nothing),
            "unsent" => assert_eq!(rig.unsent(&q, &[held], None).await, [Outcome::Applied]),
            "withdrawn" => {
                let withdrawal = Withdrawal { stem: held.stem(), max_tasks: 1, request: None };
                assert_eq!(rig.withdraw(&q, withdrawal).await.unwrap(), 0);
            }
            "held" => assert_eq!(rig.release_held(&q, 0).await.unwrap(), nothing),
            _ => {
                rig.pass(LEASE);
                assert_eq!(rig.look_one(&q).await, Sight::default());
            }
        }
        assert_eq!(rig.counted(&q).await, Counts { inserted: 1, deleted: 1, ..Counts::default() }, "{way}");
        assert_eq!(rig.seen(&q, id).await, None, "{way}");
        assert_eq!(rig.ack_one(&q, held).await, Outcome::LeaseLost, "{way}");
        assert!(rig.drain(&q).await.is_empty(), "{way}");
    }
}

/// G1: a token that is lost cancels nothing, and a task that was delivered anew is cancelled anew.
pub(super) async fn what_ran_out_is_not_held(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    rig.take_one(&q).await;
    rig.pass(LEASE);
    assert_eq!(rig.delete_one(&q, id).await, Deleted::Gone);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 1, deleted: 1, ..Counts::default() });
}

/// G9, G14: as many as one call takes, among more of them.
pub(super) async fn hundreds_are_deleted_in_one_call(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ids = rig.insert_numbers(&q, 0..450).await.ids;
    let held = tokens(&rig.take(&q, 100).await);
    let answers = rig.delete(&q, &ids[..RECLAIM_STEP]).await.unwrap();
    assert_eq!(answers[..100], [Deleted::Cancelled; 100]);
    assert_eq!(answers[100..], [Deleted::Gone; 100]);
    assert_eq!(rig.heartbeat(&q, &held, Some(LEASE)).await.unwrap().cancelled, held);
    rig.put_back(&q, &held).await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 250, inserted: 450, deleted: 200, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, (200..450).collect::<Vec<_>>());
}
