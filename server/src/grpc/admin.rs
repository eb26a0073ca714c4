//! The administration service: requests into calls, answers into messages.

mod settings;
mod tasks;

use std::{pin::Pin, time::Duration};

use data_queue_proto::v1::{self, queue_admin_server::QueueAdmin, redrive_tasks_request::Selection};
use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::service::{self, duration};
use crate::{
    config::Config,
    queue::{
        Activity, MAX_BATCH, MAX_DELAY, MAX_LEASE, MAX_POP_BATCH, MAX_WAIT, MIN_LEASE, Queues, Redrive, RedriveDone,
    },
    store::{Counts, Millis, QueueName, State, Survives},
};

/// The calls of operators.
pub struct QueueAdminService {
    queues: Queues,
    limits: v1::ServerLimits,
}

impl QueueAdminService {
    /// Administers these queues, and tells the settings.
    pub fn new(queues: Queues, config: &Config) -> Self {
        Self { queues, limits: limits(config) }
    }
}

fn limits(config: &Config) -> v1::ServerLimits {
    let rules = config.rules();
    v1::ServerLimits {
        max_value_bytes: config.max_value as u64,
        max_message_bytes: config.max_message as u64,
        max_batch: MAX_BATCH as u32,
        max_pop_batch: MAX_POP_BATCH,
        default_lease: Some(span(config.default_lease)),
        min_lease: Some(span(MIN_LEASE)),
        max_lease: Some(span(MAX_LEASE)),
        max_wait: Some(span(MAX_WAIT)),
        max_expiries: rules.max_expiries,
        max_failures: rules.max_failures,
        backoff_min: Some(duration(rules.backoff.min)),
        backoff_max: Some(duration(rules.backoff.max)),
        max_delay: Some(span(MAX_DELAY)),
        memory_window: Some(duration(rules.remember.window)),
        memory_entries: rules.remember.entries,
    }
}

/// Settings are no longer than a day.
fn span(time: Duration) -> prost_types::Duration {
    duration(time.as_millis() as Millis)
}

#[tonic::async_trait]
impl QueueAdmin for QueueAdminService {
    async fn get_queue(&self, request: Request<v1::GetQueueRequest>) -> Result<Response<v1::GetQueueResponse>, Status> {
        let (name, counts, settings) = self.queues.show(&request.into_inner().queue).await?;
        let queue = v1::Queue { settings: Some(settings::message(&settings)), ..queue((name, counts)) };
        Ok(Response::new(v1::GetQueueResponse { queue: Some(queue) }))
    }

    async fn list_queues(
        &self,
        request: Request<v1::ListQueuesRequest>,
    ) -> Result<Response<v1::ListQueuesResponse>, Status> {
        let request = request.into_inner();
        let page = self.queues.list(request.page_size, &request.page_token).await?;
        let queues = page.queues.into_iter().map(queue).collect();
        Ok(Response::new(v1::ListQueuesResponse { queues, next_page_token: page.next_page_token }))
    }

    async fn update_queue(
        &self,
        request: Request<v1::UpdateQueueRequest>,
    ) -> Result<Response<v1::UpdateQueueResponse>, Status> {
        let request = request.into_inner();
        let mask = request.update_mask.unwrap_or_default();
        let changes = settings::changes(&request.settings.unwrap_or_default(), &mask.paths)?;
        let settings = self.queues.update(&request.queue, &changes).await?;
        Ok(Response::new(v1::UpdateQueueResponse { settings: Some(settings::message(&settings)) }))
    }

    async fn delete_queue(
        &self,
        request: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        let request = request.into_inner();
        self.queues.delete_queue(&request.queue, request.force).await?;
        Ok(Response::new(v1::DeleteQueueResponse {}))
    }

    async fn purge_queue(
        &self,
        request: Request<v1::PurgeQueueRequest>,
    ) -> Result<Response<v1::PurgeQueueResponse>, Status> {
        let request = request.into_inner();
        let states: Vec<Option<State>> = request.states.iter().map(|state| tasks::state(*state)).collect();
        let purged = self.queues.purge(&request.queue, &states).await?;
        Ok(Response::new(v1::PurgeQueueResponse { purged }))
    }

    async fn pause_queue(
        &self,
        request: Request<v1::PauseQueueRequest>,
    ) -> Result<Response<v1::PauseQueueResponse>, Status> {
        self.queues.pause(&request.into_inner().queue).await?;
        Ok(Response::new(v1::PauseQueueResponse {}))
    }

    async fn resume_queue(
        &self,
        request: Request<v1::ResumeQueueRequest>,
    ) -> Result<Response<v1::ResumeQueueResponse>, Status> {
        self.queues.resume(&request.into_inner().queue).await?;
        Ok(Response::new(v1::ResumeQueueResponse {}))
    }

