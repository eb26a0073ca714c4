//! What a file keeps of what sets tasks and queues apart, and when that leaves the file.

use super::*;
use crate::store::{Deleted, Due, Plan, PutBack, Redriven, Seen, Setting, State};

/// What is in the file only of tasks and queues that are not like most.
const RARE: [&str; 8] = ["plans", "scheduled", "errors", "cancelled", "dead", "tries", "leases", "settings"];

fn rows(place: &Place, table: &str) -> i64 {
    number_of(place, &format!("SELECT count(*) FROM {table}"))
}

fn task(name: &str, due: Option<Due>, plan: Plan) -> NewTask {
    NewTask { due, ..NewTask::new(TaskId::mint(1).unwrap()[0], name.to_owned().into(), Some(plan)) }
}

fn plain(name: &str) -> NewTask {
    task(name, None, Plan::default())
}

fn of_priority(name: &str, priority: u8) -> NewTask {
    task(name, None, Plan { priority, ..Plan::default() })
}

fn unique(name: &str, key: &str) -> NewTask {
    task(name, None, Plan { unique_key: Some(key.to_owned()), ..Plan::default() })
}

fn ending(name: &str, ttl: Millis) -> NewTask {
    task(name, None, Plan { ttl: Some(ttl), ..Plan::default() })
}

fn delayed(name: &str, delay: Millis) -> NewTask {
    task(name, Some(Due::In(delay)), Plan::default())
}

fn with(tasks: Vec<NewTask>) -> Insert {
    Insert { tasks, ..insert(1) }
}

fn name(envelope: &[u8]) -> String {
    String::from_utf8(envelope.to_vec()).unwrap()
}

async fn take_names(store: &SqliteStore, max_tasks: usize) -> Vec<(String, Token)> {
    let tasks = store.pop(&q(), pop(max_tasks)).await.unwrap().tasks;
    tasks.iter().map(|task| (name(&task.envelope), task.token)).collect()
}

async fn fail(store: &SqliteStore, token: Token, delay: Option<Millis>, dead_letter: bool) {
    let reason = "no luck".to_owned();
    let back = PutBack { tokens: vec![token], delay, failed: true, dead_letter, reason, chance: 0 };
    assert_eq!(store.release(&q(), Release::PutBack(back)).await.unwrap().0, [Outcome::Applied]);
}

/// All tasks in a state, page by page.
async fn listed(store: &SqliteStore, state: State, page: usize) -> Vec<Seen> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(&q(), state, after.as_ref(), page).await.unwrap().expect("the queue is known");
        all.extend(page.tasks);
        after = page.next;
        if after.is_none() {
            return all;
        }
    }
}

async fn everything(store: &SqliteStore) -> (Vec<Vec<Seen>>, Counts, Option<crate::store::Settings>) {
    let mut states = Vec::new();
    for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
        states.push(listed(store, state, 2).await);
    }
    (states, count(store).await, store.settings(&q()).await.unwrap())
}

/// Ready, scheduled, leased and dead, with every mark that a task can have: `a` to `c` by priority, `e` ends, `s` is due later,
/// `t` waits after it failed, `d` was rejected, `h` and `i` are held, `i` is cancelled, and `r` came back after it was due.
async fn eventful() -> Place {
    let place = Place::new();
    let store = place.open();
    let early = vec![plain("d"), plain("t"), unique("h", "h"), plain("i"), plain("came back"), delayed("r", 10)];
    store.insert(&q(), with(early)).await.unwrap();
    let held = take_names(&store, 5).await;
    fail(&store, held[0].1, None, true).await;
    fail(&store, held[1].1, Some(70_000), false).await;
    let seen = listed(&store, State::Leased, 5).await;
    let cancelled = seen.iter().find(|seen| name(&seen.envelope) == "i").unwrap().id;
    assert_eq!(store.delete(&q(), &[cancelled]).await.unwrap(), [Deleted::Cancelled]);
    let late = vec![of_priority("a", 9), of_priority("b", 1), ending("e", 90_000), plain("c"), delayed("s", 60_000)];
    let mut late = store.insert(&q(), with(late)).await.unwrap().ids;
    fail(&store, held[4].1, Some(0), false).await;
    // Due now, behind `c`; and one more that goes at once.
    place.clock.0.fetch_add(10, Ordering::Relaxed);
    late.extend(store.insert(&q(), with(vec![plain("gone"), ending("too late", 1)])).await.unwrap().ids);
    assert_eq!(store.delete(&q(), &late[5..6]).await.unwrap(), [Deleted::Gone]);
    place.clock.0.fetch_add(1, Ordering::Relaxed);
    let changes = [(Setting::Lease, Some(45_000)), (Setting::MaxBytes, Some(u64::MAX)), (Setting::Paused, Some(0))];
    store.change(&q(), &changes).await.unwrap();
    store.change(&q(), &[(Setting::Paused, None)]).await.unwrap();
    drop(store);
    place
}

