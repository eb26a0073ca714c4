//! How many tasks and tokens a call may carry.

use data_queue_proto::reason;
use data_queue_proto::v1::PopBatchRequest;

use crate::support::{
    call::{Call, Witness, ack, data, insert_request, json, pop_batch, pop_batch_request, unknown_token},
    on_every_store,
    status::{Details, Refusal},
    unique_queue,
};

fn tokens(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{number:032x}")).collect()
}

on_every_store! {
    /// Row 3: a call with nothing to do.
    async fn row_03_batch_empty(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let mut cases = vec![
            (Call::Insert(insert_request(&queue, vec![])), "tasks"),
            (Call::PopBatch(PopBatchRequest { max_tasks: 0, ..pop_batch_request(&queue) }), "max_tasks"),
        ];
        cases.extend(Call::every_that_needs_tokens(&queue, &[]).into_iter().map(|call| (call, "lease_tokens")));
        for (call, field) in cases {
            let case = format!("{call:?}");
            Refusal::invalid(reason::BATCH_EMPTY, field).check(&case, call.send(&mut client).await);
            witness.unchanged(&mut client, &case).await;
        }
    }

    /// Row 4: a call with too much to do says how much is allowed.
    async fn row_04_batch_too_large(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let mut cases = vec![
            (Call::Insert(insert_request(&queue, vec![json("1"); 1_001])), "tasks", "1000"),
            (Call::PopBatch(PopBatchRequest { max_tasks: 10_001, ..pop_batch_request(&queue) }), "max_tasks", "10000"),
            (Call::PopBatch(PopBatchRequest { max_tasks: u32::MAX, ..pop_batch_request(&queue) }), "max_tasks", "10000"),
        ];
        let mut too_many = tokens(1_000);
        // A good token in the batch, so that a call that acts before it looks is seen.
        too_many.push(witness.token.clone());
        let with_tokens = Call::every_with_tokens(&queue, &too_many);
        cases.extend(with_tokens.into_iter().map(|call| (call, "lease_tokens", "1000")));
        for (call, field, limit) in cases {
            let answer = call.send(&mut client).await;
            let status = Refusal::invalid(reason::BATCH_TOO_LARGE, field).check(field, answer);
            assert!(status.has_metadata(limit), "the limit {limit} is not in {status:?}");
            witness.unchanged(&mut client, field).await;
        }
    }

    /// Row 4, the other side: as much as is allowed.
    async fn row_04_batch_at_the_limit(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("batch");
        Call::Insert(insert_request(&queue, vec![json("1"); 1_000])).send(&mut client).await.unwrap();
        for call in Call::every_with_tokens(&unique_queue("other"), &tokens(1_000)) {
            call.send(&mut client).await.unwrap();
        }
        let request = PopBatchRequest { max_tasks: 10_000, ..pop_batch_request(&queue) };
        let tasks = pop_batch(&mut client, request).await.unwrap();
        assert_eq!(tasks.len(), 1_000);
        let tokens = tasks.into_iter().map(|task| task.lease_token).collect::<Vec<_>>();
        let answer = client.ack(crate::support::call::ack_request(&queue, &tokens)).await.unwrap().into_inner();
        assert_eq!(answer.outcomes.len(), 1_000);
        assert!(answer.outcomes.iter().all(|outcome| *outcome == answer.outcomes[0]));
        ack(&mut client, &queue, &unknown_token()).await;
    }

    /// Row 11: a message over the decode limit.
    async fn row_11_message_too_large(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let refusal = Refusal::of(tonic::Code::ResourceExhausted, reason::MESSAGE_TOO_LARGE);
        let tasks = vec![data(vec![b'x'; 1 << 20]); 5];
        let answer = client.insert(insert_request(&witness.queue, tasks)).await;
        refusal.check("five values of 1 MiB", answer);
        witness.unchanged(&mut client, "five values of 1 MiB").await;
    }

    /// Row 11, with a limit that was set, in every method.
    async fn row_11_message_limit_is_a_setting(backend) {
        let server = backend.start(&["--max-value", "4096", "--max-message", "200000"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let refusal = Refusal::of(tonic::Code::ResourceExhausted, reason::MESSAGE_TOO_LARGE);
        let tasks = vec![data(vec![b'x'; 4_096]); 50];
        refusal.check("50 values of 4 KiB", client.insert(insert_request(&witness.queue, tasks)).await);
        for call in Call::every(&"q".repeat(200_001)) {
            refusal.check("a message over the limit", call.send(&mut client).await);
        }
        witness.unchanged(&mut client, "messages over the limit").await;
    }
}
