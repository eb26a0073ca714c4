//! Looks at queues: what their time has come for is done, and what they have is told.

use bb8_redis::redis::Value;

use super::{
    RedisStore,
    answer::from_value,
    script::{self, Together},
};
use crate::store::{Millis, QueueName, Sight, StoreError};

impl RedisStore {
    pub(super) async fn look_once(&self, queue: &QueueName, announce: Millis) -> Result<Look, StoreError> {
        Look::read(&self.run(self.call(&script::LOOK, queue).arg(announce)).await?)
    }

    /// The queues that can be read, many in one call.
    pub(super) async fn look_at_all(
        &self,
        queues: &[QueueName],
        announce: Millis,
    ) -> Result<Vec<Option<Look>>, StoreError> {
        if queues.is_empty() {
            return Ok(Vec::new());
        }
        let calls = queues.iter().map(|queue| self.call(&script::LOOK, queue).arg(announce)).collect();
        let answers = self.link.run(&Together(calls)).await?;
        let mut looks = Vec::with_capacity(queues.len());
        for (queue, answer) in queues.iter().zip(answers) {
            let look = match answer {
                Ok(answer) => Look::read(&answer),
                Err(error) if script::is_unknown_script(&error) => self.look_once(queue, announce).await,
                // Its node is away, and those of others are not.
                Err(error) if self.shared.route.address().is_cluster() => {
                    tracing::debug!(?queue, %error, "cannot look at a queue");
                    looks.push(None);
                    continue;
                }
                Err(error) => Err(self.shared.presence.store_error(&error)),
            };
            looks.push(unless_broken(queue, look)?);
        }
        Ok(looks)
    }
}

/// What a look tells.
pub(super) struct Look {
    pub(super) sight: Sight,
    pub(super) more: bool,
    pub(super) exists: bool,
}

impl Look {
    /// As `look.lua` answers.
    fn read(answer: &Value) -> Result<Self, StoreError> {
        let (ready, due_in, reclaimed, more, exists): (u64, i64, u64, bool, bool) = from_value(answer)?;
        Ok(Self { sight: Sight { ready, due_in: u64::try_from(due_in).ok(), reclaimed }, more, exists })
    }
}

/// A queue whose data cannot be read must not keep others from being looked at. Who uses it hears of it, and the log does
/// then; nothing here.
pub(super) fn unless_broken<T>(queue: &QueueName, seen: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match seen {
        Err(StoreError::Broken(cause)) => {
            tracing::debug!(?queue, cause, "cannot look at a queue");
            Ok(None)
        }
        other => other.map(Some),
    }
}