    async fn list_tasks(
        &self,
        request: Request<v1::ListTasksRequest>,
    ) -> Result<Response<v1::ListTasksResponse>, Status> {
        let v1::ListTasksRequest { queue, state, page_size, page_token } = request.into_inner();
        let page = self.queues.list_tasks(&queue, tasks::state(state), page_size, &page_token).await?;
        let tasks = page.tasks.into_iter().map(|task| tasks::info(&queue, task)).collect();
        Ok(Response::new(v1::ListTasksResponse { tasks, next_page_token: page.next_page_token }))
    }

    async fn get_task(&self, request: Request<v1::GetTaskRequest>) -> Result<Response<v1::GetTaskResponse>, Status> {
        let v1::GetTaskRequest { queue, id } = request.into_inner();
        let task = self.queues.show_task(&queue, &id).await?;
        Ok(Response::new(v1::GetTaskResponse { task: Some(tasks::info(&queue, task)) }))
    }

    async fn delete_tasks(
        &self,
        request: Request<v1::DeleteTasksRequest>,
    ) -> Result<Response<v1::DeleteTasksResponse>, Status> {
        let request = request.into_inner();
        let deleted = self.queues.delete_tasks(&request.queue, &request.ids).await?;
        Ok(Response::new(v1::DeleteTasksResponse { outcomes: deleted.into_iter().map(tasks::deleted).collect() }))
    }

    async fn redrive_tasks(
        &self,
        request: Request<v1::RedriveTasksRequest>,
    ) -> Result<Response<v1::RedriveTasksResponse>, Status> {
        let request = request.into_inner();
        let which = match request.selection {
            Some(Selection::Ids(ids)) => Redrive::Ids(ids.ids),
            Some(Selection::MaxTasks(max)) => Redrive::Oldest(max),
            None => return Err(Queues::nothing_to_redrive(&request.queue).into()),
        };
        let RedriveDone { outcomes, redriven, duplicates } = self.queues.redrive(&request.queue, which).await?;
        let outcomes = outcomes.into_iter().map(tasks::redriven).collect();
        Ok(Response::new(v1::RedriveTasksResponse { outcomes, redriven, duplicates }))
    }

    async fn import_tasks(
        &self,
        request: Request<v1::ImportTasksRequest>,
    ) -> Result<Response<v1::ImportTasksResponse>, Status> {
        let request = request.into_inner();
        let tasks = request.tasks.into_iter().map(tasks::import).collect();
        let imported = self.queues.import(&request.queue, tasks).await?;
        Ok(Response::new(v1::ImportTasksResponse { results: imported.iter().map(tasks::imported).collect() }))
    }

    type WatchQueuesStream = Pin<Box<dyn Stream<Item = Result<v1::WatchQueuesResponse, Status>> + Send>>;

    async fn watch_queues(
        &self,
        request: Request<v1::WatchQueuesRequest>,
    ) -> Result<Response<Self::WatchQueuesStream>, Status> {
        let request = request.into_inner();
        let looks = self.queues.watch(&request.queues, request.interval.map(service::span))?;
        let message = |activities: Vec<Activity>| v1::WatchQueuesResponse {
            queues: activities.into_iter().map(activity).collect(),
        };
        let messages = looks.map(move |look| Ok(message(look?)));
        Ok(Response::new(Box::pin(messages) as Self::WatchQueuesStream))
    }

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let store = self.queues.describe_store();
        let survives = match store.survives {
            Survives::Nothing => v1::Survival::Nothing,
            Survives::ServerKill => v1::Survival::ServerKill,
            Survives::PowerCut => v1::Survival::PowerCut,
        };
        Ok(Response::new(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store: store.engine,
            survives: survives as i32,
            survives_note: store.note,
            limits: Some(self.limits),
        }))
    }
}

fn activity(activity: Activity) -> v1::QueueActivity {
    let Activity { queue, counts, inserted_per_second, acked_per_second } = activity;
    let counts = Some(queue_counts(counts));
    v1::QueueActivity { queue: queue.as_str().to_owned(), counts, inserted_per_second, acked_per_second }
}

fn queue((name, counts): (QueueName, Counts)) -> v1::Queue {
    v1::Queue { name: name.as_str().to_owned(), counts: Some(queue_counts(counts)), settings: None }
}

fn queue_counts(counts: Counts) -> v1::QueueCounts {
    v1::QueueCounts {
        ready: counts.ready,
        scheduled: counts.scheduled,
        leased: counts.leased,
        dead: counts.dead,
        inserted: counts.inserted,
        acked: counts.acked,
        expired: counts.expired,
        deleted: counts.deleted,
        purged: counts.purged,
        oldest_ready_age: counts.oldest_ready.map(duration),
        paused: counts.paused,
    }
}
