//! Copies of the embedded store: made while it is used, put back, checked.

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use data_queue_proto::v1::{Outcome, PopBatchRequest};
use tokio::task::{JoinSet, spawn_blocking};

use crate::support::{
    PATIENCE,
    call::{ack, counts, five, held_for_request, insert_json, pop, pop_batch, pop_batch_request, proto, putback, text},
    directory::Directory,
    poll_until,
    server::{Client, Ended, Server, run_to_end},
    wire_tests,
};

const QUEUE: &str = "copied";

/// Runs a command on the store in a folder, beside what the test does meanwhile.
async fn run(command: &[&str], folder: &str) -> Ended {
    let words = command.iter().copied().chain(["--data-dir", folder]).map(str::to_owned).collect::<Vec<_>>();
    let ended = spawn_blocking(move || run_to_end(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    ended.await.expect("the command")
}

/// What the workers know: numbers that were begun to be inserted, inserted, begun to be acked, and acked.
#[derive(Default)]
struct Known([std::sync::Mutex<BTreeSet<u64>>; 4]);

#[derive(Clone, Copy)]
enum Stage {
    Inserting,
    Inserted,
    Acking,
    Acked,
}

impl Known {
    fn add(&self, stage: Stage, numbers: &[u64]) {
        self.0[stage as usize].lock().unwrap().extend(numbers);
    }

    fn all(&self, stage: Stage) -> BTreeSet<u64> {
        self.0[stage as usize].lock().unwrap().clone()
    }
}

/// Inserts, acks, puts back and keeps, until it is enough.
async fn work(mut client: Client, next: Arc<AtomicU64>, known: Arc<Known>, enough: Arc<AtomicBool>) {
    while !enough.load(Ordering::Relaxed) {
        let first = next.fetch_add(5, Ordering::Relaxed);
        let numbers = (first..first + 5).collect::<Vec<_>>();
        let texts = numbers.iter().map(u64::to_string).collect::<Vec<_>>();
        known.add(Stage::Inserting, &numbers);
        insert_json(&mut client, QUEUE, &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
        known.add(Stage::Inserted, &numbers);
        let request = PopBatchRequest { max_tasks: 4, ..pop_batch_request(QUEUE) };
        for (position, task) in pop_batch(&mut client, request).await.unwrap().into_iter().enumerate() {
            let number = text(&task).parse().unwrap();
            if position < 2 {
                known.add(Stage::Acking, &[number]);
                assert_eq!(ack(&mut client, QUEUE, &task.lease_token).await, Outcome::Applied);
                known.add(Stage::Acked, &[number]);
            } else if position == 2 {
                assert_eq!(putback(&mut client, QUEUE, &task.lease_token).await, Outcome::Applied);
            }
        }
    }
}

/// Everything that is in the store, whether held or not.
async fn contents(client: &mut Client) -> BTreeSet<u64> {
    client.putback(held_for_request(QUEUE, proto(Duration::ZERO))).await.unwrap();
    let request = PopBatchRequest {
        max_tasks: 10_000,
        lease: Some(proto(Duration::from_secs(3_600))),
        ..pop_batch_request(QUEUE)
    };
    let mut all = BTreeSet::new();
    loop {
        let tasks = pop_batch(client, request.clone()).await.unwrap();
        if tasks.is_empty() {
            return all;
        }
        for task in &tasks {
            assert!(all.insert(text(task).parse().unwrap()), "twice: {task:?}");
        }
    }
}

/// A folder with a store that was left in order, with one task ready, one leased, one acked.
async fn left_in_order() -> Arc<Directory> {
    let server = Server::on_sqlite_with(&[]);
    let mut client = server.client().await;
    insert_json(&mut client, QUEUE, &["1", "2", "3"]).await;
    let done = pop(&mut client, QUEUE).await.unwrap().lease_token;
    ack(&mut client, QUEUE, &done).await;
    pop(&mut client, QUEUE).await.unwrap();
    server.terminate();
    assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    Arc::clone(server.directory())
}

const LEFT: [u64; 5] = [1, 1, 0, 3, 1];

wire_tests! {
    /// G1, G2, G7, G9, G14: a backup that is made while the server works is the store of one moment: all that was inserted
    /// before, nothing that was acked before, and what came while it was made, whole or not at all.
    async fn backup_under_load_and_restore() {
        let server = Server::on_sqlite_with(&[]);
        let (known, enough) = (Arc::<Known>::default(), Arc::<AtomicBool>::default());
        let next = Arc::<AtomicU64>::default();
        let mut workers = JoinSet::new();
        for _ in 0..4 {
            workers.spawn(work(server.client().await, Arc::clone(&next), Arc::clone(&known), Arc::clone(&enough)));
        }
        let copies = Directory::default();
        for number in 0..3_u64 {
            let worked = async || (known.all(Stage::Acked).len() as u64 >= (number + 1) * 100).then_some(());
            poll_until("some work", PATIENCE, worked).await;
            let copy = copies.join(&format!("copy-{number}.db"));
            let (inserted, acked) = (known.all(Stage::Inserted), known.all(Stage::Acked));
            let ended = run(&["backup", &copy], server.directory().text()).await;
            assert!(ended.ok().contains(&copy), "{ended:?}");
            let (inserting, acking) = (known.all(Stage::Inserting), known.all(Stage::Acking));

            let place = Directory::default();
            let folder = place.join("made/by/restore");
            run(&["restore", &copy], &folder).await.ok();
            run(&["check"], &folder).await.ok();
            let restored = Server::launch(&format!("sqlite:{folder}/data-queue.db"), &[], None);
            let mut client = restored.client().await;
            let counted = counts(&mut client, QUEUE).await;
            let found = contents(&mut client).await;
            assert_eq!(found.len() as u64, counted.ready + counted.leased);
            // A worker's insert is there as a whole.
            assert_eq!((counted.inserted % 5, counted.dead), (0, 0));
            assert!(found.is_subset(&inserting), "what was not inserted yet: {:?}", &found - &inserting);
            let lost = &(&inserted - &found) - &acking;
            assert!(lost.is_empty(), "inserted before, not acked, and gone: {lost:?}");
            assert!(found.is_disjoint(&acked), "acked before, and back: {:?}", &found & &acked);
            assert_eq!(counted.inserted - counted.acked, found.len() as u64);
        }
        enough.store(true, Ordering::Relaxed);
        workers.join_all().await;
        // The server itself has gone on as if nothing had been.
        let mut client = server.client().await;
        assert_eq!(contents(&mut client).await, &known.all(Stage::Inserted) - &known.all(Stage::Acked));
    }

    /// What a backup holds besides tasks: the memory of acks and of request ids, deliveries and expiries.
    async fn a_restored_store_remembers() {
        use crate::support::call::{insert_request, json};
        use data_queue_proto::v1::InsertRequest;
        let server = Server::on_sqlite_with(&[]);
        let mut client = server.client().await;
        let request = InsertRequest { request_id: "once".to_owned(), ..insert_request(QUEUE, vec![json("1"), json("2")]) };
        let first = client.insert(request.clone()).await.unwrap().into_inner();
        let acked = pop(&mut client, QUEUE).await.unwrap().lease_token;
        assert_eq!(ack(&mut client, QUEUE, &acked).await, Outcome::Applied);
        pop(&mut client, QUEUE).await.unwrap();
        client.putback(held_for_request(QUEUE, proto(Duration::ZERO))).await.unwrap();
        let place = Directory::default();
        let copy = place.join("copy.db");
        run(&["backup", &copy], server.directory().text()).await.ok();
        let folder = place.join("restored");
        run(&["restore", &copy], &folder).await.ok();
        let restored = Server::launch(&format!("sqlite:{folder}/data-queue.db"), &[], None);
        let mut client = restored.client().await;
        let again = client.insert(request).await.unwrap().into_inner();
        assert_eq!((again.replayed, again.results), (true, first.results));
        assert_eq!(ack(&mut client, QUEUE, &acked).await, Outcome::AlreadyAcked);
        let task = pop(&mut client, QUEUE).await.unwrap();
        assert_eq!((text(&task), task.deliveries, task.expiries), ("2", 2, 1));
    }

    /// A backup overwrites nothing, and leaves nothing behind where it fails.
    async fn backup_refuses() {
        let directory = left_in_order().await;
        let place = Directory::default();
        fs::write(place.path().join("taken"), "a file").unwrap();
        let (taken, folder) = (place.join("taken"), directory.text().to_owned());
        run(&["backup", &taken], &folder).await.one_line(1, &[&taken, "exists"]);
        assert_eq!(fs::read(place.path().join("taken")).unwrap(), b"a file");
        run(&["backup", place.text()], &folder).await.one_line(1, &["exists"]);
        run(&["backup", &directory.join("data-queue.db")], &folder).await.one_line(1, &["exists"]);
        run(&["backup", &place.join("no/folder/copy.db")], &folder).await.one_line(1, &["no/folder"]);
        run(&["backup", &place.join("copy.db")], &place.join("nowhere")).await.one_line(1, &["nowhere", "does not exist"]);
        for store in ["memory", "redis://127.0.0.1:1"] {
            for command in [&["backup", &place.join("copy.db")][..], &["restore", &taken], &["check"]] {
                let ended = run_to_end(&[command, &["--store", store]].concat());
                ended.one_line(64, &["--data-dir"]);
            }
        }
        let left = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(left, ["taken"]);
        run(&["backup", &place.join("copy.db")], &folder).await.ok();
        let server = Server::on_directory(directory, &[]);
        assert_eq!(five(&mut server.client().await, QUEUE).await, LEFT);
    }

    /// A restore overwrites no store, used or not, and takes no backup that is damaged or none.
    async fn restore_refuses() {
        let directory = left_in_order().await;
        let place = Directory::default();
        let copy = place.join("copy.db");
        run(&["backup", &copy], directory.text()).await.ok();
        let before = fs::read(directory.file()).unwrap();
        run(&["restore", &copy], directory.text()).await.one_line(1, &["exists"]);
        assert!(fs::read(directory.file()).unwrap() == before, "it was changed");

        let server = Server::on_directory(Arc::clone(&directory), &[]);
        run(&["restore", &copy], directory.text()).await.one_line(1, &["in use"]);
        // Nor if somebody moved the file away under a server that runs.
        let empty = Server::on_sqlite_with(&[]);
        fs::rename(empty.directory().file(), empty.directory().path().join("moved")).unwrap();
        run(&["restore", &copy], empty.directory().text()).await.one_line(1, &["in use"]);
        assert_eq!(five(&mut server.client().await, QUEUE).await, LEFT);

        let fresh = Directory::default();
        let bad = place.join("bad.db");
        let good = fs::read(&copy).unwrap();
        for (case, file) in [
            ("empty", vec![]), ("no database", b"no database\n".repeat(1_000)), ("half", good[..good.len() / 2].to_vec()),
            ("damaged", good.iter().enumerate().map(|(at, byte)| if at < 4_096 { *byte } else { 0xa5 }).collect()),
        ] {
            fs::write(&bad, file).unwrap();
            eprintln!("{case}");
            run(&["restore", &bad], fresh.text()).await.one_line(1, &[&bad]);
            assert!(!fresh.file().exists(), "{case}: a store was made");
        }
        run(&["restore", &place.join("nowhere.db")], fresh.text()).await.one_line(1, &["nowhere.db", "does not exist"]);
        let said = run(&["restore", &copy], fresh.text()).await;
        for word in [fresh.text(), "1 ready", "1 leased", "3 inserted", "1 acked"] {
            assert!(said.ok().contains(word), "{word}: {said:?}");
        }
        let restored = Server::on_directory(Arc::new(fresh), &[]);
        assert_eq!(five(&mut restored.client().await, QUEUE).await, LEFT);
    }

    /// A store that is whole is said to be, with what is in it, stopped and running; one that is damaged is not, wherever it
    /// is damaged, and neither is changed.
    async fn check() {
        let directory = left_in_order().await;
        let words = ["is whole", "1 queues", "1 ready", "1 leased", "0 dead", "3 inserted", "1 acked"];
        let whole = async |folder: &str| {
            let ended = run(&["check"], folder).await;
            assert!(words.iter().all(|word| ended.ok().contains(word)), "{ended:?}");
        };
        whole(directory.text()).await;
        let server = Server::on_directory(Arc::clone(&directory), &[]);
        whole(directory.text()).await;
        server.kill();
        whole(directory.text()).await;
        server.restart().await;
        assert_eq!(five(&mut server.client().await, QUEUE).await, LEFT);
        server.terminate();
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));

        let good = fs::read(directory.file()).unwrap();
        let mut cases = vec![
            ("empty".to_owned(), vec![]),
            ("no database".to_owned(), b"no database\n".repeat(1_000)),
            ("half".to_owned(), good[..good.len() / 2].to_vec()),
        ];
        for page in 1..good.len() / 4_096 {
            let mut damaged = good.clone();
            damaged[page * 4_096..(page + 1) * 4_096].fill(0xa5);
            cases.push((format!("page {page} overwritten"), damaged));
        }
        for (case, file) in cases {
            fs::write(directory.file(), &file).unwrap();
            eprintln!("{case}");
            run(&["check"], directory.text()).await.one_line(1, &["data-queue.db"]);
            assert!(fs::read(directory.file()).unwrap() == file, "{case}: it was changed");
        }
        run(&["check"], &directory.join("nowhere")).await.one_line(1, &["does not exist"]);
    }
}
