//! What only a store in a file can get wrong. What it shares with the others is in the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod life;
mod old;
mod overload;
mod producers;

use std::{fs, sync::atomic::Ordering};

use futures_util::{StreamExt, stream::FuturesUnordered};
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::store::{
    Admin, Attempt, Counts, Fingerprint, NewTask, PopRequest, PutBack, Remember, RequestKey, State, Stem, TaskId,
};

const RULES: Rules = Rules {
    remember: Remember { window: 300_000, entries: 100 },
    lease: 30_000,
    max_failures: 20,
    max_expiries: 20,
    backoff: crate::store::Backoff { min: 1_000, max: 60_000 },
};

#[derive(Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Millis {
        self.0.load(Ordering::Relaxed)
    }
}

struct Place {
    folder: TempDir,
    clock: Arc<TestClock>,
}

impl Place {
    fn new() -> Self {
        let clock = Arc::new(TestClock(AtomicU64::new(1_700_000_000_000)));
        Self { folder: tempfile::tempdir().unwrap(), clock }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("folder/data-queue.db")
    }

    fn try_open(&self) -> Result<SqliteStore, String> {
        let config = SqliteConfig {
            path: self.file(),
            durability: Durability::Full,
            reserve: 1 << 20,
            rules: RULES,
            timeout: Duration::from_secs(20),
        };
        SqliteStore::open(config, Some(Arc::clone(&self.clock) as _))
    }

    fn open(&self) -> SqliteStore {
        self.try_open().unwrap()
    }

    fn raw(&self) -> Connection {
        Connection::open(self.file()).unwrap()
    }

    /// That it is refused for this, and left as it is.
    fn refused(&self, reason: &str) {
        let before = fs::read(self.file()).ok();
        let error = self.try_open().err().expect("a refusal");
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        assert_eq!(fs::read(self.file()).ok(), before, "{error}");
    }
}

fn q() -> QueueName {
    QueueName::parse("q").unwrap()
}

fn insert(count: usize) -> Insert {
    let task = |id| NewTask::new(id, "value".into(), None);
    let tasks = TaskId::mint(count).unwrap().into_iter().map(task).collect();
    Insert { tasks, request: None, waiting_here: 0, ..Default::default() }
}

fn pop(max_tasks: usize) -> Pop {
    let stem = Stem::mint().unwrap();
    Pop {
        acks: Vec::new(),
        max_tasks,
        max_bytes: 1 << 20,
        lease: Some(30_000),
        stem,
        request: None,
        will_wait: false,
        consumer: None,
        spent: Vec::new(),
    }
}

async fn take(store: &SqliteStore, max_tasks: usize) -> Vec<Token> {
    store.pop(&q(), pop(max_tasks)).await.unwrap().tasks.iter().map(|task| task.token).collect()
}

/// A number that the file tells.
fn number_of(place: &Place, sql: &str) -> i64 {
    place.raw().query_row(sql, (), |row| row.get(0)).unwrap()
}

async fn count(store: &SqliteStore) -> Counts {
    store.counts(&[q()]).await.unwrap()[0].expect("the queue is known")
}

/// A store with tasks in every state there is, closed.
async fn lived_in() -> Place {
    let place = Place::new();
    let store = place.open();
    let request = RequestKey { id: "r".to_owned(), fingerprint: crate::store::Fingerprint([1; 16]) };
    store.insert(&q(), Insert { request: Some(request), ..insert(10) }).await.unwrap();
    let tokens = take(&store, 5).await;
    store.ack(&q(), &tokens[..2]).await.unwrap();
    store
        .release(
            &q(),
            Release::PutBack(crate::store::PutBack {
                tokens: tokens[2..3].to_vec(),
                ..crate::store::PutBack::default()
            }),
        )
        .await
        .unwrap();
    drop(store);
    place
}

