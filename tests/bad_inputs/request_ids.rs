//! Request ids.

use std::collections::BTreeMap;
use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::{InsertRequest, NewTask, PopBatchRequest, PopRequest};
use tonic::Code;

use crate::support::{
    call::{
        Call, Witness, ack, ack_request, data, five, insert_json, insert_request, json, pop, pop_batch,
        pop_batch_request, pop_request, proto,
    },
    on_every_store,
    status::Refusal,
    unique_queue,
};

fn insert(queue: &str, request_id: &str, tasks: Vec<NewTask>) -> InsertRequest {
    InsertRequest { request_id: request_id.to_owned(), ..insert_request(queue, tasks) }
}

fn with_headers(pairs: [(&str, &str); 3]) -> NewTask {
    let headers = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    NewTask { headers: headers.collect::<BTreeMap<_, _>>(), ..json("{}") }
}

/// The two orders of the same headers on the wire: the generated client sorts them.
mod unsorted {
    use prost::Message;

    /// `InsertRequest` with its headers as a list, which is what a map is on the wire.
    #[derive(Clone, PartialEq, Message)]
    pub struct Insert {
        #[prost(string, tag = "1")]
        pub queue: String,
        #[prost(message, repeated, tag = "2")]
        pub tasks: Vec<Task>,
        #[prost(string, tag = "3")]
        pub request_id: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Task {
        #[prost(string, tag = "1")]
        pub json: String,
        #[prost(message, repeated, tag = "3")]
        pub headers: Vec<Header>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Header {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(string, tag = "2")]
        pub value: String,
    }
}

on_every_store! {
    /// A PopBatch made again with its request id gets what is still held under it, with the same tokens, and new tasks only
    /// behind that; with another lease or another number of tasks it is refused.
    async fn batch_made_again(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("again");
        let tasks = (0..450).map(|number| json(&number.to_string())).collect();
        client.insert(insert_request(&queue, tasks)).await.unwrap();
        let batch = || PopBatchRequest {
            max_tasks: 400,
            request_id: "batch".to_owned(),
            lease: Some(proto(Duration::from_secs(3_600))),
            ..pop_batch_request(&queue)
        };
        let first = pop_batch(&mut client, batch()).await.unwrap();
        assert_eq!(first.len(), 400);
        let tokens = first.iter().map(|task| task.lease_token.clone()).collect::<Vec<_>>();
        let (done, held): (Vec<_>, Vec<_>) = tokens.into_iter().enumerate().partition(|(at, _)| at % 4 == 0);
        let only = |some: Vec<(usize, String)>| some.into_iter().map(|(_, token)| token).collect::<Vec<_>>();
        client.ack(ack_request(&queue, &only(done))).await.unwrap();

        let again = pop_batch(&mut client, batch()).await.unwrap();
        let again = again.into_iter().map(|task| (task.lease_token, task.deliveries)).collect::<Vec<_>>();
        let held = only(held);
        assert_eq!(again.iter().map(|(token, _)| token).take(300).collect::<Vec<_>>(), held.iter().collect::<Vec<_>>());
        assert_eq!(again.len(), 350, "what is held, and the 50 that were ready");
        assert!(again.iter().all(|(_, deliveries)| *deliveries == 1));
        assert_eq!(five(&mut client, &queue).await, [0, 350, 0, 450, 100]);
        let third = pop_batch(&mut client, batch()).await.unwrap();
        assert_eq!(third.iter().map(|task| &task.lease_token).collect::<Vec<_>>(), again.iter().map(|(token, _)| token).collect::<Vec<_>>());

        for other in [
            PopBatchRequest { max_tasks: 399, ..batch() },
            PopBatchRequest { lease: Some(proto(Duration::from_secs(3_601))), ..batch() },
        ] {
            let reused = Refusal { code: Code::AlreadyExists, reason: reason::REQUEST_ID_REUSED, field: Some("request_id") };
            reused.check("a batch with other content", pop_batch(&mut client, other).await);
        }
        let waiting = PopBatchRequest { wait: Some(proto(Duration::from_millis(1))), ..batch() };
        assert_eq!(pop_batch(&mut client, waiting).await.unwrap().len(), 350, "the wait is no content");
        let long = PopBatchRequest { request_id: "r".repeat(129), ..batch() };
        Refusal::invalid(reason::REQUEST_ID_INVALID, "request_id").check("129 bytes", pop_batch(&mut client, long).await);
    }

    /// Row 23: a request id over 128 bytes.
    async fn row_23_request_id_too_long(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        for request_id in ["r".repeat(129), "é".repeat(65), "r".repeat(100_000)] {
            let calls = [
                Call::Insert(insert(&queue, &request_id, vec![json("1")])),
                Call::Pop(PopRequest { request_id: request_id.clone(), ..pop_request(&queue) }),
            ];
            for call in calls {
                let answer = call.send(&mut client).await;
                Refusal::invalid(reason::REQUEST_ID_INVALID, "request_id").check("a long request id", answer);
                witness.unchanged(&mut client, "a long request id").await;
            }
        }
        let other = unique_queue("longest");
        client.insert(insert(&other, &"r".repeat(128), vec![json("1")])).await.unwrap();
        client.insert(insert(&other, "any \0 \r\n text, é", vec![json("1")])).await.unwrap();
    }

    /// Row 24, G3: a repeated Insert gets the first answer again; another one under its id is refused.
    async fn row_24_insert_again(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("insert");
        let task = with_headers([("a", "1"), ("b", "2"), ("c", "3")]);
        let request = insert(&queue, "again", vec![task.clone(), json("2")]);
        let first = client.insert(request.clone()).await.unwrap().into_inner();
        assert!(!first.replayed);

        let again = client.insert(request.clone()).await.unwrap().into_inner();
        assert_eq!((again.replayed, &again.results), (true, &first.results));

        let refusal = Refusal::of(Code::AlreadyExists, reason::REQUEST_ID_REUSED);
        let mut other_header = task.clone();
        other_header.headers.insert("a".to_owned(), "one".to_owned());
        for other in [
            vec![task.clone(), json("2 ")],
            vec![json("2"), task.clone()],
            vec![task.clone()],
            vec![task.clone(), json("2"), json("2")],
            vec![other_header, json("2")],
            vec![NewTask { headers: BTreeMap::new(), ..task.clone() }, json("2")],
            vec![task.clone(), data("2")],
        ] {
            let case = format!("{other:?}");
            refusal.check(&case, client.insert(insert(&queue, "again", other)).await);
        }

        // Exactly what the first call inserted is there, and a retry after it is gone brings nothing back.
        for result in &first.results {
            let task = pop(&mut client, &queue).await.expect("a task of the first call");
            assert_eq!((&task.id, task.deliveries), (&result.id, 1));
            ack(&mut client, &queue, &task.lease_token).await;
        }
        assert_eq!(pop(&mut client, &queue).await, None, "a retry inserted something");
        let again = client.insert(request).await.unwrap().into_inner();
        assert_eq!((again.replayed, &again.results), (true, &first.results));
        assert_eq!(pop(&mut client, &queue).await, None, "a retry inserted something");
    }

    /// Row 24, G12: a request id belongs to its queue, and to its method.
    async fn row_24_same_id_elsewhere(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queues = [unique_queue("one"), unique_queue("two")];
        for (queue, text) in queues.iter().zip(["1", "2"]) {
            let answer = client.insert(insert(queue, "same", vec![json(text)])).await.unwrap().into_inner();
            assert!(!answer.replayed);
        }
        for (queue, text) in queues.iter().zip(["1", "2"]) {
            let request = PopRequest { request_id: "same".to_owned(), ..pop_request(queue) };
            let task = client.pop(request).await.unwrap().into_inner().task.unwrap();
            assert_eq!(crate::support::call::text(&task), text);
        }
    }

    /// Row 24: the order of headers on the wire does not count.
    async fn row_24_headers_in_another_order(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("order");
        let connection = crate::support::raw::Connection::open(server.address()).await;
        let header = |key: &str| unsorted::Header { key: key.to_owned(), value: format!("value of {key}") };
        for order in [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]] {
            let task = unsorted::Task { json: "{}".to_owned(), headers: order.map(header).to_vec() };
            let request =
                unsorted::Insert { queue: queue.clone(), tasks: vec![task], request_id: "order".to_owned() };
            let status = connection.status("Insert", &[], &request).await;
            assert_eq!(status.code(), Code::Ok, "{order:?}: {status:?}");
        }
        let task = pop(&mut client, &queue).await.expect("the task");
        assert_eq!(task.headers.len(), 3);
        assert_eq!(pop(&mut client, &queue).await, None, "inserted again");
    }