/// Guarantees 1, 8, 10 and 11: everything that can be seen of tasks and settings is the same after a restart, but for leases,
/// which run their full length again.
#[tokio::test]
async fn a_restart_changes_nothing_but_the_ends_of_leases() {
    let place = eventful().await;
    let store = place.open();
    let (states, counts, settings) = everything(&store).await;
    let names = |state: usize| states[state].iter().map(|seen| name(&seen.envelope)).collect::<Vec<_>>();
    assert_eq!(names(0), ["a", "b", "came back", "e", "c", "r"]);
    assert_eq!(
        (names(1), names(2), names(3)),
        (vec!["s".into(), "t".into()], vec!["h".into(), "i".into()], vec!["d".into()])
    );
    assert_eq!((states[1][1].failures, states[3][0].last_error.as_str()), (1, "no luck"));
    assert_eq!((states[2][0].cancelled, states[2][1].cancelled), (false, true));
    assert_eq!((counts.inserted, counts.deleted, counts.expired), (13, 1, 1));
    assert_eq!(settings.as_ref().unwrap().get(Setting::MaxBytes), Some(u64::MAX));
    drop(store);

    place.clock.0.fetch_add(5_000, Ordering::Relaxed);
    let store = place.open();
    let (mut again, counts_again, settings_again) = everything(&store).await;
    for (before, again) in states[2].iter().zip(&mut again[2]) {
        assert_eq!(again.at, before.at.map(|at| at + 5_000));
        again.at = before.at;
    }
    assert_eq!((again, settings_again), (states, settings));
    let oldest_ready = counts.oldest_ready.map(|age| age + 5_000);
    assert_eq!(counts_again, Counts { oldest_ready, ..counts });
    check(&place.file(), RULES).unwrap();

    // What is known of them works as before: the key is taken, the cancelled one goes, the others come in their order.
    let twice = store.insert(&q(), with(vec![unique("h again", "h")])).await.unwrap();
    assert_eq!(twice.duplicates, [0]);
    place.clock.0.fetch_add(54_989, Ordering::Relaxed);
    let all: Vec<String> = take_names(&store, 20).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(all, ["a", "b", "h", "came back", "e", "c", "r", "s"]);
    assert_eq!(count(&store).await.deleted, 2);
}

/// Of what is gone, nothing stays in the file, whatever way it went.
#[tokio::test]
async fn what_is_known_of_a_task_goes_with_it() {
    for way in ["acked", "purged", "deleted", "expired"] {
        let place = eventful().await;
        let store = place.open();
        match way {
            "acked" => {
                place.clock.0.fetch_add(80_000, Ordering::Relaxed);
                let dead = listed(&store, State::Dead, 10).await[0].id;
                assert_eq!(store.redrive(&q(), &[dead]).await.unwrap(), [Redriven::Ready]);
                let tokens = take(&store, 20).await;
                store.ack(&q(), &tokens).await.unwrap();
            }
            "purged" => {
                for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
                    while store.purge(&q(), state).await.unwrap() > 0 {}
                }
            }
            "deleted" => {
                for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
                    let ids: Vec<TaskId> = listed(&store, state, 10).await.iter().map(|seen| seen.id).collect();
                    store.delete(&q(), &ids).await.unwrap();
                }
                store.release_held(&q(), 0).await.unwrap();
            }
            _ => {
                store.change(&q(), &[(Setting::DeadLetterRetention, Some(1))]).await.unwrap();
                store.purge(&q(), State::Leased).await.unwrap();
                store.purge(&q(), State::Scheduled).await.unwrap();
                let tokens = take(&store, 20).await;
                store.ack(&q(), &tokens[..2]).await.unwrap();
                place.clock.0.fetch_add(100_000, Ordering::Relaxed);
                let tokens = take(&store, 20).await;
                store.ack(&q(), &tokens).await.unwrap();
            }
        }
        let counts = count(&store).await;
        assert_eq!((counts.ready, counts.scheduled, counts.leased, counts.dead), (0, 0, 0, 0), "{way}");
        store.change(&q(), &Setting::ALL.map(|setting| (setting, None))).await.unwrap();
        for table in RARE.into_iter().chain(["tasks"]) {
            assert_eq!(rows(&place, table), 0, "{table}, {way}");
        }
        drop(store);
        assert_eq!(count(&place.open()).await, counts, "{way}");
    }
}