/// G1: acked tasks leave the file many at once, and those between them stay.
#[tokio::test]
async fn an_ack_takes_its_own_tasks_out_of_the_file_and_no_others() {
    let place = Place::new();
    let store = place.open();
    let other = QueueName::parse("other").unwrap();
    for _ in 0..10 {
        store.insert(&q(), insert(3)).await.unwrap();
        store.insert(&other, insert(1)).await.unwrap();
    }
    let tokens = take(&store, 30).await;
    let (kept, mut acked): (Vec<Token>, Vec<Token>) = tokens.iter().partition(|token| token.0[15] % 7 == 3);
    acked.reverse();
    assert_eq!(store.ack(&q(), &acked).await.unwrap(), vec![Outcome::Applied; acked.len()]);
    drop(store);
    let rows = |table| {
        let count = format!("SELECT count(*) FROM {table}");
        place.raw().query_row(&count, (), |row| row.get::<_, i64>(0)).unwrap() as usize
    };
    assert_eq!((rows("tasks"), rows("leases")), (10 + kept.len(), kept.len()));
    let store = place.open();
    assert_eq!(store.ack(&q(), &kept).await.unwrap(), vec![Outcome::Applied; kept.len()]);
    assert_eq!(store.pop(&other, pop(20)).await.unwrap().tasks.len(), 10);
}

/// Guarantee 7: of what is remembered, the file keeps what is seen and no more.
#[tokio::test]
async fn forgotten_acks_leave_the_file() {
    let place = Place::new();
    let store = place.open();
    for _ in 0..60 {
        store.insert(&q(), insert(50)).await.unwrap();
        let tokens = take(&store, 50).await;
        store.ack(&q(), &tokens).await.unwrap();
    }
    let sum = "SELECT coalesce(sum(length(tokens)), 0) / 16 FROM acked";
    let kept: i64 = place.raw().query_row(sum, (), |row| row.get(0)).unwrap();
    assert!((50..=150).contains(&kept), "{kept} of 3000 tokens");
    // Out of sight, and then out of the file, though nobody acks any more.
    place.clock.0.fetch_add(600_000, Ordering::Relaxed);
    for _ in 0..5 {
        store.look(&[q()]).await.unwrap();
    }
    assert_eq!(place.raw().query_row(sum, (), |row| row.get::<_, i64>(0)).unwrap(), 0);
    assert_eq!(place.raw().query_row("SELECT count(*) FROM generations", (), |row| row.get::<_, i64>(0)).unwrap(), 0);
}

