//! Values and headers.

use std::collections::BTreeMap;

use data_queue_proto::reason;
use data_queue_proto::v1::{NewTask, task};

use crate::support::{
    call::{Witness, data, insert_request, json, pop, text},
    on_every_store,
    server::Client,
    status::{Details, Refusal},
    unique_queue,
};

const LIMIT: usize = 1 << 20;

/// Inserts a bad task between two good ones: all are refused.
async fn refused(client: &mut Client, witness: &mut Witness, refusal: Refusal, bad: NewTask) -> tonic::Status {
    let case = format!("{bad:?}").chars().take(200).collect::<String>();
    let tasks = vec![json("1"), bad, json("2")];
    let answer = client.insert(insert_request(&witness.queue, tasks)).await;
    let status = refusal.check(&case, answer);
    witness.unchanged(client, &case).await;
    status
}

/// Inserts a task and pops it again.
async fn there_and_back(client: &mut Client, task: NewTask) -> data_queue_proto::v1::Task {
    let queue = unique_queue("value");
    client.insert(insert_request(&queue, vec![task])).await.expect("a good value");
    pop(client, &queue).await.expect("the task")
}

fn nested(depth: usize, open: &str, inner: &str, close: &str) -> NewTask {
    json(&[open.repeat(depth), inner.to_owned(), close.repeat(depth)].concat())
}

fn headers(pairs: impl IntoIterator<Item = (String, String)>) -> NewTask {
    NewTask { headers: pairs.into_iter().collect::<BTreeMap<_, _>>(), ..json("1") }
}

on_every_store! {
    /// Row 5: a task with no value.
    async fn row_05_value_missing(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let refusal = Refusal::invalid(reason::VALUE_MISSING, "tasks");
        refused(&mut client, &mut witness, refusal, NewTask::default()).await;
    }

    /// Row 6: what is not JSON, with line and column; the batch's good tasks are not inserted either.
    async fn row_06_json_invalid(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let texts = [
            "", " ", "{\"a\":", "nul", "{\"a\":1} x", "NaN", "'a'", "{'a':1}", "[1,]", "01", "\"\u{1}\"", "\"\\x\"",
            "1 2", "\u{feff}1", "-", "Infinity", "{\"a\":1}}",
        ];
        for bad in texts {
            let refusal = Refusal::invalid(reason::JSON_INVALID, "json");
            let status = refused(&mut client, &mut witness, refusal, json(bad)).await;
            let message = status.message();
            assert!(message.contains("line") && message.contains("column"), "{bad:?}: {message}");
        }
        let refusal = Refusal::invalid(reason::JSON_INVALID, "json");
        let status = refused(&mut client, &mut witness, refusal, json("{\n  \"a\": nope\n}")).await;
        assert!(status.message().contains("line 2"), "{}", status.message());
    }

    /// Row 7, G2: JSON comes back byte for byte.
    async fn row_07_json_kept_as_given(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let texts = [
            "null", "0", "\"\"", "[]", "{\"a\":1,\"a\":2}", "1e400", "9223372036854775808", "-0", "0.10",
            "\"\\ud800\"", " \t\r\n{ \"b\" : 1 , \"a\" : [ ] }\n ", "\"\\u0000\"", "\"\u{10ffff}é\"",
            "123456789012345678901234567890.123456789012345678901234567890",
        ];
        for given in texts {
            let task = there_and_back(&mut client, json(given)).await;
            assert_eq!(text(&task), given);
            if given == "null" {
                assert_eq!(task.md5, "37a6259cc0c1dae299a7866489dff0bd");
            }
        }
    }

    /// Row 8: nested 128 deep, 129 deep, 100,000 deep.
    async fn row_08_json_depth(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for (open, inner, close) in [("[", "", "]"), ("[", "1", "]"), ("{\"a\":", "1", "}"), ("[", "{}", "]")] {
            let own = usize::from(inner == "{}");
            let deepest = nested(128 - own, open, inner, close);
            let task = there_and_back(&mut client, deepest.clone()).await;
            assert_eq!(json(text(&task)), deepest);
            for depth in [129 - own, 100_000] {
                let refusal = Refusal::invalid(reason::JSON_INVALID, "json");
                let bad = nested(depth, open, inner, close);
                refused(&mut client, &mut witness, refusal, bad).await;
            }
        }
        // Not closed either: the depth must be found before the end is.
        let refusal = Refusal::invalid(reason::JSON_INVALID, "json");
        refused(&mut client, &mut witness, refusal, nested(100_000, "[", "", "")).await;
    }

    /// Row 9: empty bytes are a value.
    async fn row_09_data_empty(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let task = there_and_back(&mut client, data("")).await;
        assert_eq!(task.value, Some(task::Value::Data(bytes::Bytes::new())));
        assert_eq!(task.md5, "d41d8cd98f00b204e9800998ecf8427e");
    }

    /// Row 10: a value of exactly the limit, and one byte more.
    async fn row_10_value_at_the_limit(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let text_of = |length: usize| format!("\"{}\"", "x".repeat(length - 2));

        let task = there_and_back(&mut client, data(vec![0xff; LIMIT])).await;
        assert_eq!(task.value, Some(task::Value::Data(vec![0xff; LIMIT].into())));
        let task = there_and_back(&mut client, json(&text_of(LIMIT))).await;
        assert_eq!(text(&task).len(), LIMIT);

        for bad in [data(vec![0xff; LIMIT + 1]), json(&text_of(LIMIT + 1))] {
            let refusal = Refusal::invalid(reason::VALUE_TOO_LARGE, "tasks");
            let status = refused(&mut client, &mut witness, refusal, bad).await;
            assert!(status.has_metadata("1048576"), "the limit is not in {status:?}");
        }
    }

    /// Row 10, with a limit that was set.
    async fn row_10_value_limit_is_a_setting(backend) {
        let server = backend.start(&["--max-value", "10"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        there_and_back(&mut client, data("0123456789")).await;
        let refusal = Refusal::invalid(reason::VALUE_TOO_LARGE, "tasks");
        let status = refused(&mut client, &mut witness, refusal, data("01234567890")).await;
        assert!(status.has_metadata("10"), "the limit is not in {status:?}");
    }

    /// Row 15: headers.
    async fn row_15_headers_invalid(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let many = |count: usize| (0..count).map(|number| (format!("key-{number}"), String::new()));
        let one = |key: usize, value: usize| headers([("k".repeat(key), "v".repeat(value))]);
        for good in [headers(many(64)), one(1, 0), one(1_024, 1_024)] {
            let task = there_and_back(&mut client, good.clone()).await;
            assert_eq!(task.headers, good.headers);
        }
        for bad in [headers(many(65)), one(0, 1), one(1_025, 1), one(1, 1_025)] {
            let refusal = Refusal::invalid(reason::HEADERS_INVALID, "headers");
            refused(&mut client, &mut witness, refusal, bad).await;
        }
    }
}