    /// Row 24, G8: a repeated Pop gets the same task, token and deadline, counted once; another one is refused.
    async fn row_24_pop_again(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("pop");
        let ids = insert_json(&mut client, &queue, &["1", "2"]).await;
        let lease = Some(proto(Duration::from_secs(600)));
        let request = PopRequest { lease, request_id: "again".to_owned(), ..pop_request(&queue) };
        let first = client.pop(request.clone()).await.unwrap().into_inner().task.unwrap();
        assert_eq!(first.id, ids[0]);

        let wait = Some(proto(Duration::from_secs(1)));
        for retry in [request.clone(), PopRequest { wait, ..request.clone() }] {
            let again = client.pop(retry).await.unwrap().into_inner().task.unwrap();
            assert_eq!((&again.id, &again.lease_token), (&first.id, &first.lease_token));
            assert_eq!((again.deliveries, again.lease_expires_at), (1, first.lease_expires_at));
        }
        let refusal = Refusal::of(Code::AlreadyExists, reason::REQUEST_ID_REUSED);
        let other_lease = PopRequest { lease: Some(proto(Duration::from_secs(601))), ..request.clone() };
        let other_acks = PopRequest { ack_lease_tokens: vec![first.lease_token.clone()], ..request.clone() };
        for other in [other_lease, other_acks] {
            refusal.check(&format!("{other:?}"), client.pop(other).await);
        }

        // Nothing of the first answer is left: it pops anew.
        ack(&mut client, &queue, &first.lease_token).await;
        let anew = client.pop(request).await.unwrap().into_inner().task.unwrap();
        assert_eq!((&anew.id, anew.deliveries), (&ids[1], 1));
        assert_eq!(pop(&mut client, &queue).await, None);
    }
}
