//! Priorities, delays, times to live and unique keys that cannot be; and what a putback may not say.

use std::time::SystemTime;

use data_queue_proto::reason;
use data_queue_proto::v1::{NewTask, PutbackRequest, PutbackTokens, putback_request::Selection};
use prost_types::{Duration as ProtoDuration, Timestamp};

use crate::support::{
    call::{Call, Witness, counts, insert_request, json, pop, text},
    on_every_store,
    status::Refusal,
    unique_queue,
};

const DAYS_366: i64 = 366 * 86_400;

fn span(seconds: i64, nanos: i32) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds, nanos })
}

/// What no span of a task takes.
fn malformed() -> Vec<Option<ProtoDuration>> {
    vec![
        span(-1, 0),
        span(0, -1),
        span(DAYS_366, 1),
        span(DAYS_366 + 1, 0),
        span(i64::MAX, 0),
        span(i64::MAX, i32::MAX),
        span(i64::MIN, i32::MIN),
        span(1, -1),
        span(1, 1_000_000_000),
    ]
}

fn from_now(seconds: i64) -> Option<Timestamp> {
    let now = Timestamp::from(SystemTime::now());
    Some(Timestamp { seconds: now.seconds + seconds, ..now })
}

/// A good task, and this one.
fn second(queue: &str, task: NewTask) -> Call {
    Call::Insert(insert_request(queue, vec![json("1"), task]))
}

on_every_store! {
    /// Row 16: a priority over 9; 9 is the highest.
    async fn row_16_priority_out_of_range(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for priority in [10, 255, 256, u32::MAX] {
            let call = second(&witness.queue, NewTask { priority, ..json("2") });
            let refusal = Refusal::invalid(reason::PRIORITY_OUT_OF_RANGE, "tasks[1].priority");
            refusal.check(&priority.to_string(), call.send(&mut client).await);
            witness.unchanged(&mut client, &priority.to_string()).await;
        }
        let queue = unique_queue("priority");
        let tasks = (0..=9).map(|priority| NewTask { priority, ..json(&priority.to_string()) }).collect();
        client.insert(insert_request(&queue, tasks)).await.unwrap();
        for priority in (0..=9).rev() {
            let task = pop(&mut client, &queue).await.unwrap();
            assert_eq!((task.priority, text(&task)), (priority, priority.to_string().as_str()));
        }
    }

    /// Row 17: delays that are negative, too long, malformed or given twice; the longest one is taken.
    async fn row_17_delay_out_of_range(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        for delay in malformed() {
            let case = format!("{delay:?}");
            let call = second(&queue, NewTask { delay, ..json("2") });
            Refusal::invalid(reason::DELAY_OUT_OF_RANGE, "tasks[1].delay").check(&case, call.send(&mut client).await);
            let tokens = PutbackTokens { lease_tokens: vec![witness.token.clone()], delay, ..PutbackTokens::default() };
            let call = PutbackRequest { queue: queue.clone(), selection: Some(Selection::Tokens(tokens)) };
            Refusal::invalid(reason::DELAY_OUT_OF_RANGE, "tokens.delay").check(&case, client.putback(call).await);
            witness.unchanged(&mut client, &case).await;
        }
        let times = [
            from_now(DAYS_366 + 3_600),
            Some(Timestamp { seconds: i64::MAX, nanos: 0 }),
            Some(Timestamp { seconds: 1, nanos: -1 }),
            Some(Timestamp { seconds: 1, nanos: 1_000_000_000 }),
        ];
        for deliver_at in times {
            let case = format!("{deliver_at:?}");
            let call = second(&queue, NewTask { deliver_at, ..json("2") });
            let refusal = Refusal::invalid(reason::DELAY_OUT_OF_RANGE, "tasks[1].deliver_at");
            refusal.check(&case, call.send(&mut client).await);
            witness.unchanged(&mut client, &case).await;
        }
        let both = second(&queue, NewTask { delay: span(1, 0), deliver_at: from_now(1), ..json("2") });
        Refusal::invalid(reason::DELAY_OUT_OF_RANGE, "tasks[1]").check("both", both.send(&mut client).await);
        witness.unchanged(&mut client, "both").await;

        let queue = unique_queue("long-delay");
        let tasks = vec![
            NewTask { delay: span(DAYS_366, 0), ..json("1") },
            NewTask { deliver_at: from_now(DAYS_366 - 3_600), ..json("2") },
            NewTask { delay: span(0, 0), ..json("3") },
        ];
        client.insert(insert_request(&queue, tasks)).await.unwrap();
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.scheduled, counted.ready), (2, 1));
    }

    /// Row 18: a time in the past, however long ago, is now.
    async fn row_18_deliver_at_in_the_past(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("past");
        let times = [
            from_now(-1),
            from_now(-DAYS_366 * 10),
            Some(Timestamp { seconds: 0, nanos: 0 }),
            Some(Timestamp { seconds: -1, nanos: 999_999_999 }),
            Some(Timestamp { seconds: i64::MIN, nanos: 0 }),
        ];
        for (number, deliver_at) in times.into_iter().enumerate() {
            let task = NewTask { deliver_at, ..json(&number.to_string()) };
            client.insert(insert_request(&queue, vec![task])).await.unwrap();
            assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), number.to_string());
        }
    }

    /// Row 19: a time to live of 0 or none is none; others are refused when out of range.
    async fn row_19_ttl_out_of_range(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        for ttl in malformed() {
            let case = format!("{ttl:?}");
            let call = second(&witness.queue, NewTask { ttl, ..json("2") });
            Refusal::invalid(reason::TTL_OUT_OF_RANGE, "tasks[1].ttl").check(&case, call.send(&mut client).await);
            witness.unchanged(&mut client, &case).await;
        }
        let queue = unique_queue("ttl");
        for (number, ttl) in [None, span(0, 0), span(DAYS_366, 0)].into_iter().enumerate() {
            let task = NewTask { ttl, ..json(&number.to_string()) };
            client.insert(insert_request(&queue, vec![task])).await.unwrap();
            assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), number.to_string());
        }
    }

    /// A unique key or a reason that is too long, in bytes; the longest ones are taken.
    async fn texts_that_are_too_long(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let call = second(&queue, NewTask { unique_key: "ä".repeat(64) + "x", ..json("2") });
        let refusal = Refusal::invalid(reason::UNIQUE_KEY_INVALID, "tasks[1].unique_key");
        assert!(refusal.check("129 bytes", call.send(&mut client).await).message().contains("129"));
        witness.unchanged(&mut client, "129 bytes").await;
        let give_back = |token: &str, reason: String| {
            let lease_tokens = vec![token.to_owned()];
            let tokens = PutbackTokens { lease_tokens, failed: true, reason, ..PutbackTokens::default() };
            PutbackRequest { queue: queue.clone(), selection: Some(Selection::Tokens(tokens)) }
        };
        let answer = client.putback(give_back(&witness.token, "x".repeat(1_025))).await;
        Refusal::invalid(reason::REASON_TOO_LONG, "tokens.reason").check("1,025 bytes", answer);
        witness.unchanged(&mut client, "1,025 bytes").await;
        let longest = NewTask { unique_key: "ä".repeat(64), ..json("3") };
        client.insert(insert_request(&queue, vec![longest])).await.unwrap();
        let answer = client.putback(give_back(&witness.token, "x".repeat(1_024))).await.unwrap().into_inner();
        assert_eq!(answer.put_back, 1);
        assert_eq!(counts(&mut client, &queue).await.scheduled, 1);
    }
}
