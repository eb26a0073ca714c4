//! Lists of queues, page by page.

use std::collections::BTreeMap;

use data_queue_proto::reason;
use data_queue_proto::v1::QueueCounts;
use tokio::task::JoinSet;
use tonic::Code;

use super::{HOUR, names, page, pages};
use crate::support::{
    call::{get_queue_request, insert_json, insert_request, json, pop_for},
    on_every_store,
    redis::Reply,
    server::Backend,
    status::Refusal,
    wire_tests,
};
on_every_store! {
    /// Queues come in the order of their names' bytes, on pages of any size, each once, with its counts.
    async fn queues_are_listed_by_name(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        assert_eq!(pages(&mut client, 0).await, (vec![0], vec![]));
        let longest = "z".repeat(128);
        let inserted = ["a::c", "Z", "a", "a.b", "0", &longest, "a/../b", "a:b", "A", "a::b", "a-b", "za", "a_b", "9"];
        let mut expected = BTreeMap::new();
        for (number, name) in inserted.into_iter().enumerate() {
            client.insert(insert_request(name, vec![json("1"); number + 1])).await.unwrap();
            expected.insert(name, u64::try_from(number).unwrap() + 1);
        }
        let held = pop_for(&mut client, "Z", HOUR).await;
        for page_size in [0, 1, 2, 3, 5, 7, 13, 14, 15, 100, 1_000, 1_001, i32::MAX] {
            let (lengths, queues) = pages(&mut client, page_size).await;
            assert_eq!(names(&queues), expected.keys().copied().collect::<Vec<_>>(), "pages of {page_size}");
            let size = usize::try_from(page_size).unwrap();
            assert!(size == 0 || lengths.iter().all(|length| *length <= size), "pages of {page_size}: {lengths:?}");
            for queue in &queues {
                let QueueCounts { ready, leased, inserted, .. } = queue.counts.expect("counts");
                let leased_now = u64::from(queue.name == held.queue);
                let all = expected[queue.name.as_str()];
                assert_eq!((ready, leased, inserted), (all - leased_now, leased_now, all), "{queue:?}");
            }
        }
    }

    /// Of more queues than any page takes, each comes once; those made meanwhile come if they are still ahead.
    async fn every_queue_is_listed_once(backend) {
        const QUEUES: usize = 1_010;
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut inserts = JoinSet::new();
        for worker in 0..10 {
            let mut client = client.clone();
            inserts.spawn(async move {
                for number in (worker..QUEUES).step_by(10) {
                    insert_json(&mut client, &format!("many-{number:04}"), &["1"]).await;
                }
            });
        }
        inserts.join_all().await;
        let expected = (0..QUEUES).map(|number| format!("many-{number:04}")).collect::<Vec<_>>();
        for (page_size, first) in [(0, 100), (33, 33), (333, 333), (1_000, 1_000), (5_000, 1_000), (i32::MAX, 1_000)] {
            let (lengths, queues) = pages(&mut client, page_size).await;
            assert_eq!(names(&queues), expected, "pages of {page_size}");
            assert_eq!(lengths[0], first, "pages of {page_size}: {lengths:?}");
        }

        let (begun, next) = page(&mut client, 10, "").await;
        assert_eq!(names(&begun), &expected[..10]);
        for queue in ["many-0005.behind", "many-0010.ahead"] {
            insert_json(&mut client, queue, &["1"]).await;
        }
        let (went_on, _) = page(&mut client, 2, &next).await;
        assert_eq!(names(&went_on), ["many-0010", "many-0010.ahead"]);
        let (_, last) = page(&mut client, 1_000, "").await;
        let (rest, end) = page(&mut client, 1_000, &last).await;
        assert_eq!((rest.len(), end.as_str()), (12, ""));
    }
}

wire_tests! {
    /// A queue whose keys are another program's by now is left out of lists, which the log tells once; who asks for that
    /// queue hears that it cannot be read.
    async fn a_broken_queue_is_left_out() {
        let server = Backend::Redis.start(&[]).await;
        let mut client = server.client().await;
        insert_json(&mut client, "broken", &["1"]).await;
        let Reply::Array(keys) = server.redis().command(&["KEYS", "dq:{*}:*:meta"]) else { panic!("no array") };
        let [Reply::Bytes(meta)] = &keys[..] else { panic!("one queue, {keys:?}") };
        let meta = std::str::from_utf8(meta).unwrap();
        for queue in ["a", "z"] {
            insert_json(&mut client, queue, &["1"]).await;
        }
        let before = server.log();
        server.redis().command(&["SET", meta, "of another program"]);
        for _ in 0..5 {
            let (lengths, queues) = pages(&mut client, 1).await;
            assert_eq!((names(&queues), lengths), (vec!["a", "z"], vec![1, 0, 1]));
            assert_eq!(names(&pages(&mut client, 0).await.1), ["a", "z"]);
        }
        let log = server.log();
        assert_eq!(log[before.len()..].lines().count(), 1, "not one line:\n{log}");
        assert!(log[before.len()..].contains("\"broken\""), "{log}");
        let answer = client.admin.get_queue(get_queue_request("broken")).await;
        Refusal::of(Code::Internal, reason::INTERNAL).check("GetQueue", answer);
    }
}
