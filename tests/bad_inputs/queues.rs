//! Names of queues, and queues that are not there.

use data_queue_proto::reason;
use data_queue_proto::v1::PopRequest;
use prost_types::Duration as ProtoDuration;

use crate::support::{
    call::{Call, Witness, ack, held_for_request, insert_json, pop, pop_batch, pop_batch_request, pop_request, text},
    on_every_store,
    redis::Reply,
    server::Backend,
    status::Refusal,
    unique_queue,
};

/// "never-seen", as base64url would write it.
const NEVER_SEEN: &str = "bmV2ZXItc2Vlbg";

on_every_store! {
    /// Row 1: a malformed name is refused by every method.
    async fn row_01_queue_name_malformed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let too_long = "a".repeat(129);
        let names = [
            "", &too_long, "a b", "{x}", "}", "a}b", "a\0b", "a\rb", "a\nb", "a\x1bb", ".a", "/a", ":a", "../../etc",
            "é", "a*", "-a",
        ];
        let refusal = Refusal::invalid(reason::QUEUE_NAME_INVALID, "queue");
        for name in names {
            for call in Call::every(name) {
                let case = format!("{call:?}");
                refusal.check(&case, call.send(&mut client).await);
            }
            witness.unchanged(&mut client, name).await;
        }
    }

    /// Row 2, G12: legal names are only names, and name different queues.
    async fn row_02_queue_names_are_only_names(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let longest = "z".repeat(128);
        let names = ["a/../b", "a::b", "A", "a", "a::c", "a:", "a::", "a:b", "a/b", "0", "a.0", &longest];
        for name in names {
            insert_json(&mut client, name, &[&format!("\"{name}\"")]).await;
        }
        for name in names {
            let task = pop(&mut client, name).await.expect("the queue's own task");
            assert_eq!((text(&task), task.queue.as_str()), (format!("\"{name}\"").as_str(), name));
            assert_eq!(pop(&mut client, name).await, None, "{name}: another queue's task");
            ack(&mut client, name, &task.lease_token).await;
        }
    }

    /// Row 25: a pop of a queue never seen is empty, and makes no queue.
    async fn row_25_queue_never_seen(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        assert_eq!(pop(&mut client, "never-seen").await, None);
        assert_eq!(pop_batch(&mut client, pop_batch_request("never-seen")).await.unwrap(), []);
        let wait = Some(ProtoDuration { seconds: 0, nanos: 1 });
        let request = PopRequest { wait, request_id: "r".to_owned(), ..pop_request("never-seen") };
        assert_eq!(client.pop(request).await.unwrap().into_inner().task, None);
        if backend == Backend::Redis {
            for part in ["meta", "tasks"] {
                let keys = server.redis().command(&["KEYS", &format!("*{NEVER_SEEN}*:{part}")]);
                assert_eq!(keys, Reply::Array(vec![]));
            }
        }
        witness.unchanged(&mut client, "a pop of an unknown queue").await;
    }

    /// Row 34: nothing to put back in an unknown queue.
    async fn row_34_held_for_on_unknown_queue(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let request = held_for_request(&unique_queue("unknown"), ProtoDuration::default());
        let answer = client.putback(request).await.unwrap().into_inner();
        assert_eq!((answer.put_back, answer.dead_lettered, answer.outcomes), (0, 0, vec![]));
        witness.unchanged(&mut client, "held_for on another queue").await;
    }
}