/// The path of a plain task writes nothing of this.
#[tokio::test]
async fn a_plain_task_has_no_row_but_its_own() {
    let place = Place::new();
    let store = place.open();
    store.insert(&q(), insert(10)).await.unwrap();
    let tokens = take(&store, 5).await;
    store.heartbeat(&q(), &tokens, None).await.unwrap();
    assert_eq!(RARE.map(|table| rows(&place, table)), [0, 0, 0, 0, 0, 0, 5, 0]);
    store.ack(&q(), &tokens).await.unwrap();
    assert_eq!(RARE.map(|table| rows(&place, table)), [0; 8]);
}

/// Settings of a newer server are left for it.
#[tokio::test]
async fn settings_that_are_not_known_are_kept() {
    let place = Place::new();
    let store = place.open();
    store.change(&q(), &[(Setting::MaxTasks, Some(7))]).await.unwrap();
    drop(store);
    place.raw().execute_batch("INSERT INTO settings VALUES (1, 'of_tomorrow', 3)").unwrap();
    let store = place.open();
    assert_eq!(store.change(&q(), &[(Setting::MaxTasks, None)]).await.unwrap(), crate::store::Settings::default());
    drop(store);
    assert_eq!(number_of(&place, "SELECT value FROM settings WHERE name = 'of_tomorrow'"), 3);
    check(&place.file(), RULES).unwrap();
}

/// Bytes are counted from what is in the file, too.
#[tokio::test]
async fn limits_hold_for_what_was_there_before() {
    let place = Place::new();
    let store = place.open();
    store.insert(&q(), with(["1", "22", "333", "4444"].map(plain).into())).await.unwrap();
    let held = take_names(&store, 2).await;
    fail(&store, held[0].1, None, true).await;
    drop(store);
    let store = place.open();
    let max = Setting::MaxBytes;
    store.change(&q(), &[(max, Some(10))]).await.unwrap();
    let refused = store.insert(&q(), with(vec![plain("55")])).await;
    assert!(matches!(refused, Err(StoreError::QueueFull(setting, 10)) if setting == max), "{refused:?}");
    store.insert(&q(), with(vec![plain("6")])).await.unwrap();
    store.ack(&q(), &[held[1].1]).await.unwrap();
    store.insert(&q(), with(vec![plain("77")])).await.unwrap();
    store.insert(&q(), with(vec![plain("")])).await.unwrap();
    store.insert(&q(), with(vec![plain("8")])).await.unwrap_err();
}

