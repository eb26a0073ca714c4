//! What administration refuses: pages, masks, settings, ids and states that cannot be, and what is not there.

use data_queue_proto::reason;
use data_queue_proto::v1::{
    DeleteQueueRequest, DeleteTasksRequest, GetTaskRequest, ImportTasksRequest, ListQueuesRequest, ListTasksRequest,
    PurgeQueueRequest, QueueSettings, RedriveIds, RedriveTasksRequest, ResumeQueueRequest, RetryBackoff, Task,
    TaskInfo, TaskState, UpdateQueueRequest, WatchQueuesRequest, redrive_tasks_request::Selection, task::Value,
};
use prost_types::{Duration, FieldMask, Timestamp};
use tonic::Code;

use crate::support::{
    call::{Witness, get_queue_request, insert_json},
    on_every_store,
    status::Refusal,
};

on_every_store! {
    /// Row 45: a page of a negative size.
    async fn row_45_page_size_negative(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for page_size in [-1, -100, i32::MIN] {
            let request = ListQueuesRequest { page_size, ..ListQueuesRequest::default() };
            let answer = client.admin.list_queues(request).await;
            Refusal::invalid(reason::PAGE_SIZE_OUT_OF_RANGE, "page_size").check(&page_size.to_string(), answer);
            witness.unchanged(&mut client, "a page of a negative size").await;
        }
    }

    /// Row 45: a page behind a token that no list gave: no base64url, padded, of what is no queue's name, a queue's name itself.
    async fn row_45_page_token_garbage(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let long = "YWFh".repeat(50);
        let garbage = ["!", "a", " ", "bWFpbA==", "bWFp bA", "bWFp\0", "/w", "_w", "e3h9", "LmE", "mail.box", "0", "é", &long];
        for page_token in garbage.map(str::to_owned) {
            let request = ListQueuesRequest { page_token: page_token.clone(), ..ListQueuesRequest::default() };
            let answer = client.admin.list_queues(request).await;
            Refusal::invalid(reason::PAGE_TOKEN_INVALID, "page_token").check(&page_token, answer);
            witness.unchanged(&mut client, &page_token).await;
        }
    }
}

/// A task's id of the right form that nobody has.
const NOBODY: &str = "00000000-0000-4000-8000-000000000000";

