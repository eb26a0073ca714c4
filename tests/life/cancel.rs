//! Tasks that are deleted, and their holders.

use std::time::Duration;

use data_queue_proto::v1::{
    ConsumeOpen, ConsumeQueue, ConsumeRequest, DeleteOutcome, DeleteTasksRequest, Outcome, TaskState,
    consume_request::Request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{insert, like, span, task_info};
use crate::support::{
    call::{ack, counts, heartbeat_request, json, outcomes, pop, pop_for, putback_answer},
    on_every_store,
    server::Client,
    unique_queue,
};

const HOUR: Duration = Duration::from_secs(3_600);

async fn delete(client: &mut Client, queue: &str, ids: &[&str]) -> Vec<DeleteOutcome> {
    let ids = ids.iter().map(|id| (*id).to_owned()).collect();
    let answer = client.admin.delete_tasks(DeleteTasksRequest { queue: queue.to_owned(), ids }).await;
    answer.unwrap().into_inner().outcomes().collect()
}

on_every_store! {
    /// What waits is gone at once; what is held stays with its holder, who is told with each heartbeat and may still ack it; when it
    /// is put back it is gone.
    async fn a_held_task_is_cancelled(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("cancel");
        insert(&mut client, &queue, like(0..4, &json(""))).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(pop_for(&mut client, &queue, HOUR).await);
        }
        let ready = insert(&mut client, &queue, vec![json("5")]).await.remove(0).id;
        let ids: Vec<&str> = held.iter().map(|task| task.id.as_str()).collect();
        let nobody = "00000000-0000-4000-8000-000000000000";
        let done = delete(&mut client, &queue, &[ids[0], nobody, &ready, ids[1]]).await;
        let (gone, cancelled, unknown) = (DeleteOutcome::Deleted, DeleteOutcome::Cancelled, DeleteOutcome::NotFound);
        assert_eq!(done, [cancelled, unknown, gone, cancelled]);
        assert_eq!(delete(&mut client, &queue, &[ids[0], &ready]).await, [cancelled, unknown], "a second time");
        let info = task_info(&mut client, &queue, ids[0]).await;
        assert_eq!((info.state(), info.cancelled), (TaskState::Leased, true));

        let tokens: Vec<String> = held.iter().map(|task| task.lease_token.clone()).collect();
        for _ in 0..2 {
            let answer = client.heartbeat(heartbeat_request(&queue, &tokens)).await.unwrap().into_inner();
            assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied; 3]);
            assert_eq!(answer.cancel_lease_tokens, tokens[..2]);
        }
        assert_eq!(ack(&mut client, &queue, &tokens[0]).await, Outcome::Applied);
        let answer = putback_answer(&mut client, &queue, &tokens[1..]).await;
        assert_eq!((outcomes(&answer.outcomes), answer.put_back), (vec![Outcome::Applied; 2], 1));
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.ready, counted.leased, counted.acked, counted.deleted), (2, 0, 1, 2));
        assert_eq!(pop(&mut client, &queue).await.unwrap().id, ids[2]);
    }

    /// A Consume stream says so by itself.
    async fn a_stream_tells_of_cancelled_tasks(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("stream");
        insert(&mut client, &queue, like(0..2, &json(""))).await;
        let (requests, receiver) = mpsc::channel(4);
        let open = ConsumeOpen {
            queues: vec![ConsumeQueue { name: queue.clone(), weight: 0 }],
            max_outstanding: 2,
            lease: span(Duration::from_millis(600)),
            ..ConsumeOpen::default()
        };
        requests.send(ConsumeRequest { request: Some(Request::Open(open)) }).await.unwrap();
        let mut answers = client.consume(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let mut tasks = Vec::new();
        while tasks.len() < 2 {
            tasks.extend(answers.message().await.unwrap().unwrap().tasks);
        }
        assert_eq!(delete(&mut client, &queue, &[&tasks[1].id]).await, [DeleteOutcome::Cancelled]);
        let cancel = loop {
            let message = answers.message().await.unwrap().unwrap();
            if !message.cancel.is_empty() {
                break message.cancel;
            }
        };
        assert_eq!((cancel[0].queue.as_str(), &cancel[0].lease_tokens), (&*queue, &vec![tasks[1].lease_token.clone()]));
        let dropped = putback_answer(&mut client, &queue, &[tasks[1].lease_token.clone()]).await;
        assert_eq!((dropped.put_back, counts(&mut client, &queue).await.deleted), (0, 1));
        drop(requests);
        while answers.message().await.unwrap().is_some() {}
    }

    /// A deleted queue is gone with all that it had; one of the same name begins anew.
    async fn a_queue_is_deleted(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("gone");
        insert(&mut client, &queue, like(0..3, &json(""))).await;
        let held = pop_for(&mut client, &queue, HOUR).await;
        let request = |force| data_queue_proto::v1::DeleteQueueRequest { queue: queue.clone(), force };
        let refused = client.admin.delete_queue(request(false)).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        client.admin.delete_queue(request(true)).await.unwrap();
        assert_eq!(client.admin.delete_queue(request(true)).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(ack(&mut client, &queue, &held.lease_token).await, Outcome::LeaseLost);
        assert_eq!(pop(&mut client, &queue).await, None);
        insert(&mut client, &queue, vec![json("4")]).await;
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.inserted, counted.ready, counted.acked), (1, 1, 0));
    }
}