/// Guarantees 10, 11 and 15: however many have waited for their time, no transaction sees to all of them, and a pop goes on when
/// all are where they belong.
#[tokio::test]
async fn thousands_whose_time_has_come_are_seen_to_before_a_pop() {
    const MANY: usize = 3_000;
    let place = Place::new();
    let store = place.open();
    let mut delayed_ids = Vec::new();
    for batch in 0..MANY / 1_000 {
        store.insert(&q(), with((0..1_000).map(|_| ending("ends", 1_000)).collect())).await.unwrap();
        // The later they are inserted, the earlier they fall due.
        let tasks = (0..1_000).map(|_| delayed("due", 900 - batch as u64)).collect();
        delayed_ids.splice(0..0, store.insert(&q(), with(tasks)).await.unwrap().ids);
    }
    place.clock.0.fetch_add(1_000, Ordering::Relaxed);
    let queue = q();
    let one_step = store.call(Kind::Lease, Lane::Urgent, items(1), move |engine| {
        engine.step(&queue, |queue, turn| Ok((queue.reclaim(turn)?, queue.ever.expired))).map(Ok)
    });
    assert_eq!(one_step.await.unwrap(), (0, 2_000));
    let popped = store.pop(&q(), pop(RECLAIM_STEP)).await.unwrap();
    assert_eq!((popped.reclaimed, popped.ready), (MANY as u64, (MANY - RECLAIM_STEP) as u64));
    assert_eq!(popped.tasks.iter().map(|task| task.id).collect::<Vec<_>>(), delayed_ids[..RECLAIM_STEP]);
    assert_eq!(count(&store).await.expired, MANY as u64);
    drop(store);
    let rest = place.open().pop(&q(), pop(RECLAIM_STEP)).await.unwrap().tasks;
    assert_eq!(rest.iter().map(|task| task.id).collect::<Vec<_>>(), delayed_ids[RECLAIM_STEP..2 * RECLAIM_STEP]);

    // What administration sees is up to date as well.
    let (store, queue) = (place.open(), QueueName::parse("ending").unwrap());
    for _ in 0..MANY / 1_000 {
        store.insert(&queue, with((0..1_000).map(|_| ending("ends", 1)).collect())).await.unwrap();
    }
    place.clock.0.fetch_add(1, Ordering::Relaxed);
    assert!(store.drop_queue(&queue, false).await.unwrap());
}

/// A queue that was dropped is gone at once, and its file is cleared little by little, also when the server was restarted; the
/// name is free meanwhile.
#[tokio::test]
async fn what_a_dropped_queue_had_leaves_the_file() {
    let place = eventful().await;
    let store = place.open();
    let other = QueueName::parse("other").unwrap();
    let request = |id: &str| RequestKey { id: id.to_owned(), fingerprint: crate::store::Fingerprint([1; 16]) };
    for number in 0..40 {
        // Between tasks of another queue, so that no two keys follow each other.
        for _ in 0..5 {
            store.insert(&q(), insert(1)).await.unwrap();
            store.insert(&other, insert(1)).await.unwrap();
        }
        let request = Some(request(&number.to_string()));
        store.insert(&q(), Insert { request, ..insert(20) }).await.unwrap();
    }
    super::producers::produce(&store, "p", 1..10).await;
    let tokens = take(&store, 10).await;
    store.ack(&q(), &tokens).await.unwrap();
    assert!(matches!(store.drop_queue(&q(), false).await, Err(StoreError::NotEmpty)));
    assert!(store.drop_queue(&q(), true).await.unwrap());
    assert!(!store.drop_queue(&q(), true).await.unwrap());
    assert_eq!(store.queues(None, 10).await.unwrap(), std::slice::from_ref(&other));
    assert_eq!(store.settings(&q()).await.unwrap(), None);
    assert!(rows(&place, "tasks") > 200, "most of it is still there");

    // The name's new queue knows nothing of it.
    let again = Insert { request: Some(request("0")), ..insert(3) };
    assert!(!store.insert(&q(), again).await.unwrap().replayed);
    assert_eq!(store.ack(&q(), &tokens).await.unwrap(), [Outcome::LeaseLost; 10]);
    drop(store);
    assert!(check(&place.file(), RULES).unwrap().contains("2 queues; tasks: 203 ready"));
    let store = place.open();
    for _ in 0..30 {
        store.look(&[q()]).await.unwrap();
    }
    assert_eq!((rows(&place, "tasks"), rows(&place, "queues"), rows(&place, "requests")), (203, 2, 1));
    assert_eq!((rows(&place, "acked"), rows(&place, "answers"), rows(&place, "producers")), (0, 0, 0));
    assert_eq!(RARE.map(|table| rows(&place, table)), [0; 8]);
    let counts = count(&store).await;
    assert_eq!((counts.ready, counts.inserted), (3, 3));
    drop(store);
    assert_eq!(count(&place.open()).await, counts);
}

