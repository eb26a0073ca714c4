//! The library's calls for operators, and putbacks with options.

use std::time::Duration;

use data_queue_client::{
    Client, DeadLetterCause, DeleteOutcome, ErrorKind, NewTask, Outcome, Page, Pop, Putback, QueueSettings,
    RedriveOutcome, SettingsUpdate, Task, TaskState, TaskValue, Watch,
};
use tokio::time::timeout;

use crate::server::{PATIENCE, Server};

async fn insert(client: &Client, queue: &str, count: usize) -> Vec<String> {
    let tasks = (0..count).map(|number| NewTask::json_text(number.to_string()));
    client.insert_many(queue, tasks).await.unwrap().tasks.into_iter().map(|task| task.id).collect()
}

async fn pop(client: &Client, queue: &str) -> Task {
    client.pop(queue, Pop::new().wait(Duration::from_secs(10))).await.unwrap().task.expect("a task")
}

async fn ids(client: &Client, queue: &str, state: TaskState) -> Vec<String> {
    let page = client.admin().list_tasks(queue, state, &Page::first()).await.unwrap();
    page.items.into_iter().map(|task| task.id).collect()
}

/// What one queue shows goes into another one as it is, once.
#[tokio::test]
async fn tasks_are_imported_as_they_are_shown() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    let new = NewTask::json_text("[1]").header("k", "v").priority(3).ttl(Duration::from_secs(3_600)).unique_key("u");
    let tasks = [new, NewTask::bytes(vec![0, 255]).delay(Duration::from_secs(600)), NewTask::json_text("3")];
    client.insert_many("from", tasks).await.unwrap();
    let held = pop(&client, "from").await;
    client.putback_with(&held, Putback::new().failed(true).delay(Duration::ZERO)).await.unwrap();
    let held = pop(&client, "from").await;
    client.putback_with(&held, Putback::new().dead_letter(true).reason("no")).await.unwrap();
    let mut shown = Vec::new();
    for state in [TaskState::Dead, TaskState::Ready, TaskState::Scheduled] {
        shown.extend(admin.list_tasks("from", state, &Page::first()).await.unwrap().items);
    }
    assert_eq!(shown.len(), 3);
    for replayed in [false, true] {
        let imported = admin.import("to", shown.clone()).await.unwrap();
        assert_eq!(imported.len(), 3);
        for (before, imported) in shown.iter().zip(imported) {
            assert!(!imported.duplicate && imported.replayed == replayed && imported.id != before.id, "{imported:?}");
            let mut expected = before.clone();
            (expected.id, expected.queue) = (imported.id.clone(), "to".to_owned());
            assert_eq!(admin.get_task("to", &imported.id).await.unwrap(), expected);
        }
    }
    assert_eq!(admin.get_queue("to").await.unwrap().counts.inserted, 3);
    pop(&client, "from").await;
    let held = admin.list_tasks("from", TaskState::Leased, &Page::first()).await.unwrap().items;
    assert_eq!(admin.import("to", held).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn settings_are_set_unset_and_told() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    assert_eq!(admin.get_queue("q").await.unwrap_err().kind(), ErrorKind::NotFound);
    let second = Duration::from_secs(1);
    let update = SettingsUpdate::new()
        .lease(60 * second)
        .max_failures(3)
        .max_expiries(4)
        .backoff_min(2 * second)
        .backoff_max(8 * second)
        .max_tasks(1)
        .max_bytes(1_000)
        .dead_letter_retention(90 * second);
    let set = admin.update_queue("q", update).await.unwrap();
    assert_eq!((set.lease, set.max_failures, set.max_expiries), (Some(60 * second), Some(3), Some(4)));
    assert_eq!((set.backoff_min, set.backoff_max), (Some(2 * second), Some(8 * second)));
    assert_eq!((set.max_tasks, set.max_bytes), (Some(1), Some(1_000)));
    assert_eq!((set.dead_letter_retention, set.paused), (Some(90 * second), false));
    assert_eq!(admin.get_queue("q").await.unwrap().settings, Some(set.clone()));

    insert(&client, "q", 1).await;
    let full = client.insert("q", NewTask::json_text("1")).await.unwrap_err();
    assert!(full.kind() == ErrorKind::QueueFull && full.retry_after().is_some(), "{full}");

    let none = SettingsUpdate::new().lease(None).max_tasks(None).backoff_min(None);
    let left = admin.update_queue("q", none).await.unwrap();
    assert_eq!((left.lease, left.max_tasks, left.backoff_min, left.max_failures), (None, None, None, Some(3)));
    assert_ne!(left, QueueSettings::default());
    for wrong in [SettingsUpdate::new(), SettingsUpdate::new().lease(Duration::from_millis(1))] {
        assert_eq!(admin.update_queue("q", wrong).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

#[tokio::test]
async fn a_list_of_queues_is_read_page_by_page() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    for queue in ["a", "b", "c"] {
        insert(&client, queue, 2).await;
    }
    let (mut next, mut names) = (Some(Page::first().size(2)), Vec::new());
    while let Some(page) = next {
        let found = admin.list_queues(&Page::after(page.token()).size(2)).await.unwrap();
        assert!(found.items.len() <= 2);
        names.extend(found.items.into_iter().map(|queue| (queue.name, queue.counts.ready, queue.settings)));
        next = found.next;
    }
    let expected = ["a", "b", "c"].map(|name| (name.to_owned(), 2, None));
    assert_eq!(names, expected);
    let wrong = admin.list_queues(&Page::after("nonsense")).await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn nothing_is_delivered_while_a_queue_is_paused() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    admin.pause("q").await.unwrap();
    insert(&client, "q", 1).await;
    assert!(client.pop("q", Pop::new()).await.unwrap().task.is_none());
    assert!(admin.get_queue("q").await.unwrap().settings.unwrap().paused);
    admin.resume("q").await.unwrap();
    pop(&client, "q").await;
    assert_eq!(admin.resume("none").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_putback_says_when_why_and_whether_it_is_the_last() {
    let server = Server::start(&["--backoff-min", "1h"]);
    let (client, admin) = (server.client(), server.client().admin());
    let all = insert(&client, "q", 4).await;

    let later = pop(&client, "q").await;
    client.putback_with(&later, Putback::new().delay(Duration::from_secs(3600))).await.unwrap();
    let failed = pop(&client, "q").await;
    client.fail(&failed, "no route").await.unwrap();
    assert_eq!(ids(&client, "q", TaskState::Scheduled).await.len(), 2);
    let seen = admin.get_task("q", &all[1]).await.unwrap();
    assert_eq!((seen.state, seen.failures, seen.last_error.as_str()), (TaskState::Scheduled, 1, "no route"));
    assert!(seen.due_at > seen.inserted_at && seen.value == TaskValue::Json("1".into()));
    assert_eq!(admin.get_task("q", &all[0]).await.unwrap().failures, 0);

    let rejected = [pop(&client, "q").await, pop(&client, "q").await];
    let tokens = rejected.iter().map(Task::lease_token).chain(["0".repeat(32).leak() as &str]);
    let options = Putback::new().dead_letter(true).reason("x".repeat(2_000));
    let done = client.putback_tokens_with("q", tokens, options).await.unwrap();
    assert_eq!(done.outcomes, [Outcome::Applied, Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!((done.put_back, done.dead_lettered), (0, 2));
    let dead = admin.list_tasks("q", TaskState::Dead, &Page::first().size(1)).await.unwrap();
    let (first, more) = (&dead.items[0], dead.next.expect("another one"));
    assert_eq!(first.cause, Some(DeadLetterCause::Rejected));
    assert!(first.died_at.is_some() && first.last_error.len() == 1_024);
    // They died together.
    let mut dead = [first.id.clone(), admin.list_tasks("q", TaskState::Dead, &more).await.unwrap().items[0].id.clone()];
    dead.sort_unstable();
    let mut expected = [all[2].clone(), all[3].clone()];
    expected.sort_unstable();
    assert_eq!(dead, expected);

    let lost = client.putback_with(&failed, Putback::new()).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::LeaseLost);
    let far = Putback::new().delay(Duration::from_secs(367 * 24 * 3600));
    let wrong = client.putback_with(&failed, far).await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn dead_letters_are_made_ready_again() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    let keyed = || NewTask::json_text("1").unique_key("k");
    let first = client.insert_many("q", [keyed(), keyed()]).await.unwrap().tasks;
    assert_eq!((first[0].duplicate, first[1].duplicate), (false, true));
    assert_eq!(first[0].id, first[1].id);
    let mut all = vec![first[0].id.clone()];
    all.extend(insert(&client, "q", 4).await);
    for _ in &all {
        let task = pop(&client, "q").await;
        client.putback_with(&task, Putback::new().dead_letter(true)).await.unwrap();
    }
    client.insert("q", keyed()).await.unwrap();

    let strange = "00000000-0000-4000-8000-000000000000".to_owned();
    let some = admin.redrive("q", [&all[0], &all[1], &strange]).await.unwrap();
    assert_eq!(some.outcomes, [RedriveOutcome::Duplicate, RedriveOutcome::Redriven, RedriveOutcome::NotFound]);
    assert_eq!((some.redriven, some.duplicates), (1, 1));
    assert_eq!(admin.redrive_oldest("q", 0).await.unwrap_err().field(), Some("max_tasks"));
    assert_eq!(admin.redrive_oldest("q", 2).await.unwrap().outcomes, []);
    admin.redrive_all("q").await.unwrap();
    assert_eq!(ids(&client, "q", TaskState::Dead).await, [all[0].as_str()]);
    assert_eq!(admin.get_queue("q").await.unwrap().counts.ready, 5);
}

#[tokio::test]
async fn tasks_and_queues_are_deleted_and_purged() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    let all = insert(&client, "q", 3).await;
    let held = pop(&client, "q").await;
    let outcomes = admin.delete_tasks("q", &all[..2]).await.unwrap();
    assert_eq!(outcomes, [DeleteOutcome::Cancelled, DeleteOutcome::Deleted]);
    assert_eq!(admin.delete_tasks("q", [&all[1]]).await.unwrap(), [DeleteOutcome::NotFound]);
    assert_eq!(admin.get_task("q", &all[1]).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(admin.get_task("q", "x").await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert!(admin.get_task("q", &all[0]).await.unwrap().cancelled);
    let beat = client.heartbeat_tokens("q", [held.lease_token()], None).await.unwrap();
    assert_eq!((beat.outcomes, beat.cancelled), (vec![Outcome::Applied], vec![held.lease_token().to_owned()]));
    client.putback(&held).await.unwrap();

    assert_eq!(admin.delete_queue("q", false).await.unwrap_err().kind(), ErrorKind::QueueNotEmpty);
    assert_eq!(admin.purge("q", []).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(admin.purge("q", [TaskState::Dead]).await.unwrap(), 0);
    assert_eq!(admin.purge("q", [TaskState::Ready, TaskState::Scheduled]).await.unwrap(), 1);
    let counts = admin.get_queue("q").await.unwrap().counts;
    assert_eq!((counts.ready, counts.deleted, counts.purged, counts.inserted), (0, 2, 1, 3));
    admin.delete_queue("q", false).await.unwrap();
    insert(&client, "q", 1).await;
    admin.delete_queue("q", true).await.unwrap();
    assert_eq!(admin.get_queue("q").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_watch_tells_again_and_again() {
    let server = Server::start(&[]);
    let (client, admin) = (server.client(), server.client().admin());
    insert(&client, "a", 1).await;
    let watch = Watch::queues(["a", "b"]).interval(Duration::from_millis(100));
    let mut told = admin.watch_queues(watch).await.unwrap();
    let first = timeout(PATIENCE, told.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((first.len(), first[0].queue.as_str(), first[0].counts.ready), (1, "a", 1));
    insert(&client, "b", 2).await;
    let later = timeout(PATIENCE, async {
        loop {
            let told = told.next().await.unwrap().unwrap();
            if let [_, other] = &told[..] {
                return other.clone();
            }
        }
    });
    let other = later.await.expect("the new queue in time");
    assert_eq!((other.queue.as_str(), other.counts.inserted), ("b", 2));
    let often = admin.watch_queues(Watch::all().interval(Duration::from_millis(1))).await;
    let error = match often {
        Ok(mut told) => told.next().await.unwrap().unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

/// A delivery of a consumer fails with a reason, or is cancelled by an operator.
#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_fails_waits_or_is_cancelled() {
    let server = Server::start(&["--backoff-min", "1h"]);
    let (client, admin) = (server.client(), server.client().admin());
    let all = insert(&client, "q", 4).await;
    let mut consumer = client.consumer("q").lease(Duration::from_secs(1)).start().unwrap();
    let mut next = async || timeout(PATIENCE, consumer.next()).await.unwrap().unwrap().unwrap();
    next().await.fail("no route").await.unwrap();
    next().await.put_back_with(Putback::new().delay(Duration::from_secs(3600))).await.unwrap();
    next().await.put_back_with(Putback::new().dead_letter(true).reason("bad")).await.unwrap();
    let held = next().await;
    assert!(!held.is_cancelled());
    assert_eq!(admin.delete_tasks("q", [held.id()]).await.unwrap(), [DeleteOutcome::Cancelled]);
    timeout(PATIENCE, held.cancelled()).await.expect("to be told");
    assert!(held.is_cancelled() && !held.is_lost());
    held.putback().await.unwrap();

    let failed = admin.get_task("q", &all[0]).await.unwrap();
    assert_eq!((failed.state, failed.failures, failed.last_error.as_str()), (TaskState::Scheduled, 1, "no route"));
    let later = admin.get_task("q", &all[1]).await.unwrap();
    assert_eq!((later.state, later.failures), (TaskState::Scheduled, 0));
    let dead = admin.get_task("q", &all[2]).await.unwrap();
    assert_eq!((dead.state, dead.last_error.as_str()), (TaskState::Dead, "bad"));
    assert_eq!(admin.get_task("q", &all[3]).await.unwrap_err().kind(), ErrorKind::NotFound);
}
