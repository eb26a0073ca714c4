//! A task's whole life over the wire: when it can be popped and until when, what comes first, what failed, what must not be
//! there twice, and what operators do with it.

mod admin;
mod cancel;
mod failures;
mod schedule;
mod unique;

use std::time::Duration;

use data_queue_proto::v1::{
    DeadLetterCause, GetTaskRequest, InsertRequest, InsertResult, ListTasksRequest, NewTask, PutbackRequest,
    PutbackResponse, PutbackTokens, QueueSettings, TaskInfo, TaskState, UpdateQueueRequest, putback_request::Selection,
};
use prost_types::{Duration as ProtoDuration, FieldMask};

use crate::support::{
    call::{insert_request, json, proto},
    server::Client,
};

fn span(span: Duration) -> Option<ProtoDuration> {
    Some(proto(span))
}

/// Numbers as tasks, each like this one.
fn like(numbers: std::ops::Range<usize>, task: &NewTask) -> Vec<NewTask> {
    numbers.map(|number| NewTask { value: json(&number.to_string()).value, ..task.clone() }).collect()
}

async fn insert(client: &mut Client, queue: &str, tasks: Vec<NewTask>) -> Vec<InsertResult> {
    client.insert(insert_request(queue, tasks)).await.expect("an insert").into_inner().results
}

async fn set(client: &mut Client, queue: &str, paths: &[&str], settings: QueueSettings) -> QueueSettings {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    let request = UpdateQueueRequest {
        queue: queue.to_owned(),
        settings: Some(settings),
        update_mask: Some(FieldMask { paths }),
    };
    client.admin.update_queue(request).await.expect("an update").into_inner().settings.expect("settings")
}

async fn put_back(client: &mut Client, queue: &str, tokens: PutbackTokens) -> PutbackResponse {
    let selection = Some(Selection::Tokens(tokens));
    client.putback(PutbackRequest { queue: queue.to_owned(), selection }).await.expect("a putback").into_inner()
}

/// Says that it failed, and that it can be popped again at once.
async fn fail(client: &mut Client, queue: &str, token: &str, reason: &str) -> PutbackResponse {
    let (lease_tokens, reason) = (vec![token.to_owned()], reason.to_owned());
    let delay = span(Duration::ZERO);
    put_back(client, queue, PutbackTokens { lease_tokens, delay, reason, failed: true, dead_letter: false }).await
}

async fn task_info(client: &mut Client, queue: &str, id: &str) -> TaskInfo {
    let request = GetTaskRequest { queue: queue.to_owned(), id: id.to_owned() };
    client.admin.get_task(request).await.expect("the task").into_inner().task.expect("a task")
}

/// All tasks in a state, page by page.
async fn in_state(client: &mut Client, queue: &str, state: TaskState, page_size: i32) -> Vec<TaskInfo> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListTasksRequest { queue: queue.to_owned(), state: state as i32, page_size, page_token };
        let page = client.admin.list_tasks(request).await.expect("a page").into_inner();
        all.extend(page.tasks);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

fn ids(tasks: &[TaskInfo]) -> Vec<String> {
    tasks.iter().map(|info| info.task.as_ref().expect("a task").id.clone()).collect()
}

fn remembered(request: InsertRequest, request_id: &str) -> InsertRequest {
    InsertRequest { request_id: request_id.to_owned(), ..request }
}

fn cause(info: &TaskInfo) -> DeadLetterCause {
    DeadLetterCause::try_from(info.cause).expect("a cause of the contract")
}
