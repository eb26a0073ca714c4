//! What administrators ask of all queues.

use super::*;

async fn oldest(rig: &Rig, q: &QueueName) -> Option<Millis> {
    rig.count(q).await.expect("the queue is known").oldest_ready
}

/// The head's age is since its insert, however often it was delivered; what is held or gone has none.
pub(super) async fn the_oldest_is_the_head(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    assert_eq!(oldest(&rig, &q).await, Some(0));
    rig.pass(100);
    rig.insert_numbers(&q, 1..2).await;
    rig.pass(20);
    assert_eq!(oldest(&rig, &q).await, Some(120));
    let held = rig.take_one(&q).await.token;
    rig.pass(3);
    assert_eq!(oldest(&rig, &q).await, Some(23));
    let second = rig.take_one(&q).await.token;
    assert_eq!(oldest(&rig, &q).await, None);
    rig.put_back(&q, &[second]).await;
    assert_eq!(oldest(&rig, &q).await, Some(23));
    rig.put_back(&q, &[held]).await;
    rig.pass(1);
    assert_eq!(oldest(&rig, &q).await, Some(124));
    let all = tokens(&rig.take(&q, 2).await);
    rig.pass(LEASE);
    assert_eq!(oldest(&rig, &q).await, Some(124 + LEASE), "counting took it back");
    assert_eq!(rig.ack(&q, &all).await.unwrap(), [Outcome::LeaseLost; 2]);
    let all = tokens(&rig.take(&q, 2).await);
    assert_eq!(rig.ack(&q, &all).await.unwrap(), [Outcome::Applied; 2]);
    assert_eq!(oldest(&rig, &q).await, None);
}

/// One answer for each name, in the order of the names, whether they are known or asked for twice.
pub(super) async fn several_queues_are_counted_at_once(open: Open) {
    let rig = open(RULES);
    let [one, two, unknown] = ["one", "two", "unknown"].map(queue);
    rig.insert_numbers(&one, 0..3).await;
    rig.take_one(&one).await;
    rig.insert_numbers(&two, 0..2).await;
    rig.pass(7);
    let of_one = Counts { ready: 2, leased: 1, inserted: 3, oldest_ready: Some(7), ..Counts::default() };
    let of_two = Counts { ready: 2, inserted: 2, oldest_ready: Some(7), ..Counts::default() };
    let names = [two.clone(), unknown.clone(), one.clone(), two];
    assert_eq!(rig.counts(&names).await.unwrap(), [Some(of_two), None, Some(of_one), Some(of_two)]);
    assert_eq!(rig.counts(&[]).await.unwrap(), []);
    assert_eq!(rig.queues(None, 10).await.unwrap().len(), 2, "counting makes no queue");
}

/// By the bytes of their names, those behind a name, at most so many.
pub(super) async fn queues_are_listed_by_name(open: Open) {
    let rig = open(RULES);
    assert_eq!(rig.queues(None, 10).await.unwrap(), []);
    let sorted = ["0", "A", "B", "a", "a-b", "a.b", "a/b", "a::b", "aa", "b"].map(queue);
    for q in sorted.iter().rev() {
        rig.insert_numbers(q, 0..1).await;
    }
    assert_eq!(rig.queues(None, 100).await.unwrap(), sorted);
    assert_eq!(rig.queues(None, 3).await.unwrap(), sorted[..3]);
    assert_eq!(rig.queues(None, 0).await.unwrap(), []);
    for (at, after) in sorted.iter().enumerate() {
        assert_eq!(rig.queues(Some(after), 2).await.unwrap(), sorted[at + 1..sorted.len().min(at + 3)]);
    }
    // The name to go on behind need not be one of a queue.
    assert_eq!(rig.queues(Some(&queue("a0")), 2).await.unwrap(), sorted[7..9]);
    // A queue stays when its tasks are gone.
    let held = rig.take_one(&sorted[0]).await.token;
    rig.ack_one(&sorted[0], held).await;
    assert_eq!(rig.queues(None, 1).await.unwrap(), sorted[..1]);
}

/// Each of many queues comes once, whatever the size of a page.
pub(super) async fn hundreds_of_queues_are_listed_page_by_page(open: Open) {
    let rig = open(RULES);
    let mut expected: Vec<QueueName> = (0..300).map(|number| queue(&format!("queue/{}", number * 7 % 300))).collect();
    for q in &expected {
        rig.insert_numbers(q, 0..1).await;
    }
    expected.sort();
    for size in [37, 300, 1_000] {
        let mut all: Vec<QueueName> = Vec::new();
        loop {
            let page = rig.queues(all.last(), size).await.unwrap();
            assert!(page.len() <= size);
            if page.is_empty() {
                break;
            }
            all.extend(page);
        }
        assert_eq!(all, expected, "{size} a page");
    }
}

/// Nothing but an insert makes a queue.
pub(super) async fn what_was_never_inserted_is_not_listed(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let nobody = Stem([7; 14]).token(0);
    rig.pop(&q, Pop { will_wait: true, acks: vec![nobody], ..attempt(1, "r", 1) }).await.unwrap();
    rig.ack(&q, &[nobody]).await.unwrap();
    rig.heartbeat(&q, &[nobody], Some(LEASE)).await.unwrap();
    rig.put_back(&q, &[nobody]).await;
    rig.unsent(&q, &[nobody], None).await;
    rig.release_held(&q, 0).await.unwrap();
    rig.look(std::slice::from_ref(&q)).await.unwrap();
    let unknown = Withdrawal { stem: Stem([8; 14]), max_tasks: 1, request: None };
    assert_eq!(rig.withdraw(&q, unknown).await.unwrap(), 0);
    assert_eq!(rig.count(&q).await, None);
    assert_eq!(rig.queues(None, 10).await.unwrap(), []);
}
