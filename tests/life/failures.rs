//! Failures, and dead letters.

use std::time::Duration;

use data_queue_proto::v1::{
    DeadLetterCause, NewTask, PutbackTokens, QueueSettings, RedriveIds, RedriveOutcome, RedriveTasksRequest,
    RetryBackoff, TaskState, redrive_tasks_request::Selection,
};
use tokio::time::Instant;

use super::{cause, fail, ids, in_state, insert, like, put_back, set, span, task_info};
use crate::support::{
    PATIENCE,
    call::{ack, counts, json, pop, pop_for, pop_waiting, text},
    on_every_store, poll_until,
    server::{Backend, Server},
    unique_queue,
};

on_every_store! {
    /// Failures are counted, each with its text; the last one that is allowed makes a dead letter with its cause and time. What is
    /// put back without a failure counts nothing, and neither does a lease that runs out count as one.
    async fn failures_make_a_dead_letter(backend) {
        let server = backend.start(&["--max-failures", "3"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("failures");
        let id = insert(&mut client, &queue, vec![json("1")]).await.remove(0).id;
        for failures in 0..3 {
            let plain = pop(&mut client, &queue).await.unwrap();
            assert_eq!((plain.failures, plain.expiries), (failures, 0));
            put_back(&mut client, &queue, tokens(&plain.lease_token)).await;
            let task = pop(&mut client, &queue).await.unwrap();
            assert_eq!((task.failures, task.deliveries), (failures, 2 * failures + 2));
            let answer = fail(&mut client, &queue, &task.lease_token, &format!("failure {failures}: ä")).await;
            assert_eq!((answer.put_back, answer.dead_lettered), if failures < 2 { (1, 0) } else { (0, 1) });
        }
        assert_eq!(pop(&mut client, &queue).await, None);
        let info = task_info(&mut client, &queue, &id).await;
        assert_eq!((info.state(), cause(&info)), (TaskState::Dead, DeadLetterCause::MaxFailures));
        assert_eq!(info.last_error, "failure 2: ä");
        assert!(info.died_at.is_some());
        let task = info.task.clone().unwrap();
        assert_eq!((task.failures, task.expiries, task.deliveries, text(&task)), (3, 0, 6, "1"));
        assert_eq!(task.lease_token, "");
        assert_eq!(in_state(&mut client, &queue, TaskState::Dead, 0).await, [info]);
    }

    /// Without a delay of its own a failure waits for the queue's backoff: twice as long each time, never less than that.
    async fn failures_back_off(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("backoff");
        let backoff = RetryBackoff { min: span(Duration::from_millis(300)), max: span(Duration::from_millis(600)) };
        let settings = QueueSettings { retry_backoff: Some(backoff), ..QueueSettings::default() };
        assert_eq!(set(&mut client, &queue, &["retry_backoff"], settings).await, settings);
        insert(&mut client, &queue, vec![json("1")]).await;
        for millis in [300, 600, 600] {
            let task = pop_waiting(&mut client, &queue).await;
            let before = Instant::now();
            put_back(&mut client, &queue, PutbackTokens { failed: true, ..tokens(&task.lease_token) }).await;
            let again = pop_waiting(&mut client, &queue).await;
            assert!(before.elapsed() >= Duration::from_millis(millis), "{:?}", before.elapsed());
            assert_eq!(again.failures, task.failures + 1);
            // At once, and no failure: it is popped again above.
            put_back(&mut client, &queue, tokens(&again.lease_token)).await;
        }
    }

    /// A worker can reject a task at once; a lease that runs out too often has a cause of its own.
    async fn rejected_and_run_out(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("rejected");
        let settings = QueueSettings { max_expiries: Some(1), ..QueueSettings::default() };
        set(&mut client, &queue, &["max_expiries"], settings).await;
        let inserted = insert(&mut client, &queue, like(0..2, &json(""))).await;
        let task = pop(&mut client, &queue).await.unwrap();
        let reject = PutbackTokens { dead_letter: true, reason: "no such page".to_owned(), ..tokens(&task.lease_token) };
        let answer = put_back(&mut client, &queue, reject).await;
        assert_eq!((answer.put_back, answer.dead_lettered), (0, 1));
        let info = task_info(&mut client, &queue, &inserted[0].id).await;
        assert_eq!((cause(&info), info.last_error.as_str()), (DeadLetterCause::Rejected, "no such page"));
        assert_eq!(info.task.unwrap().failures, 0);

        pop_for(&mut client, &queue, Duration::from_millis(100)).await;
        let mut watcher = client.clone();
        poll_until("it to die", PATIENCE, async || (counts(&mut watcher, &queue).await.dead == 2).then_some(())).await;
        let info = task_info(&mut client, &queue, &inserted[1].id).await;
        assert_eq!((cause(&info), info.last_error.as_str()), (DeadLetterCause::MaxExpiries, ""));
        assert_eq!(ids(&in_state(&mut client, &queue, TaskState::Dead, 1).await), [&*inserted[0].id, &inserted[1].id]);
    }

    /// Dead letters go back to the tail, one, some or all, with failures and expiries counted anew.
    async fn dead_letters_are_redriven(backend) {
        let server = backend.start(&["--max-failures", "1"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("redrive");
        let inserted = insert(&mut client, &queue, like(0..450, &json(""))).await;
        for _ in 0..450 {
            let task = pop(&mut client, &queue).await.unwrap();
            fail(&mut client, &queue, &task.lease_token, "x").await;
        }
        let redrive = |selection| RedriveTasksRequest { queue: queue.clone(), selection: Some(selection) };
        let chosen = vec![inserted[7].id.clone(), "00000000-0000-4000-8000-000000000000".to_owned()];
        let done = client.admin.redrive_tasks(redrive(Selection::Ids(RedriveIds { ids: chosen }))).await.unwrap();
        let done = done.into_inner();
        assert_eq!(done.outcomes, [RedriveOutcome::Redriven as i32, RedriveOutcome::NotFound as i32]);
        assert_eq!(done.redriven, 1);
        let task = pop(&mut client, &queue).await.unwrap();
        assert_eq!((text(&task), task.failures, task.expiries, task.deliveries), ("7", 0, 0, 2));
        ack(&mut client, &queue, &task.lease_token).await;
        let some = client.admin.redrive_tasks(redrive(Selection::MaxTasks(3))).await.unwrap().into_inner();
        assert_eq!((some.redriven, some.outcomes.len()), (3, 0));
        let all = client.admin.redrive_tasks(redrive(Selection::MaxTasks(0))).await.unwrap().into_inner();
        assert_eq!(all.redriven, 446);
        // Of those that died in the same millisecond, any may come first.
        let mut numbers = Vec::new();
        while let Some(task) = pop(&mut client, &queue).await {
            numbers.push(text(&task).parse::<usize>().unwrap());
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (0..450).filter(|number| *number != 7).collect::<Vec<_>>());
        assert_eq!(counts(&mut client, &queue).await.dead, 0);
    }

    /// A scheduled, unique task that fails, backs off, dies and is redriven, while the server is killed at each step.
    async fn a_life_with_kills(backend) {
        let server = backend.start(&["--max-failures", "2"]).await;
        let queue = unique_queue("life");
        let task = NewTask {
            priority: 4,
            delay: span(Duration::from_millis(500)),
            ttl: span(Duration::from_secs(3_600)),
            unique_key: "only".to_owned(),
            ..json("1")
        };
        let id = insert(&mut server.client().await, &queue, vec![task.clone()]).await.remove(0).id;
        for failures in 0..2 {
            kill(&server, backend).await;
            let mut client = server.client().await;
            assert!(insert(&mut client, &queue, vec![task.clone()]).await[0].duplicate);
            let popped = pop_waiting(&mut client, &queue).await;
            assert_eq!((popped.id.as_str(), popped.failures, popped.priority), (id.as_str(), failures, 4));
            kill(&server, backend).await;
            let mut client = server.client().await;
            let failed = PutbackTokens { failed: true, reason: "x".to_owned(), ..tokens(&popped.lease_token) };
            let answer = put_back(&mut client, &queue, failed).await;
            assert_eq!(answer.put_back + answer.dead_lettered, 1);
        }
        kill(&server, backend).await;
        let mut client = server.client().await;
        let info = task_info(&mut client, &queue, &id).await;
        assert_eq!((info.state(), cause(&info), info.last_error.as_str()), (TaskState::Dead, DeadLetterCause::MaxFailures, "x"));
        let other = insert(&mut client, &queue, vec![task.clone()]).await.remove(0);
        assert!(!other.duplicate, "a dead letter holds its key");
        let redrive = || RedriveTasksRequest { queue: queue.clone(), selection: Some(Selection::MaxTasks(0)) };
        assert_eq!(client.admin.redrive_tasks(redrive()).await.unwrap().into_inner().duplicates, 1);
        let popped = pop_waiting(&mut client, &queue).await;
        assert_eq!(popped.id, other.id);
        ack(&mut client, &queue, &popped.lease_token).await;
        assert_eq!(client.admin.redrive_tasks(redrive()).await.unwrap().into_inner().redriven, 1);
        kill(&server, backend).await;
        let mut client = server.client().await;
        let popped = pop_waiting(&mut client, &queue).await;
        assert_eq!((popped.id, popped.failures, popped.deliveries), (id, 0, 3));
        ack(&mut client, &queue, &popped.lease_token).await;
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.inserted, counted.acked), (2, 2));
    }
}

fn tokens(token: &str) -> PutbackTokens {
    PutbackTokens { lease_tokens: vec![token.to_owned()], ..PutbackTokens::default() }
}

/// What is in memory would be gone.
async fn kill(server: &Server, backend: Backend) {
    if backend != Backend::Memory {
        server.restart().await;
    }
}
