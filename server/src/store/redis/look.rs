//! Looks at queues: what their time has come for is done, and what they have is told.

use std::collections::BTreeMap;

use bb8_redis::redis::Value;
use futures_util::future;

use super::{
    Unspread,
    answer::from_value,
    link::is_elsewhere,
    nodes::Node,
    script::{self, Together},
};
use crate::store::{Millis, QueueName, Sight, StoreError};

impl Unspread {
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
        let look = |queue: &QueueName| self.call(&script::LOOK, queue).arg(announce);
        // What one node has, in one write.
        let mut by_node: BTreeMap<Node, Vec<usize>> = BTreeMap::new();
        for (at, queue) in queues.iter().enumerate() {
            by_node.entry(self.shared.owner(queue)).or_default().push(at);
        }
        let asked = future::join_all(by_node.into_values().map(async |of_node| {
            let together = Together(of_node.iter().map(|at| look(&queues[*at])).collect());
            (of_node, self.links.run(&together).await)
        }));
        let mut looks: Vec<Option<Look>> = queues.iter().map(|_| None).collect();
        for (of_node, answers) in asked.await {
            let answers = match answers {
                Ok(answers) => answers,
                // A node is away, and others are not.
                Err(error @ StoreError::Unavailable { .. }) if self.shared.nodes.is_cluster() => {
                    tracing::debug!(%error, "cannot look at the queues of a node");
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (at, answer) in of_node.into_iter().zip(answers) {
                let queue = &queues[at];
                let look = match answer {
                    Ok(answer) => Look::read(&answer),
                    Err(error) if script::is_unknown_script(&error) => self.look_once(queue, announce).await,
                    // It has moved since.
                    Err(error) if self.shared.nodes.is_cluster() && is_elsewhere(&error) => continue,
                    Err(error) => Err(self.shared.presence.store_error(&error)),
                };
                looks[at] = unless_broken(queue, look)?;
            }
        }
        Ok(looks)
    }
}

/// What a look tells.
pub(super) struct Look {
    pub(super) sight: Sight,
    pub(super) more: bool,
    pub(super) exists: bool,
    /// Of the settings.
    pub(super) generation: u64,
}

impl Look {
    /// As `look.lua` answers.
    fn read(answer: &Value) -> Result<Self, StoreError> {
        type Answer = (u64, i64, u64, bool, bool, u64);
        let (ready, due_in, reclaimed, more, exists, generation): Answer = from_value(answer)?;
        let sight = Sight { ready, due_in: u64::try_from(due_in).ok(), reclaimed };
        Ok(Self { sight, more, exists, generation })
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
