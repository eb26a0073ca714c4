//! Pages that cannot be.

use data_queue_proto::reason;
use data_queue_proto::v1::ListQueuesRequest;

use crate::support::{call::Witness, on_every_store, status::Refusal};

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
