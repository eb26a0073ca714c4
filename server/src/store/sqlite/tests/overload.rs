//! What the core does when more calls wait for a disk that stands still than are kept.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    queue::{InsertCall, Limits, PopCall, Queues, Value, Waits},
    store::Fingerprint,
};

fn queues(store: &SqliteStore, background: &TaskTracker) -> Queues {
    let limits = Limits {
        max_value: 1 << 20,
        default_lease: Duration::from_secs(30),
        max_stream_age: Duration::from_secs(1_800),
        grace: Duration::from_secs(10),
    };
    let store = Arc::new(store.for_this_thread());
    Queues::new(store, Arc::new(Waits::default()), limits, CancellationToken::new(), background.clone())
}

/// G8
#[tokio::test]
async fn what_was_not_handed_over_goes_back_when_there_is_room_for_that_call() {
    let place = Place::new();
    let (store, background) = (place.open(), TaskTracker::new());
    let queues = queues(&store, &background);
    let (queue, fingerprint) = ("q".to_owned(), Fingerprint([0; 16]));
    let task = crate::queue::NewTask { value: Some(Value::Json("1".to_owned())), ..crate::queue::NewTask::default() };
    let insert =
        InsertCall { queue: queue.clone(), tasks: vec![task], request_id: String::new(), fingerprint, durability: 0 };
    queues.insert(insert).await.unwrap();
    let request_id = String::new();
    let pop = PopCall { queue, lease: None, wait: None, request_id, fingerprint, acks: Vec::new(), deadline: None };
    let (delivery, _) = queues.pop(pop).await.unwrap();
    assert_eq!((delivery.is_some(), count(&store).await.leased), (true, 1));

    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (is_held, held) = tokio::sync::oneshot::channel();
    let mut is_held = Some(is_held);
    let stands_still = store.call(Kind::Lease, Lane::Urgent, items(1), move |_| {
        is_held.take().map(|is_held| is_held.send(()));
        let _ = wait.recv();
        Ok(Ok(()))
    });
    let crowd = async {
        held.await.unwrap();
        let queue = q();
        let waiting = std::iter::from_fn(|| Some(store.ack(&queue, &[]))).take(20_000);
        let mut waiting: FuturesUnordered<_> = waiting.collect();
        assert!(matches!(waiting.next().await.unwrap(), Err(StoreError::Overloaded(_))));
        drop(delivery);
        // The task that gives it back has its turn, and is refused.
        tokio::task::yield_now().await;
        drop(go_on);
        while waiting.next().await.is_some() {}
    };
    let (still, ()) = tokio::join!(stands_still, crowd);
    still.unwrap();
    background.close();
    background.wait().await;
    let counts = count(&store).await;
    assert_eq!((counts.ready, counts.leased), (1, 0));
    let again = store.pop(&q(), super::pop(1)).await.unwrap();
    assert_eq!(again.tasks[0].deliveries, 1);
}
