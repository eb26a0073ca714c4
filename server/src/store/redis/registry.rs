//! The registry of the names of all queues, which the reapers of all servers go through.

use std::time::{Duration, Instant};

use bb8_redis::redis::cmd;

use super::{Unspread, answer::from_value, keys::REGISTRY_PARTS};
use crate::store::{QueueName, ReapCursor, StoreError};

/// Of the time for a call, what a name in a cluster may take before the insert.
const REGISTER_PART: u32 = 8;

/// How many queues this process remembers to have registered.
const REGISTERED_MAX: usize = 100_000;

/// A name without keys leaves the registry when it was seen so for this long: a server that registered it may be just
/// about to insert. Should it insert later still, its insert finds that it made the queue and registers it again.
const FORGET_NAME_AFTER: Duration = Duration::from_secs(60);

impl Unspread {
    /// Enters the queue in the registry, so that the reapers of all servers find it.
    pub(super) async fn register(&self, queue: &QueueName) -> Result<(), StoreError> {
        let queue = queue.whole();
        let key = self.shared.keys.registry_of(&queue);
        let mut add = cmd("SADD");
        add.arg(&key).arg(queue.as_str());
        self.links.run(&self.shared.keyed(&key, add)).await?;
        self.shared.known(|known| {
            if known.registered.len() >= REGISTERED_MAX {
                known.registered.clear();
            }
            known.registered.insert(queue);
        });
        Ok(())
    }

    pub(super) async fn register_before_insert(&self, queue: &QueueName) -> Result<(), StoreError> {
        let queue = &queue.whole();
        let is_registered = self.shared.known(|known| known.registered.contains(queue) || known.owed.contains(queue));
        if is_registered {
            return Ok(());
        }
        if !self.shared.nodes.is_cluster() {
            return self.register(queue).await;
        }
        // The names are on other nodes than the queue, which must not keep it from being used. They get it later.
        let limit = self.shared.timeout / REGISTER_PART;
        match tokio::time::timeout(limit, self.register(queue)).await {
            Ok(Err(StoreError::Unavailable { .. })) | Err(_) => {
                self.shared.known(|known| {
                    if known.owed.len() < REGISTERED_MAX {
                        known.owed.insert(queue.clone());
                    }
                });
                Ok(())
            }
            Ok(registered) => registered,
        }
    }

    /// Registers the queues whose names no node took when they were used first.
    pub(super) async fn register_owed(&self) {
        for queue in self.shared.known(|known| known.owed.iter().cloned().collect::<Vec<_>>()) {
            if self.register(&queue).await.is_err() {
                return;
            }
            self.shared.known(|known| known.owed.remove(&queue));
        }
    }

    /// The tasks are in, so this must not fail the call that made the queue; whoever inserts next does it again, also where
    /// this one was cut off.
    pub(super) async fn register_made(&self, queue: &QueueName) {
        self.shared.known(|known| known.registered.remove(&queue.whole()));
        if let Err(error) = self.register(queue).await {
            tracing::warn!(%error, ?queue, "could not register the queue again after its first insert");
        }
    }

    /// A call that may have made the queue, and is not known to have: its name may be missing, so it is registered before the next one.
    pub(super) fn doubt<T>(&self, queue: &QueueName, done: Result<T, StoreError>) -> Result<T, StoreError> {
        if matches!(done, Err(StoreError::Unavailable { did_not_run: false, .. })) {
            self.shared.known(|known| known.registered.remove(&queue.whole()));
        }
        done
    }

    pub(super) async fn registered_in(
        &self,
        cursor: ReapCursor,
        budget: usize,
    ) -> Result<(ReapCursor, Vec<QueueName>), StoreError> {
        let key = self.shared.keys.registry(cursor.part);
        let mut scan = cmd("SSCAN");
        scan.arg(&key).arg(cursor.position).arg("COUNT").arg(budget);
        let (position, names): (u64, Vec<String>) = match self.links.run(&self.shared.keyed(&key, scan)).await {
            Ok(names) => from_value(&names)?,
            // A node that is away must not keep the queues of others waiting.
            Err(StoreError::Unavailable { .. }) if self.shared.nodes.is_cluster() => (0, Vec::new()),
            Err(error) => return Err(error),
        };
        let next = match position {
            0 => ReapCursor { part: (cursor.part + 1) % REGISTRY_PARTS, position: 0 },
            position => ReapCursor { position, ..cursor },
        };
        Ok((next, names.iter().filter_map(|name| QueueName::parse(name).ok()).collect()))
    }

    /// Drops a name from the registry when it had no keys for long enough.
    pub(super) async fn forget_unless_new(&self, queue: &QueueName) -> Result<(), StoreError> {
        let since = self.shared.known(|known| *known.without_keys.entry(queue.clone()).or_insert_with(Instant::now));
        if since.elapsed() < FORGET_NAME_AFTER {
            return Ok(());
        }
        self.unregister(queue).await
    }

    /// Drops the name of a queue that is not there. It comes back unless the queue is known to have stayed away: a name too many
    /// is forgotten in its time, and a queue without a name is found by nobody.
    pub(super) async fn unregister(&self, queue: &QueueName) -> Result<(), StoreError> {
        self.shared.known(|known| {
            known.without_keys.remove(queue);
            known.registered.remove(queue);
        });
        let key = self.shared.keys.registry_of(queue);
        let mut remove = cmd("SREM");
        remove.arg(&key).arg(queue.as_str());
        let remove = self.shared.keyed(&key, remove);
        let removing = async {
            self.links.run(&remove).await?;
            // Another server may have made the queue since, and registered it before the name went.
            Ok(self.look_once(queue, 0).await?.exists)
        };
        match removing.await {
            Ok(false) => Ok(()),
            Ok(true) => self.register(queue).await,
            Err(error) => self.register(queue).await.and(Err(error)),
        }
    }
}
