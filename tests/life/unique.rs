//! Tasks that must not be there twice.

use data_queue_proto::v1::{
    DeleteTasksRequest, NewTask, ProduceInsert, ProduceOpen, ProduceRequest, PurgeQueueRequest, PutbackTokens,
    TaskState, produce_request::Request,
};
use tokio_stream::iter;

use super::{insert, put_back, remembered, span, task_info};
use crate::support::{
    call::{ack, counts, insert_request, json, pop},
    on_every_store, unique_queue,
};

fn keyed(text: &str, key: &str) -> NewTask {
    NewTask { unique_key: key.to_owned(), ..json(text) }
}

on_every_store! {
    /// While a task with the key is ready, scheduled or held, another one is answered with its id and is not there; when that one is
    /// gone or dead, the key is free.
    async fn a_key_is_held_by_one_task(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("unique");
        let scheduled = NewTask { delay: span(std::time::Duration::from_secs(3_600)), ..keyed("1", "k") };
        let first = insert(&mut client, &queue, vec![scheduled]).await.remove(0);
        assert!(!first.duplicate);
        let results = insert(&mut client, &queue, vec![json("2"), keyed("3", "k"), keyed("4", "l"), keyed("5", "l")]).await;
        assert_eq!(results.iter().map(|result| result.duplicate).collect::<Vec<_>>(), [false, true, false, true]);
        assert_eq!((&results[1].id, &results[3].id), (&first.id, &results[2].id));
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.inserted, counted.ready, counted.scheduled), (3, 2, 1));
        assert_eq!(task_info(&mut client, &queue, &first.id).await.unique_key, "k");

        let ids = vec![first.id.clone()];
        client.admin.delete_tasks(DeleteTasksRequest { queue: queue.clone(), ids }).await.unwrap();
        let again = insert(&mut client, &queue, vec![keyed("6", "k")]).await.remove(0);
        assert!(!again.duplicate);
        // Held, then acked; then rejected; then purged.
        let task = pop(&mut client, &queue).await.unwrap();
        ack(&mut client, &queue, &task.lease_token).await;
        let held = pop(&mut client, &queue).await.unwrap();
        assert_eq!(held.id, results[2].id);
        assert!(insert(&mut client, &queue, vec![keyed("7", "l")]).await[0].duplicate);
        ack(&mut client, &queue, &held.lease_token).await;
        assert!(!insert(&mut client, &queue, vec![keyed("8", "l")]).await[0].duplicate);
        let held = pop(&mut client, &queue).await.unwrap();
        assert_eq!(held.id, again.id);
        let lease_tokens = vec![held.lease_token];
        put_back(&mut client, &queue, PutbackTokens { lease_tokens, dead_letter: true, ..PutbackTokens::default() }).await;
        assert!(!insert(&mut client, &queue, vec![keyed("9", "k")]).await[0].duplicate);
        let states = vec![TaskState::Ready as i32];
        let purge = PurgeQueueRequest { queue: queue.clone(), states };
        assert_eq!(client.admin.purge_queue(purge).await.unwrap().into_inner().purged, 2);
        assert!(!insert(&mut client, &queue, vec![keyed("10", "k")]).await[0].duplicate);
        counts(&mut client, &queue).await;
    }

    /// A repeated insert answers as the first one did, duplicates too, be it an Insert or one of a producer.
    async fn duplicates_are_remembered(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("remembered");
        let first = insert(&mut client, &queue, vec![keyed("1", "k")]).await.remove(0);
        let request = || remembered(insert_request(&queue, vec![keyed("2", "k"), json("3")]), "r");
        let answer = client.insert(request()).await.unwrap().into_inner();
        assert_eq!((answer.results[0].duplicate, &answer.results[0].id), (true, &first.id));
        let task = pop(&mut client, &queue).await.unwrap();
        ack(&mut client, &queue, &task.lease_token).await;
        let again = client.insert(request()).await.unwrap().into_inner();
        assert!(again.replayed);
        assert_eq!(again.results, answer.results);

        insert(&mut client, &queue, vec![keyed("4", "k")]).await;
        let produce = || {
            let open = ProduceOpen { queue: queue.clone(), producer_id: "p".to_owned(), ..ProduceOpen::default() };
            let tasks = vec![json("5"), keyed("6", "k")];
            let requests = [Request::Open(open), Request::Insert(ProduceInsert { number: 1, tasks })];
            iter(requests.map(|request| ProduceRequest { request: Some(request) }))
        };
        let mut answers = Vec::new();
        for replayed in [false, true] {
            let mut stream = client.produce(produce()).await.unwrap().into_inner();
            let answer = stream.message().await.unwrap().unwrap().answers.remove(0);
            assert_eq!(answer.replayed, replayed);
            assert_eq!(answer.results.iter().map(|result| result.duplicate).collect::<Vec<_>>(), [false, true]);
            answers.push(answer.results);
        }
        assert_eq!(answers[0], answers[1]);
        assert_eq!(counts(&mut client, &queue).await.inserted, 4);
    }
}