/// Guarantee 9: of a transaction that fails nothing stays, neither in the file nor in what is known of it.
#[tokio::test]
async fn a_failed_transaction_changes_nothing() {
    let place = lived_in().await;
    let store = place.open();
    let before = count(&store).await;
    let (queue, more) = (q(), insert(3));
    let failed = store.call(Kind::Change, Lane::Urgent, items(1), move |engine| {
        engine.insert(&queue, &more)?.unwrap();
        let popped = engine.step(&queue, |queue, turn| queue.pop(&pop(5), false, turn))?.unwrap();
        assert_eq!(popped.popped.tasks.len(), 5);
        Err::<Result<(), StoreError>, _>(rusqlite::Error::InvalidQuery)
    });
    assert!(matches!(failed.await, Err(StoreError::Unavailable { .. })));
    let again = async {
        loop {
            match store.counts(&[q()]).await {
                Ok(counts) => break counts[0].unwrap(),
                Err(StoreError::Unavailable { did_not_run: true, .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(20), again).await.unwrap(), before);
    assert_eq!(take(&store, 100).await.len() as u64, before.ready);
}

/// How many commits the log of the file has.
fn commits(place: &Place) -> usize {
    let log = fs::read(format!("{}-wal", place.file().display())).unwrap();
    let page = u32::from_be_bytes(log[8..12].try_into().unwrap()) as usize;
    let frames = log[32..].chunks_exact(24 + page).filter(|frame| frame[8..16] == log[16..24]);
    frames.filter(|frame| frame[4..8] != [0; 4]).count()
}

/// Guarantees 1, 3 and 9: a kill, at whatever moment, leaves a call done or not begun.
#[tokio::test]
async fn a_call_is_one_commit() {
    let place = Place::new();
    let store = place.open();
    store.insert(&q(), insert(1)).await.unwrap();
    let mut before = commits(&place);
    let mut is_one_commit = |what: &str| {
        let now = commits(&place);
        assert_eq!(now - std::mem::replace(&mut before, now), 1, "{what}");
    };
    let request = || RequestKey { id: "r".to_owned(), fingerprint: Fingerprint([1; 16]) };
    let put_back = |tokens: &[Token]| PutBack { tokens: tokens.to_vec(), ..Default::default() };
    store.insert(&q(), Insert { request: Some(request()), ..insert(7) }).await.unwrap();
    is_one_commit("an insert");
    producers::produce(&store, "p", 1..2).await;
    is_one_commit("an insert of a producer");
    let attempt = PopRequest { key: request(), attempt: Attempt([1; 8]) };
    let popped = store.pop(&q(), Pop { request: Some(attempt), ..pop(6) }).await.unwrap();
    is_one_commit("a pop");
    let held: Vec<Token> = popped.tasks.iter().map(|task| task.token).collect();
    store.pop(&q(), Pop { acks: held[..1].to_vec(), ..pop(1) }).await.unwrap();
    is_one_commit("a pop that acks");
    store.heartbeat(&q(), &held[1..], Some(60_000)).await.unwrap();
    is_one_commit("a heartbeat");
    store.ack(&q(), &held[1..2]).await.unwrap();
    is_one_commit("an ack");
    store.release(&q(), Release::PutBack(put_back(&held[2..3]))).await.unwrap();
    is_one_commit("a putback");
    let failed = PutBack { failed: true, reason: "e".to_owned(), ..put_back(&held[3..4]) };
    store.release(&q(), Release::PutBack(failed)).await.unwrap();
    is_one_commit("a failure");
    store.release(&q(), Release::PutBack(PutBack { dead_letter: true, ..put_back(&held[4..5]) })).await.unwrap();
    is_one_commit("a rejection");
    place.clock.0.fetch_add(60_000, Ordering::Relaxed);
    assert_eq!(count(&store).await.leased, 0);
    is_one_commit("what ran out and fell due");
    let dead = store.list(&q(), State::Dead, None, 1).await.unwrap().unwrap().tasks[0].id;
    store.redrive(&q(), &[dead]).await.unwrap();
    is_one_commit("a redrive");
    store.delete(&q(), &[dead]).await.unwrap();
    is_one_commit("a deletion");
}

async fn fails_with(store: &SqliteStore, reason: &str) {
    let until_it_fails = async {
        while !store.check().await.err().is_some_and(|error| error.to_string().contains(reason)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), until_it_fails).await.unwrap();
}

/// Guarantee 1: a file that vanished is noticed, and not replaced by an empty one.
#[tokio::test]
async fn a_file_that_vanishes_is_not_made_anew() {
    let place = lived_in().await;
    let store = place.open();
    let kept = place.folder.path().join("kept");
    fs::rename(place.file(), &kept).unwrap();
    fails_with(&store, "No such file").await;
    assert!(!place.file().exists());
    store.insert(&q(), insert(1)).await.unwrap_err();
    // It goes on when the file is back.
    fs::rename(&kept, place.file()).unwrap();
    is_open_again(&store).await;
    assert_eq!(count(&store).await.inserted, 10);
}

/// Guarantee 4: without its lock, a store that has to open its file again cannot know that it is the only one.
#[tokio::test]
async fn a_lock_that_vanishes_ends_the_use_of_the_file() {
    let place = lived_in().await;
    let store = place.open();
    fs::remove_dir_all(place.file().parent().unwrap()).unwrap();
    fails_with(&store, "its lock was removed").await;
}

const PAGE: usize = 4096;

/// A task with a value on pages of its own.
fn large(byte: u8, plan: Option<crate::store::Plan>) -> NewTask {
    NewTask::new(TaskId::mint(1).unwrap()[0], vec![byte; 5 * PAGE].into(), plan)
}

/// Of the value's pages, the last but one tells then where the last one is: nowhere.
fn damage(place: &Place, byte: u8) {
    let mut bytes = fs::read(place.file()).unwrap();
    let is_of_value = |page: &[u8]| page[100..PAGE].iter().all(|found| *found == byte);
    let page = bytes.chunks(PAGE).position(is_of_value).unwrap();
    bytes[page * PAGE..page * PAGE + 4].fill(0xee);
    fs::write(place.file(), bytes).unwrap();
}

async fn is_open_again(store: &SqliteStore) {
    let until_it_is = async {
        while store.check().await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), until_it_is).await.unwrap();
}

/// Guarantee 12: a task that cannot be read does not stand in the way of its queue, and not of others.
#[tokio::test]
async fn an_unreadable_task_stops_nobody() {
    let place = Place::new();
    let store = place.open();
    let bad = QueueName::parse("bad").unwrap();
    let tasks = vec![large(b'a', None), large(b'b', None)];
    store.insert(&bad, Insert { tasks, ..insert(1) }).await.unwrap();
    store.insert(&q(), insert(1)).await.unwrap();
    drop(store);
    damage(&place, b'a');

    assert!(check(&place.file(), RULES).is_err());
    let store = place.open();
    // Found once, it costs its transaction; from then on it is passed over.
    store.pop(&bad, pop(1)).await.unwrap_err();
    is_open_again(&store).await;
    let popped = store.pop(&bad, pop(1)).await.unwrap();
    assert_eq!(popped.tasks[0].envelope[0], b'b');
    assert!(store.pop(&bad, pop(1)).await.unwrap().tasks.is_empty());
    assert_eq!(take(&store, 1).await.len(), 1);
    let counts = store.counts(&[bad]).await.unwrap()[0].unwrap();
    assert_eq!((counts.ready, counts.leased, counts.inserted), (1, 1, 2));
}

/// Guarantees 11 and 15: when more leases run out at once than one transaction takes back, the first is the first again.
#[tokio::test]
async fn thousands_that_ran_out_come_back_in_order() {
    const TASKS: usize = 7_000;
    let place = Place::new();
    let store = place.open();
    let mut ids = Vec::new();
    for _ in 0..TASKS / 1_000 {
        ids.extend(store.insert(&q(), insert(1_000)).await.unwrap().ids);
    }
    for _ in 0..TASKS / RECLAIM_STEP {
        assert_eq!(take(&store, RECLAIM_STEP).await.len(), RECLAIM_STEP);
    }
    place.clock.0.fetch_add(30_000, Ordering::Relaxed);
    let popped = store.pop(&q(), pop(1)).await.unwrap();
    assert_eq!((popped.tasks[0].id, popped.reclaimed), (ids[0], TASKS as u64));
    let rest = store.pop(&q(), pop(RECLAIM_STEP)).await.unwrap().tasks;
    assert_eq!(rest.iter().map(|task| task.id).collect::<Vec<_>>(), ids[1..=RECLAIM_STEP]);

    place.clock.0.fetch_add(30_000, Ordering::Relaxed);
    assert_eq!(count(&store).await.ready, TASKS as u64);
    while !take(&store, RECLAIM_STEP).await.is_empty() {}
    place.clock.0.fetch_add(30_000, Ordering::Relaxed);
    let (mut cursor, mut back) = (ReapCursor::default(), 0);
    loop {
        let reaped = store.reap(cursor, 10).await.unwrap();
        back += reaped.reclaimed.iter().map(|(_, count)| count).sum::<u64>();
        cursor = reaped.next;
        if cursor == ReapCursor::default() {
            break;
        }
    }
    assert_eq!(back, TASKS as u64);
}

/// A copy in the making, which reads the file for long, keeps no server from starting.
#[tokio::test]
async fn a_file_that_is_being_read_can_be_opened() {
    let place = lived_in().await;
    let store = place.open();
    store.insert(&q(), insert(1)).await.unwrap();
    let reader = place.raw();
    reader.execute_batch("BEGIN; SELECT count(*) FROM tasks;").unwrap();
    store.insert(&q(), insert(1)).await.unwrap();
    drop(store);
    let store = place.open();
    assert_eq!(count(&store).await.inserted, 12);
    drop(reader);
}

#[tokio::test]
async fn what_is_no_whole_store_is_refused_and_left() {
    for (change, reason) in [
        ("DELETE FROM tasks WHERE key = (SELECT max(key) FROM tasks)", "not those that were inserted"),
        ("DELETE FROM tasks WHERE key = (SELECT task FROM leases)", "belongs to no task"),
        ("DELETE FROM tasks WHERE key = (SELECT task FROM tries)", "belongs to no task"),
        ("DELETE FROM queues", "belongs to no task"),
        ("UPDATE queues SET acked = acked + 1", "not those that were inserted"),
        ("UPDATE queues SET name = 'a b'", "the name of queue"),
        ("INSERT INTO dead VALUES (1000, 0, 1)", "belongs to no task"),
        ("INSERT INTO plans VALUES (1000, 1, NULL, NULL)", "belongs to no task"),
        ("INSERT INTO scheduled VALUES (1000, 0, 0)", "belongs to no task"),
        ("INSERT INTO errors VALUES (1000, 'why')", "belongs to no task"),
        ("INSERT INTO cancelled VALUES (1000)", "belongs to no task"),
        ("UPDATE queues SET expired = 1", "not those that were inserted"),
        ("DROP TABLE settings", "no such table"),
        ("DROP TABLE leases", "no such table"),
        ("PRAGMA user_version = 4", "use a newer server"),
        ("PRAGMA user_version = 0", "version 0"),
        ("PRAGMA application_id = 7", "is no store of DataQueue"),
    ] {
        let place = lived_in().await;
        place.raw().execute_batch(change).unwrap();
        place.refused(reason);
        assert!(check(&place.file(), RULES).unwrap_err().contains(reason), "{change}");
    }
    for (content, reason) in
        [("", "is empty"), ("not a database, but a text of some length", "is no store of DataQueue")]
    {
        let place = Place::new();
        drop(place.open());
        fs::write(place.file(), content).unwrap();
        place.refused(reason);
    }
    let place = lived_in().await;
    fs::rename(place.file(), place.folder.path().join("folder/data-queue.db-wal")).unwrap();
    place.refused("is missing");
}

/// Pages that cannot be read are found at the start, all but those of long values, and by `check` without exception.
#[tokio::test]
async fn a_damaged_page_is_refused() {
    let place = lived_in().await;
    let store = place.open();
    store.insert(&q(), insert(1000)).await.unwrap();
    drop(store);
    let whole = fs::read(place.file()).unwrap();
    let pages = whole.len() / PAGE;
    let mut not_needed = 0;
    for page in 1..pages {
        let mut damaged = whole.clone();
        damaged[page * PAGE..page * PAGE + 16].fill(0xaa);
        fs::write(place.file(), &damaged).unwrap();
        let found = check(&place.file(), RULES).expect_err("a damaged page").to_string();
        assert!(!found.contains('\n'), "{found}");
        not_needed += usize::from(place.try_open().is_ok());
    }
    assert!(pages > 15 && not_needed <= 1, "{not_needed} of {pages}");
}

/// What a killed server left is refused with its log, and neither is touched.
#[tokio::test]
async fn a_damaged_file_keeps_its_log() {
    let (place, left) = (lived_in().await, Place::new());
    let store = place.open();
    store.insert(&q(), insert(100)).await.unwrap();
    let (file, log) = (left.file(), format!("{}-wal", left.file().display()));
    fs::create_dir(file.parent().unwrap()).unwrap();
    let mut bytes = fs::read(place.file()).unwrap();
    bytes[4096 * 2..4096 * 2 + 16].fill(0xaa);
    fs::write(&file, bytes).unwrap();
    fs::copy(format!("{}-wal", place.file().display()), &log).unwrap();
    let before = fs::read(&log).unwrap();
    assert!(!before.is_empty());
    left.refused("");
    assert_eq!(fs::read(&log).unwrap(), before);
    // Without the file, its log is not taken for nothing.
    fs::remove_file(&file).unwrap();
    left.refused("is missing");
}

/// Guarantee 16: a disk that stands still does not keep the process from ending; its lock stays until it has ended.
#[tokio::test]
async fn a_disk_that_stands_still_does_not_hold_up_the_end() {
    let place = lived_in().await;
    let config = SqliteConfig {
        path: place.file(),
        durability: Durability::Full,
        reserve: 0,
        rules: RULES,
        timeout: Duration::from_millis(100),
    };
    let store = SqliteStore::open(config, Some(Arc::clone(&place.clock) as _)).unwrap();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let stands_still = store.call(Kind::Change, Lane::Urgent, items(1), move |_| {
        let _ = wait.recv();
        Ok(Ok(()))
    });
    assert!(matches!(stands_still.await, Err(StoreError::Unavailable { did_not_run: false, .. })));
    drop(store);
    assert!(place.try_open().err().expect("a refusal").contains("in use by another server"));
    drop(go_on);
    let until_it_ended = async {
        while place.try_open().is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), until_it_ended).await.unwrap();
}

#[tokio::test]
async fn a_second_store_on_a_file_is_refused() {
    let place = lived_in().await;
    let first = place.open();
    let error = place.try_open().err().expect("a refusal");
    assert!(error.contains("in use by another server"), "{error}");
    assert_eq!(count(&first).await.inserted, 10);
    drop(first);
    place.open();
}

/// A copy is of one moment, though the store is used, and a store again.
#[tokio::test]
async fn a_backup_is_a_store() {
    let place = lived_in().await;
    let store = place.open();
    let copy = place.folder.path().join("copy.db");
    assert!(backup(&place.file(), &copy, RULES).unwrap().contains("10 inserted and 2 acked"));
    let before = count(&store).await;
    store.insert(&q(), insert(1)).await.unwrap();
    assert!(backup(&place.file(), &copy, RULES).unwrap_err().contains("exists already"));

    // Two copies at a time do not get into each other's way, and one of them gets the name.
    let twice = place.folder.path().join("twice.db");
    let both = std::thread::scope(|scope| {
        let make = || scope.spawn(|| backup(&place.file(), &twice, RULES));
        [make(), make()].map(|copy| copy.join().unwrap())
    });
    assert_eq!(both.iter().filter(|done| done.is_ok()).count(), 1, "{both:?}");
    check(&twice, RULES).unwrap();
    assert!(
        fs::read_dir(place.folder.path()).unwrap().all(|entry| !entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .contains("part"))
    );

    let other = Place::new();
    assert!(restore(&place.folder.path().join("none"), &other.file(), RULES).unwrap_err().contains("does not exist"));
    assert!(!other.file().exists());
    let found = restore(&copy, &other.file(), RULES).unwrap();
    assert!(found.contains("7 ready, 1 leased") || found.contains("10 inserted and 2 acked"), "{found}");
    assert!(restore(&copy, &other.file(), RULES).unwrap_err().contains("exists already"));
    assert!(restore(&copy, &place.file(), RULES).unwrap_err().contains("in use"));
    assert_eq!(count(&other.open()).await.inserted, before.inserted);
    assert_eq!(count(&store).await.inserted, before.inserted + 1);
}

/// The store's clock does not go back behind what the file knows.
#[tokio::test]
async fn time_goes_on_after_a_restart() {
    let place = lived_in().await;
    place.raw().execute_batch("UPDATE leases SET renewed_at = 4000000000000, deadline = 4000000001000").unwrap();
    let config = SqliteConfig {
        path: place.file(),
        durability: Durability::Memory,
        reserve: 0,
        rules: RULES,
        timeout: Duration::from_secs(20),
    };
    let store = SqliteStore::open(config, None).unwrap();
    assert!(store.open.setup.clock.now() >= 4_000_000_000_000);
}

/// However many calls wait for a disk that stands still, the server's own question is asked and what is urgent waits in a
/// lane of its own; the rest is refused at once.
#[tokio::test]
async fn too_many_calls_are_refused_but_not_the_checks() {
    let place = lived_in().await;
    let store = place.open();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (is_held, held) = tokio::sync::oneshot::channel();
    let mut is_held = Some(is_held);
    let stands_still = store.call(Kind::Lease, Lane::Urgent, items(1), move |_| {
        is_held.take().map(|is_held| is_held.send(()));
        let _ = wait.recv();
        Ok(Ok(()))
    });
    let queue = q();
    let crowd = async {
        held.await.unwrap();
        let waiting = std::iter::from_fn(|| Some(store.pop(&queue, pop(1)))).take(20_000);
        let mut waiting: FuturesUnordered<_> = waiting.collect();
        // The first that is answered is one that was refused: nothing else moves.
        let first = waiting.next().await.unwrap();
        assert!(matches!(first, Err(StoreError::Overloaded(_))), "{first:?}");
        let (check, ack) = (store.check(), store.ack(&queue, &[]));
        let go = async { drop(go_on) };
        let (check, ack, ()) = tokio::join!(check, ack, go);
        check.unwrap();
        assert_eq!(ack.unwrap(), []);
        while let Some(answer) = waiting.next().await {
            assert!(matches!(answer, Ok(_) | Err(StoreError::Overloaded(_))), "{answer:?}");
        }
    };
    let (still, ()) = tokio::join!(stands_still, crowd);
    still.unwrap();
}