/// Guarantee 12: a task that cannot be read cannot be deleted either. When its time is over, or its queue is dropped, that stops
/// nobody.
#[tokio::test]
async fn an_unreadable_task_that_has_to_go_stops_nobody() {
    for dropped in [false, true] {
        let place = Place::new();
        let store = place.open();
        let bad = QueueName::parse("bad").unwrap();
        let plan = Plan { ttl: Some(1_000), ..Plan::default() };
        let tasks = vec![large(b'a', Some(plan.clone())), large(b'b', Some(plan)), plain("c")];
        let ids = store.insert(&bad, with(tasks)).await.unwrap().ids;
        store.insert(&q(), insert(1)).await.unwrap();
        drop(store);
        damage(&place, b'a');
        let store = place.open();
        if dropped {
            // That it cannot be deleted is found by the commit.
            store.drop_queue(&bad, true).await.unwrap_err();
            is_open_again(&store).await;
            assert!(store.drop_queue(&bad, true).await.unwrap());
            for _ in 0..3 {
                store.look(&[q()]).await.unwrap();
            }
            assert_eq!(rows(&place, "tasks"), 2, "the unreadable one, and the one of the other queue");
        } else {
            place.clock.0.fetch_add(1_000, Ordering::Relaxed);
            store.look(std::slice::from_ref(&bad)).await.unwrap_err();
            is_open_again(&store).await;
            let tasks = store.pop(&bad, pop(5)).await.unwrap().tasks;
            assert_eq!(tasks.iter().map(|task| name(&task.envelope)).collect::<Vec<_>>(), ["c"]);
            assert_eq!(
                store.delete(&bad, &ids).await.unwrap(),
                [Deleted::Unknown, Deleted::Unknown, Deleted::Cancelled]
            );
            assert_eq!(store.tasks(&bad, &ids[..1]).await.unwrap(), [None]);
            let counts = store.counts(std::slice::from_ref(&bad)).await.unwrap()[0].unwrap();
            assert_eq!((counts.ready, counts.leased, counts.expired, counts.inserted), (1, 1, 1, 3));
        }
        assert_eq!(take(&store, 5).await.len(), 1);
        drop(store);
        place.open();
    }
}

/// A line from whose midst most tasks are taken keeps the order of the others, and does not keep room for those that are gone.
#[tokio::test]
async fn tasks_are_taken_from_the_midst_of_a_line() {
    let place = Place::new();
    let store = place.open();
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.extend(store.insert(&q(), insert(250)).await.unwrap().ids);
    }
    let (kept, gone): (Vec<_>, Vec<_>) = ids.iter().enumerate().partition(|(at, _)| at % 10 == 7);
    let gone: Vec<TaskId> = gone.into_iter().map(|(_, id)| *id).collect();
    for some in gone.chunks(RECLAIM_STEP) {
        assert_eq!(store.delete(&q(), some).await.unwrap(), vec![Deleted::Gone; some.len()]);
        let counts = count(&store).await;
        assert_eq!(counts.ready + counts.deleted, 1_000);
    }
    let kept: Vec<TaskId> = kept.into_iter().map(|(_, id)| *id).collect();
    assert_eq!(listed(&store, State::Ready, 7).await.iter().map(|seen| seen.id).collect::<Vec<_>>(), kept);
    let mut popped = Vec::new();
    while let Some(task) = store.pop(&q(), pop(1)).await.unwrap().tasks.pop() {
        popped.push(task.id);
    }
    assert_eq!(popped, kept);
}

/// A place is where a page of this very queue and state ended.
#[tokio::test]
async fn places_of_other_lists_are_refused() {
    let place = Place::new();
    let store = place.open();
    let other = QueueName::parse("other").unwrap();
    for queue in [&q(), &other] {
        store.insert(queue, insert(3)).await.unwrap();
    }
    let next = store.list(&q(), State::Ready, None, 1).await.unwrap().unwrap().next.unwrap();
    for (queue, state, after) in [
        (&other, State::Ready, next.clone()),
        (&q(), State::Dead, next.clone()),
        (&q(), State::Ready, next[1..].to_vec()),
    ] {
        let refused = store.list(queue, state, Some(&after), 1).await;
        assert!(matches!(refused, Err(StoreError::PlaceUnknown)), "{refused:?}");
    }
    drop(store);
    let page = place.open().list(&q(), State::Ready, Some(&next), 5).await.unwrap().unwrap();
    assert_eq!((page.tasks.len(), page.next), (2, None));
}