on_every_store! {
    /// Row 45: pages of tasks of a negative size, behind garbage, behind the token of another state's list, and of no state.
    async fn row_45_pages_of_tasks(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        insert_json(&mut client, "tasks", &["1", "2", "3"]).await;
        let ready = |page_size, page_token: &str| ListTasksRequest {
            queue: "tasks".to_owned(),
            state: TaskState::Ready as i32,
            page_size,
            page_token: page_token.to_owned(),
        };
        let answer = client.admin.list_tasks(ready(-1, "")).await;
        Refusal::invalid(reason::PAGE_SIZE_OUT_OF_RANGE, "page_size").check("-1", answer);
        let token = client.admin.list_tasks(ready(1, "")).await.unwrap().into_inner().next_page_token;
        assert_ne!(token, "");
        for garbage in ["!", "a", "bWFpbA==", "cg", &format!("{token}AA"), "dead"] {
            let answer = client.admin.list_tasks(ready(1, garbage)).await;
            Refusal::invalid(reason::PAGE_TOKEN_INVALID, "page_token").check(garbage, answer);
        }
        insert_json(&mut client, "other", &["1", "2"]).await;
        let other = ListTasksRequest { queue: "other".to_owned(), ..ready(1, &token) };
        let answer = client.admin.list_tasks(other).await;
        Refusal::invalid(reason::PAGE_TOKEN_INVALID, "page_token").check("of another queue", answer);
        let other = ListTasksRequest { state: TaskState::Dead as i32, ..ready(1, &token) };
        let answer = client.admin.list_tasks(other).await;
        Refusal::invalid(reason::PAGE_TOKEN_INVALID, "page_token").check("of another state", answer);
        for state in [0, 5, -1] {
            let answer = client.admin.list_tasks(ListTasksRequest { state, ..ready(1, "") }).await;
            Refusal::invalid(reason::TASK_STATE_INVALID, "state").check(&state.to_string(), answer);
        }
        let unknown = ListTasksRequest { queue: "nobody".to_owned(), ..ready(1, "") };
        Refusal::not_found(reason::QUEUE_NOT_FOUND).check("unknown", client.admin.list_tasks(unknown).await);
        witness.unchanged(&mut client, "pages of tasks").await;
    }

    /// Row 45: masks that name no setting, and settings out of range: nothing is changed, and no queue is made.
    async fn row_45_settings(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let update = |paths: &[&str], settings| UpdateQueueRequest {
            queue: "set".to_owned(),
            settings: Some(settings),
            update_mask: Some(FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() }),
        };
        let good = || QueueSettings { lease: span(10), ..QueueSettings::default() };
        for paths in [&[][..], &["lease", "leas"], &["retry_backoff.mid"], &[""], &["Lease"], &["settings.lease"]] {
            let answer = client.admin.update_queue(update(paths, good())).await;
            Refusal::invalid(reason::UPDATE_MASK_INVALID, "update_mask").check(&format!("{paths:?}"), answer);
        }
        let many = vec!["lease"; 101];
        let answer = client.admin.update_queue(update(&many, good())).await;
        Refusal::invalid(reason::UPDATE_MASK_INVALID, "update_mask").check("101 names", answer);
        let long = "x".repeat(100_000);
        let answer = client.admin.update_queue(update(&[&long], good())).await;
        Refusal::invalid(reason::UPDATE_MASK_INVALID, "update_mask").check("a long name", answer);
        let none = UpdateQueueRequest { update_mask: None, ..update(&[], good()) };
        Refusal::invalid(reason::UPDATE_MASK_INVALID, "update_mask").check("none", client.admin.update_queue(none).await);
        let backoff = |min, max| Some(RetryBackoff { min, max });
        let bad = [
            ("lease", QueueSettings { lease: Some(Duration { seconds: 0, nanos: 99_999_999 }), ..good() }),
            ("lease", QueueSettings { lease: span(12 * 3_600 + 1), ..good() }),
            ("lease", QueueSettings { lease: span(-1), ..good() }),
            ("max_failures", QueueSettings { max_failures: Some(0), ..good() }),
            ("max_failures", QueueSettings { max_failures: Some(1_000_001), ..good() }),
            ("max_expiries", QueueSettings { max_expiries: Some(0), ..good() }),
            ("retry_backoff.min", QueueSettings { retry_backoff: backoff(span(-1), None), ..good() }),
            ("retry_backoff.max", QueueSettings { retry_backoff: backoff(None, span(366 * 86_400 + 1)), ..good() }),
            ("max_tasks", QueueSettings { max_tasks: Some(u64::MAX), ..good() }),
            ("max_bytes", QueueSettings { max_bytes: Some((1 << 53) + 1), ..good() }),
            ("dead_letter_retention", QueueSettings { dead_letter_retention: span(0), ..good() }),
            ("dead_letter_retention", QueueSettings { dead_letter_retention: span(i64::MAX), ..good() }),
            ("shards", QueueSettings { shards: Some(0), ..good() }),
            ("shards", QueueSettings { shards: Some(3), ..good() }),
            ("shards", QueueSettings { shards: Some(128), ..good() }),
        ];
        for (field, settings) in bad {
            // Beside a good one, which is not applied either.
            let answer = client.admin.update_queue(update(&["paused", "*"], settings)).await;
            Refusal::invalid(reason::SETTING_OUT_OF_RANGE, field).check(field, answer);
        }
        let answer = client.admin.get_queue(get_queue_request("set")).await;
        Refusal::not_found(reason::QUEUE_NOT_FOUND).check("partly applied", answer);
        witness.unchanged(&mut client, "settings").await;
    }

    /// Row 45: ids that are none, too many of them, and things that are not there.
    async fn row_45_ids_and_absent_things(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let upper = "0000000A-0000-4000-8000-000000000000";
        for id in ["", "x", &NOBODY[1..], &NOBODY.replace('-', ""), upper, &format!("{NOBODY}0")] {
            let get = GetTaskRequest { queue: queue.clone(), id: id.to_owned() };
            Refusal::invalid(reason::TASK_ID_INVALID, "id").check(id, client.admin.get_task(get).await);
            let ids = vec![NOBODY.to_owned(), id.to_owned()];
            let delete = DeleteTasksRequest { queue: queue.clone(), ids: ids.clone() };
            Refusal::invalid(reason::TASK_ID_INVALID, "ids[1]").check(id, client.admin.delete_tasks(delete).await);
            let answer = client.admin.redrive_tasks(redrive(&queue, Some(Selection::Ids(RedriveIds { ids })))).await;
            Refusal::invalid(reason::TASK_ID_INVALID, "ids.ids[1]").check(id, answer);
        }
        for (count, why) in [(0, reason::BATCH_EMPTY), (1_001, reason::BATCH_TOO_LARGE)] {
            let ids = vec![NOBODY.to_owned(); count];
            let delete = DeleteTasksRequest { queue: queue.clone(), ids: ids.clone() };
            Refusal::invalid(why, "ids").check(why, client.admin.delete_tasks(delete).await);
            let answer = client.admin.redrive_tasks(redrive(&queue, Some(Selection::Ids(RedriveIds { ids })))).await;
            Refusal::invalid(why, "ids.ids").check(why, answer);
        }
        let answer = client.admin.redrive_tasks(redrive(&queue, None)).await;
        Refusal::invalid(reason::REDRIVE_SELECTION_MISSING, "selection").check("no selection", answer);
        let purge = |queue: &str, states: Vec<i32>| PurgeQueueRequest { queue: queue.to_owned(), states };
        for states in [vec![], vec![0], vec![TaskState::Ready as i32, 9]] {
            let answer = client.admin.purge_queue(purge(&queue, states)).await;
            Refusal::invalid(reason::TASK_STATE_INVALID, "states").check("no state", answer);
        }

        let get = GetTaskRequest { queue: queue.clone(), id: NOBODY.to_owned() };
        Refusal::not_found(reason::TASK_NOT_FOUND).check("no task", client.admin.get_task(get).await);
        let unknown = Refusal::not_found(reason::QUEUE_NOT_FOUND);
        unknown.check("purge", client.admin.purge_queue(purge("nobody", vec![TaskState::Dead as i32])).await);
        unknown.check("redrive", client.admin.redrive_tasks(redrive("nobody", Some(Selection::MaxTasks(0)))).await);
        let nobody = || "nobody".to_owned();
        unknown.check("resume", client.admin.resume_queue(ResumeQueueRequest { queue: nobody() }).await);
        let delete = DeleteQueueRequest { queue: nobody(), force: true };
        unknown.check("delete", client.admin.delete_queue(delete).await);
        let delete = DeleteQueueRequest { queue: queue.clone(), force: false };
        let refusal = Refusal::of(Code::FailedPrecondition, reason::QUEUE_NOT_EMPTY);
        refusal.check("not empty", client.admin.delete_queue(delete).await);
        witness.unchanged(&mut client, "ids").await;
    }

    /// Row 45: tasks that cannot be imported; of a call with one of them, the good ones are not imported either.
    async fn row_45_imports(backend) {
        let server = backend.start(&["--max-value", "1000"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let import = |tasks| ImportTasksRequest { queue: queue.clone(), tasks };
        for (tasks, why) in [(vec![], reason::BATCH_EMPTY), (vec![shown(); 1_001], reason::BATCH_TOO_LARGE)] {
            Refusal::invalid(why, "tasks").check(why, client.admin.import_tasks(import(tasks)).await);
        }
        for (why, field, bad) in bad_imports() {
            let answer = client.admin.import_tasks(import(vec![shown(), bad])).await;
            Refusal::invalid(why, field).check(field, answer);
        }
        let elsewhere = ImportTasksRequest { queue: "a b".to_owned(), tasks: vec![shown()] };
        let refusal = Refusal::invalid(reason::QUEUE_NAME_INVALID, "queue");
        refusal.check("a b", client.admin.import_tasks(elsewhere).await);
        witness.unchanged(&mut client, "imports").await;

        // The same id, and another task.
        let other = ImportTasksRequest { queue: "other".to_owned(), tasks: vec![shown()] };
        client.admin.import_tasks(other.clone()).await.unwrap();
        let task = Task { value: Some(Value::Json("2".to_owned())), md5: String::new(), ..shown().task.unwrap() };
        let reused = ImportTasksRequest { tasks: vec![TaskInfo { task: Some(task), ..shown() }], ..other };
        let refusal = Refusal { field: Some("tasks[0].task.id"), ..Refusal::of(Code::AlreadyExists, reason::REQUEST_ID_REUSED) };
        refusal.check("another task", client.admin.import_tasks(reused).await);
    }

    /// Row 45: too many queues to watch, and intervals out of range.
    async fn row_45_watching(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let many = WatchQueuesRequest { queues: vec!["q".to_owned(); 101], interval: None };
        Refusal::invalid(reason::BATCH_TOO_LARGE, "queues").check("101", client.admin.watch_queues(many).await);
        let bad = WatchQueuesRequest { queues: vec!["a b".to_owned()], interval: None };
        Refusal::invalid(reason::QUEUE_NAME_INVALID, "queues[0]").check("a b", client.admin.watch_queues(bad).await);
        for interval in [span(0), span(-1), span(61), Some(Duration { seconds: 0, nanos: 99_999_999 })] {
            let answer = client.admin.watch_queues(WatchQueuesRequest { queues: vec![], interval }).await;
            Refusal::invalid(reason::INTERVAL_OUT_OF_RANGE, "interval").check(&format!("{interval:?}"), answer);
        }
    }
}

fn span(seconds: i64) -> Option<Duration> {
    Some(Duration { seconds, nanos: 0 })
}

/// As a queue may show it.
fn shown() -> TaskInfo {
    let value = Some(Value::Json("1".to_owned()));
    let md5 = "c4ca4238a0b923820dcc509a6f75849b".to_owned();
    let task = Task { id: NOBODY.to_owned(), value, md5, ..Task::default() };
    TaskInfo { task: Some(task), state: TaskState::Ready as i32, ..TaskInfo::default() }
}

/// With the reason and the field for which each is refused.
fn bad_imports() -> Vec<(&'static str, &'static str, TaskInfo)> {
    let info = |change: fn(&mut TaskInfo)| {
        let mut info = shown();
        change(&mut info);
        info
    };
    let task = |change: fn(&mut Task)| {
        let mut task = shown().task.unwrap();
        change(&mut task);
        TaskInfo { task: Some(task), ..shown() }
    };
    let time = |seconds, nanos| Some(Timestamp { seconds, nanos });
    let scheduled = |due_at| TaskInfo { due_at, state: TaskState::Scheduled as i32, ..shown() };
    let far = time(1 << 40, 0);
    vec![
        (reason::VALUE_MISSING, "tasks[1].task.value", info(|info| info.task = None)),
        (reason::VALUE_MISSING, "tasks[1].task.value", task(|task| task.value = None)),
        (reason::TASK_ID_INVALID, "tasks[1].task.id", task(|task| task.id.clear())),
        (reason::TASK_ID_INVALID, "tasks[1].task.id", task(|task| task.id.push('0'))),
        (reason::JSON_INVALID, "tasks[1].task.json", task(|task| task.value = Some(Value::Json("{".to_owned())))),
        (
            reason::VALUE_TOO_LARGE,
            "tasks[1].task.data",
            task(|task| task.value = Some(Value::Data(vec![0; 1_001].into()))),
        ),
        (reason::MD5_MISMATCH, "tasks[1].task.md5", task(|task| task.value = Some(Value::Json("2".to_owned())))),
        (reason::MD5_MISMATCH, "tasks[1].task.md5", task(|task| task.md5.make_ascii_uppercase())),
        (
            reason::HEADERS_INVALID,
            "tasks[1].task.headers",
            task(|task| drop(task.headers.insert(String::new(), String::new()))),
        ),
        (reason::PRIORITY_OUT_OF_RANGE, "tasks[1].task.priority", task(|task| task.priority = 10)),
        (reason::UNIQUE_KEY_INVALID, "tasks[1].unique_key", info(|info| info.unique_key = "k".repeat(129))),
        (reason::REASON_TOO_LONG, "tasks[1].last_error", info(|info| info.last_error = "e".repeat(1_025))),
        (reason::TASK_STATE_INVALID, "tasks[1].state", info(|info| info.state = 0)),
        (reason::TASK_STATE_INVALID, "tasks[1].state", info(|info| info.state = 9)),
        (reason::TASK_STATE_INVALID, "tasks[1].state", info(|info| info.state = TaskState::Leased as i32)),
        (reason::DELAY_OUT_OF_RANGE, "tasks[1].due_at", scheduled(far)),
        (reason::DELAY_OUT_OF_RANGE, "tasks[1].due_at", scheduled(time(0, -1))),
        (reason::TTL_OUT_OF_RANGE, "tasks[1].expires_at", TaskInfo { expires_at: far, ..shown() }),
        (reason::TTL_OUT_OF_RANGE, "tasks[1].expires_at", TaskInfo { expires_at: time(0, 1_000_000_000), ..shown() }),
        (
            reason::TIME_INVALID,
            "tasks[1].task.inserted_at",
            task(|task| task.inserted_at = Some(Timestamp { seconds: -1, nanos: 0 })),
        ),
        (
            reason::TIME_INVALID,
            "tasks[1].died_at",
            TaskInfo { died_at: time(1, i32::MIN), state: TaskState::Dead as i32, ..shown() },
        ),
    ]
}

fn redrive(queue: &str, selection: Option<Selection>) -> RedriveTasksRequest {
    RedriveTasksRequest { queue: queue.to_owned(), selection }
}
