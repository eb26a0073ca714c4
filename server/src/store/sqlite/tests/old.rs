//! What becomes of files of older versions.

use super::{producers::produce, *};
use crate::store::{Cause, Deleted, Redriven, State};

/// Moves what a file has into one as an earlier version made it.
fn as_version(version: usize, place: &Place) -> Place {
    const MIGRATIONS: [&str; 2] =
        [include_str!("../../../../migrations/001_tables.sql"), include_str!("../../../../migrations/002_streams.sql")];
    let old = Place::new();
    fs::create_dir(old.file().parent().unwrap()).unwrap();
    let made = old.raw();
    made.pragma_update(None, "application_id", i32::from_be_bytes(*b"DaQu")).unwrap();
    MIGRATIONS[..version].iter().for_each(|migration| made.execute_batch(migration).unwrap());
    made.pragma_update(None, "user_version", version as i64).unwrap();
    made.execute("ATTACH ?1 AS new", [place.file().to_str().unwrap()]).unwrap();
    let mut tables = vec!["queues", "tasks", "tries", "leases", "dead", "generations", "acked", "requests"];
    if version > 1 {
        tables.extend(["producers", "answers"]);
    }
    for table in tables {
        let mut columns = Vec::new();
        let mut select = made.prepare(&format!("SELECT name FROM pragma_table_info('{table}', 'main')")).unwrap();
        let mut rows = select.query(()).unwrap();
        while let Some(row) = rows.next().unwrap() {
            columns.push(row.get::<_, String>(0).unwrap());
        }
        let columns = columns.join(", ");
        made.execute_batch(&format!("INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")).unwrap();
    }
    old
}

/// A file of an earlier version is read, copied and restored as it is, and brought up to date when a server opens it.
#[tokio::test]
async fn a_file_of_an_earlier_version_is_brought_up_to_date() {
    for version in [1, 2] {
        let place = as_version(version, &lived_in().await);
        assert!(check(&place.file(), RULES).unwrap().contains("10 inserted and 2 acked"));
        let copy = place.folder.path().join("copy.db");
        backup(&place.file(), &copy, RULES).unwrap();
        let other = Place::new();
        restore(&copy, &other.file(), RULES).unwrap();
        for place in [&place, &other] {
            assert_eq!(number_of(place, "PRAGMA user_version"), version as i64);
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
}

/// What died before anybody asked why has run out too often: there was no other way. It can be seen, and lives again.
#[tokio::test]
async fn dead_letters_of_an_earlier_version_can_be_redriven() {
    let place = Place::new();
    let store = place.open();
    store.insert(&q(), insert(4)).await.unwrap();
    for _ in 0..RULES.max_expiries {
        take(&store, 2).await;
        store.release_held(&q(), 0).await.unwrap();
    }
    drop(store);
    let place = as_version(2, &place);
    let store = place.open();
    let page = store.list(&q(), State::Dead, None, 10).await.unwrap().unwrap();
    assert_eq!(page.tasks.len(), 2);
    for task in &page.tasks {
        assert_eq!((task.cause, task.expiries, task.last_error.as_str()), (Some(Cause::Expiries), 20, ""));
    }
    let ids: Vec<TaskId> = page.tasks.iter().map(|task| task.id).collect();
    assert_eq!(store.redrive(&q(), &ids[..1]).await.unwrap(), [Redriven::Ready]);
    assert_eq!(store.delete(&q(), &ids[1..]).await.unwrap(), [Deleted::Gone]);
    let store = {
        drop(store);
        place.open()
    };
    let tasks = store.pop(&q(), pop(10)).await.unwrap().tasks;
    assert_eq!((tasks.len(), tasks[2].id, tasks[2].expiries), (3, ids[0], 0), "redriven to the tail");
}
