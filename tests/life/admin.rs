//! What operators set, see and remove.

use std::time::Duration;

use data_queue_proto::{
    reason,
    v1::{
        GetTaskRequest, NewTask, PauseQueueRequest, PopRequest, PurgeQueueRequest, QueueSettings, ResumeQueueRequest,
        RetryBackoff, TaskState, WatchQueuesRequest,
    },
};
use tonic::Code;

use super::{ids, in_state, insert, like, set, span, task_info};
use crate::support::{
    PATIENCE,
    call::{ack, counts, get_queue_request, insert_json, insert_request, json, pop, pop_request, proto, text},
    on_every_store,
    status::{Details, Refusal},
    unique_queue,
};

const HOUR: Duration = Duration::from_secs(3_600);

on_every_store! {
    /// Settings are kept, also of a queue without tasks and over a restart; what the mask does not name stays as it is, and what
    /// it names without a value is unset.
    async fn settings_are_kept(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("settings");
        let all = QueueSettings {
            lease: span(Duration::from_millis(1_500)),
            max_failures: Some(3),
            max_expiries: Some(4),
            retry_backoff: Some(RetryBackoff { min: span(Duration::ZERO), max: span(HOUR) }),
            max_tasks: Some(0),
            max_bytes: Some(1 << 53),
            dead_letter_retention: span(24 * HOUR),
            paused: true,
            shards: Some(8),
        };
        assert_eq!(set(&mut client, &queue, &["*"], all).await, all);
        if backend != crate::support::server::Backend::Memory {
            server.restart().await;
            client = server.client().await;
        }
        let shown = client.admin.get_queue(get_queue_request(&queue)).await.unwrap().into_inner().queue.unwrap();
        assert_eq!((shown.settings, shown.counts.unwrap().inserted), (Some(all), 0));
        let some = QueueSettings { max_expiries: Some(5), ..QueueSettings::default() };
        let left = set(&mut client, &queue, &["lease", "retry_backoff.min", "max_expiries", "paused"], some).await;
        let retry_backoff = Some(RetryBackoff { min: None, max: span(HOUR) });
        assert_eq!(left, QueueSettings { lease: None, max_expiries: Some(5), retry_backoff, paused: false, ..all });
        assert_eq!(set(&mut client, &queue, &["*"], QueueSettings::default()).await, QueueSettings::default());
    }

    /// A paused queue delivers nothing, takes inserts, and lets what is held be finished; a pop that waits gets a task when it goes on.
    async fn a_paused_queue_delivers_nothing(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("paused");
        insert_json(&mut client, &queue, &["1", "2"]).await;
        let held = pop(&mut client, &queue).await.unwrap();
        client.admin.pause_queue(PauseQueueRequest { queue: queue.clone() }).await.unwrap();
        insert_json(&mut client, &queue, &["3"]).await;
        assert_eq!(pop(&mut client, &queue).await, None);
        ack(&mut client, &queue, &held.lease_token).await;
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.ready, counted.leased, counted.acked), (2, 0, 1));
        let mut waiter = client.clone();
        let request = PopRequest { wait: Some(proto(PATIENCE)), ..pop_request(&queue) };
        let waiting = tokio::spawn(async move { waiter.pop(request).await.unwrap().into_inner().task });
        assert_eq!(pop(&mut client, &queue).await, None);
        client.admin.resume_queue(ResumeQueueRequest { queue: queue.clone() }).await.unwrap();
        assert_eq!(text(&waiting.await.unwrap().unwrap()), "2");
        assert_eq!(text(&pop(&mut client, &queue).await.unwrap()), "3");
    }

    /// Tasks in each state are listed in order on pages of any size, and what a page shows is what is there.
    async fn tasks_are_listed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("list");
        let ready = insert(&mut client, &queue, like(0..230, &json(""))).await;
        let urgent = insert(&mut client, &queue, like(300..303, &NewTask { priority: 7, ..json("") })).await;
        let mut delayed = Vec::new();
        for seconds in [7_200, 3_600, 5_400] {
            let task = NewTask { delay: span(Duration::from_secs(seconds)), ..json("1") };
            delayed.extend(insert(&mut client, &queue, vec![task]).await);
        }
        let expected: Vec<&String> = urgent.iter().chain(&ready).map(|result| &result.id).collect();
        for page_size in [0, 1, 7, 200, 1_000] {
            let listed = ids(&in_state(&mut client, &queue, TaskState::Ready, page_size).await);
            assert_eq!(listed.iter().collect::<Vec<_>>(), expected, "pages of {page_size}");
        }
        let scheduled = ids(&in_state(&mut client, &queue, TaskState::Scheduled, 2).await);
        assert_eq!(scheduled, [&*delayed[1].id, &delayed[2].id, &delayed[0].id]);
        assert_eq!(in_state(&mut client, &queue, TaskState::Leased, 2).await, []);
        let first = pop(&mut client, &queue).await.unwrap();
        let held = in_state(&mut client, &queue, TaskState::Leased, 2).await;
        assert_eq!(ids(&held), [first.id.as_str()]);
        let task = held[0].task.as_ref().unwrap();
        assert_eq!((task.lease_token.as_str(), task.lease_expires_at), ("", first.lease_expires_at));
        assert_eq!((task.deliveries, task.priority, text(task)), (1, 7, "300"));
    }

    /// Large tasks do not make a page larger than a client takes.
    async fn pages_of_large_tasks(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("large");
        let large = format!("\"{}\"", "x".repeat(900_000));
        for _ in 0..12 {
            insert_json(&mut client, &queue, &[&large]).await;
        }
        assert_eq!(in_state(&mut client, &queue, TaskState::Ready, 200).await.len(), 12);
    }

    /// Purging removes what is in the given states, and counts it.
    async fn a_queue_is_purged(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("purge");
        insert(&mut client, &queue, like(0..450, &json(""))).await;
        insert(&mut client, &queue, like(0..2, &NewTask { delay: span(HOUR), ..json("") })).await;
        let held = pop(&mut client, &queue).await.unwrap();
        let purge = |states: &[TaskState]| PurgeQueueRequest {
            queue: queue.clone(),
            states: states.iter().map(|state| *state as i32).collect(),
        };
        let purged = client.admin.purge_queue(purge(&[TaskState::Ready, TaskState::Dead])).await.unwrap().into_inner();
        assert_eq!(purged.purged, 449);
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.ready, counted.scheduled, counted.leased, counted.purged), (0, 2, 1, 449));
        let all = purge(&[TaskState::Scheduled, TaskState::Leased]);
        assert_eq!(client.admin.purge_queue(all).await.unwrap().into_inner().purged, 3);
        let request = GetTaskRequest { queue: queue.clone(), id: held.id };
        assert_eq!(client.admin.get_task(request).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(counts(&mut client, &queue).await.purged, 452);
    }

    /// Row 35: a queue at its limit refuses inserts, whole, with RetryInfo; what is in it can be popped and acked, and makes room.
    async fn row_35_queue_full(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("full");
        insert_json(&mut client, &queue, &["1", "2"]).await;
        let limit = QueueSettings { max_tasks: Some(3), ..QueueSettings::default() };
        set(&mut client, &queue, &["max_tasks"], limit).await;
        let full = Refusal::of(Code::ResourceExhausted, reason::QUEUE_FULL);
        let status = full.check("2 more", client.insert(insert_request(&queue, vec![json("3"), json("4")])).await);
        assert!(status.retry_delay().is_some() && status.has_metadata("3"), "{status:?}");
        insert_json(&mut client, &queue, &["3"]).await;
        full.check("1 more", client.insert(insert_request(&queue, vec![json("4")])).await);
        let held = pop(&mut client, &queue).await.unwrap();
        full.check("held", client.insert(insert_request(&queue, vec![json("4")])).await);
        ack(&mut client, &queue, &held.lease_token).await;
        insert_json(&mut client, &queue, &["4"]).await;

        let limit = QueueSettings { max_bytes: Some(350), ..QueueSettings::default() };
        set(&mut client, &queue, &["*"], limit).await;
        let large = format!("\"{}\"", "x".repeat(300));
        full.check("too many bytes", client.insert(insert_request(&queue, vec![json(&large)])).await);
        for _ in 0..3 {
            let task = pop(&mut client, &queue).await.unwrap();
            ack(&mut client, &queue, &task.lease_token).await;
        }
        insert_json(&mut client, &queue, &[&large]).await;
        full.check("again", client.insert(insert_request(&queue, vec![json(&large)])).await);
        counts(&mut client, &queue).await;
    }

    /// Watching tells counts as they are, with what happened since the look before.
    async fn queues_are_watched(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queues = [unique_queue("b"), unique_queue("a")];
        insert_json(&mut client, &queues[0], &["1"]).await;
        let interval = Some(proto(Duration::from_millis(100)));
        let request = WatchQueuesRequest { queues: queues.to_vec(), interval };
        let mut looks = client.admin.watch_queues(request).await.unwrap().into_inner();
        let first = looks.message().await.unwrap().unwrap().queues;
        assert_eq!(first.len(), 1, "the other one is not there yet");
        assert_eq!((first[0].queue.as_str(), first[0].inserted_per_second), (&*queues[0], 0.0));
        insert_json(&mut client, &queues[0], &["2"]).await;
        insert_json(&mut client, &queues[1], &["1"]).await;
        loop {
            let seen = looks.message().await.unwrap().unwrap().queues;
            if seen.len() == 2 {
                assert!(seen[0].queue < seen[1].queue);
                break;
            }
        }
        let info = insert(&mut client, &queues[1], vec![json("3")]).await.remove(0);
        assert_eq!(task_info(&mut client, &queues[1], &info.id).await.state(), TaskState::Ready);
    }
}
