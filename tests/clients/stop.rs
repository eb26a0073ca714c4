//! Workers that are stopped while they work, and whose server is killed.

use std::collections::{BTreeMap, BTreeSet};

use data_queue_proto::v1::{InsertRequest, NewTask, PopRequest, QueueCounts, Task, new_task};
use prost_types::Duration;

use super::program::{Language, Running, for_every_client};
use crate::support::{
    PATIENCE,
    call::get_queue_request,
    poll_until,
    server::{Client, Server},
    unique_queue,
};

const TASKS: u64 = 400;

/// What the lines of a worker tell.
#[derive(Debug, Default)]
struct Told {
    /// Of each token, the task.
    delivered: BTreeMap<String, String>,
    acked: BTreeSet<String>,
    /// It said that it has stopped.
    stopped: bool,
}

impl Told {
    /// Takes down a line. Each task is acked once at the most, under a token that was delivered, and no token is delivered twice.
    fn take(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["delivered", id, token, _] => {
                assert_eq!(self.delivered.insert(token.into(), id.into()), None, "delivered twice: {line}");
            }
            ["acked", id, token] => {
                assert_eq!(self.delivered.get(token).map(String::as_str), Some(id), "not delivered: {line}");
                assert!(self.acked.insert(id.into()), "acked twice: {line}");
            }
            ["lost", _, _] => {}
            ["stopped"] => self.stopped = true,
            _ => panic!("no line of a worker: {line}"),
        }
    }
}

struct Work {
    server: Server,
    client: Client,
    queue: String,
    told: Told,
}

impl Work {
    async fn start(server: Server) -> Self {
        let mut work =
            Self { client: server.client().await, server, queue: unique_queue("stop"), told: Told::default() };
        let task =
            |number: u64| NewTask { value: Some(new_task::Value::Json(number.to_string())), ..NewTask::default() };
        let queue = work.queue.clone();
        let insert = InsertRequest { queue, tasks: (0..TASKS).map(task).collect(), ..InsertRequest::default() };
        work.client.insert(insert).await.unwrap();
        work
    }

    fn worker(&self, language: Language, flags: &[&str]) -> Running {
        let address = self.server.address().to_string();
        Running::start(language, &[&["work", "--addr", &address, "--queue", &self.queue], flags].concat())
    }

    /// Takes down lines until the worker has said so many of a kind.
    async fn listen(&mut self, worker: &mut Running, count: usize, kind: impl Fn(&Told) -> usize) {
        while kind(&self.told) < count {
            let line = worker.line().await.unwrap_or_else(|| panic!("ended after {:#?}", worker.said()));
            self.told.take(&line);
        }
    }

    /// Stops the worker, and takes down what it still says.
    async fn stop(&mut self, mut worker: Running) {
        worker.terminate();
        while let Some(line) = worker.line().await {
            self.told.take(&line);
        }
        let status = worker.ended().await;
        assert!(status.success() && std::mem::take(&mut self.told.stopped), "{status}, {:#?}", worker.said());
    }

    async fn counts(&mut self) -> QueueCounts {
        let answer = self.client.admin.get_queue(get_queue_request(&self.queue)).await.unwrap().into_inner();
        answer.queue.unwrap().counts.unwrap()
    }

    async fn pop(&mut self) -> Task {
        let wait = Some(Duration { seconds: 10, nanos: 0 });
        let pop = PopRequest { queue: self.queue.clone(), wait, ..PopRequest::default() };
        self.client.pop(pop).await.unwrap().into_inner().task.expect("a task")
    }
}

for_every_client! {
    /// A worker that is stopped finishes what it does and gives back the rest; one whose server is killed goes on. In the end each
    /// task is acked once.
    async fn nothing_is_lost_when_workers_stop_and_servers_die(language, backend) {
        let mut work = Work::start(backend.start(&[]).await).await;
        let mut worker = work.worker(language, &["--concurrency", "8", "--fail-every", "10", "--hold", "5"]);
        work.listen(&mut worker, 100, |told| told.acked.len()).await;
        work.stop(worker).await;
        let counts = work.counts().await;
        assert_eq!(counts.acked as usize, work.told.acked.len(), "an ack was not told, or not made: {counts:?}");
        assert_eq!((counts.leased, counts.dead), (0, 0), "{counts:?}");
        assert_eq!(counts.acked + counts.ready + counts.scheduled, TASKS, "{counts:?}");

        let mut worker = work.worker(language, &["--concurrency", "8", "--fail-every", "10", "--hold", "5"]);
        let acked = work.told.acked.len();
        work.listen(&mut worker, acked + 30, |told| told.acked.len()).await;
        work.server.restart().await;
        work.client = work.server.client().await;
        work.listen(&mut worker, TASKS as usize, |told| told.acked.len()).await;
        work.stop(worker).await;
        let counts = work.counts().await;
        assert_eq!((counts.acked, counts.ready + counts.scheduled + counts.leased + counts.dead), (TASKS, 0));
    }

    /// What a worker cannot finish in its grace period it gives back at once, neither acked nor as a failure.
    async fn what_is_not_finished_in_time_goes_back(language, backend) {
        let mut work = Work::start(backend.start(&[]).await).await;
        let mut worker = work.worker(language, &["--concurrency", "4", "--hold", "600000", "--grace", "200"]);
        work.listen(&mut worker, 4, |told| told.delivered.len()).await;
        work.stop(worker).await;
        let back = poll_until("all tasks to be back", PATIENCE, async || {
            let counts = work.client.admin.clone().get_queue(get_queue_request(&work.queue)).await.unwrap();
            let counts = counts.into_inner().queue.unwrap().counts.unwrap();
            (counts.ready == TASKS).then_some(counts)
        });
        assert_eq!(back.await.acked, 0);
        for _ in 0..4 {
            let task = work.pop().await;
            assert_eq!((task.failures, task.expiries), (0, 0), "{task:?}");
        }
    }
}
