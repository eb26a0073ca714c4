//! What is wrong in books is found, and nothing else.

use std::time::Duration;

use data_queue_proto::v1::{DeleteOutcome, QueueCounts, Task, TaskInfo, TaskState};

use super::books::{Books, Ended, Given, Inserted, Span, Way};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Answered the first time, a millisecond later.
fn at(sent: u64) -> Span {
    Span { sent: ms(sent), answered: ms(sent + 1), at_once: true }
}

fn given(deliveries: u32, failures: u32, time: u64) -> Given {
    Given {
        id: "a".to_owned(),
        deliveries,
        failures,
        inserted_at: ms(0),
        at: ms(time),
        span: at(time),
        ..Given::default()
    }
}

fn ended(deliveries: u32, way: Way, time: u64, not_before: u64) -> Ended {
    let (id, not_before) = ("a".to_owned(), ms(not_before));
    Ended { id, deliveries, way, not_before, applied: true, span: at(time) }
}

fn inserted(id: &str, sent: u64) -> Inserted {
    Inserted { id: id.to_owned(), unique_key: "key".to_owned(), span: at(sent), ..Inserted::default() }
}

/// A task that is due after 10 ms and ends after a second fails, comes again and is acked; one of the same key is left.
fn books() -> Books {
    let task = Task { id: "b".to_owned(), ..Task::default() };
    let state = TaskState::Scheduled as i32;
    Books {
        lease: ms(1_000),
        max_failures: 3,
        max_expiries: 3,
        inserts: vec![
            Inserted { delay: ms(10), ttl: Some(ms(1_000)), ..inserted("a", 0) },
            Inserted { duplicate: true, ..inserted("a", 20) },
            inserted("b", 300),
        ],
        given: vec![given(1, 0, 10), given(2, 1, 100)],
        ended: vec![ended(1, Way::Fail, 30, 90), ended(2, Way::Ack, 120, 0)],
        left: vec![TaskInfo { task: Some(task), state, unique_key: "key".to_owned(), ..TaskInfo::default() }],
        counts: QueueCounts { inserted: 2, acked: 1, scheduled: 1, ..QueueCounts::default() },
        ..Books::default()
    }
}

#[track_caller]
fn finds(rule: &str, change: impl FnOnce(&mut Books)) {
    let mut books = books();
    change(&mut books);
    let faults = books.faults();
    assert!(faults.iter().any(|(found, _)| *found == rule), "{rule}: {faults:?}");
}

#[test]
fn good_books_have_no_faults() {
    assert_eq!(books().faults(), [].into());
}

#[test]
fn every_fault_is_found() {
    finds("delivered before it was due", |books| books.given[0].at = ms(9));
    finds("delivered before it was to come again", |books| books.given[1].at = ms(89));
    finds("delivered after its time was over", |books| books.given[1].at = ms(1_000));
    finds("delivered after it was over", |books| books.given.push(given(3, 1, 200)));
    finds("delivered while the queue was paused", |books| books.pauses.push((ms(99), ms(102))));
    finds("delivered though it was dead", |books| books.ended[0].way = Way::Reject);
    finds("more was counted than happened", |books| books.given[0].failures = 1);
    finds("more was counted than happened", |books| books.given[1].expiries = 1);
    finds("a failure was not counted", |books| books.given[1].failures = 0);
    finds("two deliveries of one number", |books| books.given.push(given(2, 1, 110)));
    finds("deliveries out of order", |books| books.given.push(given(3, 1, 50)));
    finds("acked, and there again", |books| books.left[0].task.as_mut().unwrap().id = "a".to_owned());
    finds("in two states at once", |books| books.left.push(books.left[0].clone()));
    finds("deleted, and there again", |books| books.deletes.push(("b".to_owned(), DeleteOutcome::Deleted, at(400))));
    finds("dead for no reason", |books| books.left[0].cause = 2);
    finds("lost", |books| books.left.clear());
    finds("there, and never inserted", |books| books.given[0].id = "c".to_owned());
    finds("a key of two tasks at once", |books| books.inserts[2].span = at(50));
    finds("a key of two tasks that are left", |books| books.left.push(books.left[0].clone()));
    finds("a duplicate of what was over", |books| books.inserts[1].span = at(130));
    finds("a duplicate of another key", |books| books.inserts[1].unique_key = "other".to_owned());
    for (name, change) in [
        ("inserted", (|counts| counts.inserted = 3) as fn(&mut QueueCounts)),
        ("acked", |counts| counts.acked = 2),
        ("ready", |counts| counts.ready = 1),
        ("scheduled", |counts| counts.scheduled = 0),
        ("leased", |counts| counts.leased = 1),
        ("dead", |counts| counts.dead = 1),
        ("gone", |counts| counts.expired = 1),
        ("deleted", |counts| counts.deleted = 1),
        ("expired", |counts| counts.expired = 1),
        ("purged", |counts| counts.purged = 1),
    ] {
        finds(name, |books| change(&mut books.counts));
    }
}
