//! Administration: counts that add up, lists of queues, facts about the server, and tasks that are given up.

mod calls;
mod counts;
mod dead;
mod facts;
mod lists;

use std::time::Duration;

use data_queue_proto::v1::{ListQueuesRequest, PutbackResponse, Queue};

use crate::support::{
    call::{held_for_request, proto},
    server::Client,
};

const SERVICE: &str = "dataqueue.v1.QueueAdmin";
const HOUR: Duration = Duration::from_secs(3_600);

/// Takes back everything that is held.
async fn take_back(client: &mut Client, queue: &str) -> (u64, u64) {
    let answer = client.putback(held_for_request(queue, proto(Duration::ZERO))).await.expect("a putback").into_inner();
    let PutbackResponse { outcomes, put_back, dead_lettered } = answer;
    assert!(outcomes.is_empty(), "{outcomes:?}");
    (put_back, dead_lettered)
}

async fn page(client: &mut Client, page_size: i32, page_token: &str) -> (Vec<Queue>, String) {
    let request = ListQueuesRequest { page_size, page_token: page_token.to_owned() };
    let answer = client.admin.list_queues(request).await.expect("a page").into_inner();
    (answer.queues, answer.next_page_token)
}

/// The lengths of all pages, and what was on them.
async fn pages(client: &mut Client, page_size: i32) -> (Vec<usize>, Vec<Queue>) {
    let (mut lengths, mut all, mut token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let (queues, next) = page(client, page_size, &token).await;
        lengths.push(queues.len());
        all.extend(queues);
        if next.is_empty() {
            return (lengths, all);
        }
        assert_ne!(next, token, "the list does not go on");
        token = next;
    }
}

fn names(queues: &[Queue]) -> Vec<&str> {
    queues.iter().map(|queue| queue.name.as_str()).collect()
}
