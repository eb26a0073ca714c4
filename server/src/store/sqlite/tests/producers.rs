//! What a file keeps of producers.

use super::*;
use crate::store::{Fingerprint, NumberedInsert};

pub(super) async fn produce(store: &SqliteStore, producer: &str, numbers: std::ops::Range<u64>) -> Vec<Inserted> {
    let task = |id| NewTask::new(id, "value".into(), None);
    let insert = |number| NumberedInsert {
        number,
        fingerprint: Fingerprint([1; 16]),
        tasks: TaskId::mint(1).unwrap().into_iter().map(task).collect(),
    };
    let inserts = numbers.map(insert).collect();
    let produce = Produce { producer: producer.to_owned(), inserts, waiting_here: 0, ..Default::default() };
    let produced = store.produce(&q(), produce).await.unwrap();
    assert!(produced.refused.is_none(), "{produced:?}");
    produced.inserted
}

/// Guarantee 7: of what producers were answered, the file keeps what is known and little more.
#[tokio::test]
async fn forgotten_answers_leave_the_file() {
    let place = Place::new();
    let store = place.open();
    for step in 0..30 {
        produce(&store, "p", 100 * step + 1..100 * step + 101).await;
    }
    let kept = number_of(&place, "SELECT sum(length(answers)) / 44 FROM answers");
    assert!((1_024..=1_400).contains(&kept), "{kept} of 3000 answers");

    // The rules have room for one. What there was of the other goes little by little, also when the server was restarted.
    produce(&store, "other", 1..2).await;
    assert_eq!(number_of(&place, "SELECT count(*) FROM producers"), 1);
    drop(store);
    let store = place.open();
    assert!(produce(&store, "other", 1..2).await[0].replayed);
    for _ in 0..10 {
        store.look(&[q()]).await.unwrap();
    }
    assert_eq!(number_of(&place, "SELECT count(*) FROM answers"), 1);

    place.clock.0.fetch_add(600_000, Ordering::Relaxed);
    for _ in 0..3 {
        store.look(&[q()]).await.unwrap();
    }
    assert_eq!(number_of(&place, "SELECT count(*) FROM answers"), 0);
    assert_eq!(number_of(&place, "SELECT count(*) FROM producers"), 0);
}
