//! What a file keeps of producers, and what becomes of a file from before there were any.

use super::*;
use crate::store::{Fingerprint, NumberedInsert};

async fn produce(store: &SqliteStore, producer: &str, numbers: std::ops::Range<u64>) -> Vec<Inserted> {
    let task = |id| NewTask::new(id, "value".into(), None);
    let insert = |number| NumberedInsert {
        number,
        fingerprint: Fingerprint([1; 16]),
        tasks: TaskId::mint(1).unwrap().into_iter().map(task).collect(),
    };
    let inserts = numbers.map(insert).collect();
    let produce = Produce { producer: producer.to_owned(), inserts, waiting_here: 0 };
    let produced = store.produce(&q(), produce).await.unwrap();
    assert!(produced.refused.is_none(), "{produced:?}");
    produced.inserted
}

fn number_of(place: &Place, sql: &str) -> i64 {
    place.raw().query_row(sql, (), |row| row.get(0)).unwrap()
}

/// Moves what a file has into one as the first version made it.
fn as_version_1(place: &Place) -> Place {
    let old = Place::new();
    fs::create_dir(old.file().parent().unwrap()).unwrap();
    let made = old.raw();
    made.pragma_update(None, "application_id", i32::from_be_bytes(*b"DaQu")).unwrap();
    made.execute_batch(include_str!("../../../../migrations/001_tables.sql")).unwrap();
    made.pragma_update(None, "user_version", 1).unwrap();
    made.execute("ATTACH ?1 AS new", [place.file().to_str().unwrap()]).unwrap();
    let leases = "leases SELECT task, token, place, renewed_at, deadline, holders FROM new.leases";
    let queues = "queues SELECT key, name, inserted, acked FROM new.queues";
    let dead = "dead SELECT task, died_at FROM new.dead";
    for rows in [leases, queues, dead] {
        made.execute_batch(&format!("INSERT INTO {rows}")).unwrap();
    }
    for table in ["tasks", "tries", "generations", "acked", "requests"] {
        made.execute_batch(&format!("INSERT INTO {table} SELECT * FROM new.{table}")).unwrap();
    }
    old
}

/// A file of the first version is read, copied and restored as it is, and brought up to date when a server opens it.
#[tokio::test]
async fn a_file_of_version_1_is_brought_up_to_date() {
    let place = as_version_1(&lived_in().await);
    assert!(check(&place.file(), RULES).unwrap().contains("10 inserted and 2 acked"));
    let copy = place.folder.path().join("copy.db");
    backup(&place.file(), &copy, RULES).unwrap();
    let other = Place::new();
    restore(&copy, &other.file(), RULES).unwrap();
    for place in [&place, &other] {
        assert_eq!(number_of(place, "PRAGMA user_version"), 1);
        let store = place.open();
        let counts = count(&store).await;
        assert_eq!((counts.ready, counts.leased, counts.inserted, counts.acked), (6, 2, 10, 2));
        let first = produce(&store, "p", 1..3).await;
        drop(store);
        assert_eq!(number_of(place, "PRAGMA user_version"), 3);
        let store = place.open();
        let again = produce(&store, "p", 1..3).await;
        assert!(again.iter().all(|inserted| inserted.replayed));
        assert!(again.iter().zip(&first).all(|(again, first)| again.ids == first.ids));
        assert_eq!(count(&store).await.inserted, 12);
        drop(store);
        check(&place.file(), RULES).unwrap();
    }
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
