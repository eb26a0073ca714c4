//! The administration service: requests into calls, answers into messages.

use std::time::Duration;

use data_queue_proto::v1::{self, queue_admin_server::QueueAdmin};
use tonic::{Request, Response, Status};

use super::service::duration;
use crate::{
    config::Config,
    queue::{MAX_BATCH, MAX_DELAY, MAX_LEASE, MAX_POP_BATCH, MAX_WAIT, MIN_LEASE, Queues},
    store::{Counts, Millis, QueueName, Survives},
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
        let counted = self.queues.count(&request.into_inner().queue).await?;
        Ok(Response::new(v1::GetQueueResponse { queue: Some(queue(counted)) }))
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

fn queue((name, counts): (QueueName, Counts)) -> v1::Queue {
    let Counts { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, oldest_ready } = counts;
    let oldest_ready_age = oldest_ready.map(duration);
    let counts =
        v1::QueueCounts { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, oldest_ready_age };
    v1::Queue { name: name.as_str().to_owned(), counts: Some(counts) }
}
