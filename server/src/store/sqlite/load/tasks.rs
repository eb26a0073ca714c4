//! Reads tasks, and what the other tables know of them.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use rusqlite::Connection;

use super::{OpenError, damaged, each, file, number};
use crate::store::{
    Millis, MintedMap, MintedState, SessionId, TaskId, Token,
    holders::Holders,
    sqlite::{
        queue::{Lease, Planned, Queue},
        tables::{Sql, Tries, holders_from_bytes},
    },
};

struct Stored {
    token: Token,
    order: u64,
    renewed_at: Millis,
    deadline: Millis,
    length: Millis,
    holders: Vec<u8>,
    session: Option<SessionId>,
}

impl Stored {
    fn lease(self, id: TaskId, task: i64, size: u64, opened: Option<Millis>) -> Lease {
        let Self { order, renewed_at, deadline, length, holders, session, .. } = self;
        let again = opened.filter(|opened| renewed_at < *opened).map_or(0, |opened| opened + length);
        let (deadline, holders) = (deadline.max(again), Holders::new(holders_from_bytes(&holders)));
        Lease { id, task, size, order, renewed_at, deadline, length, holders, session }
    }
}

type Keyed<T> = MintedMap<i64, T>;

/// What the other tables know, by the keys of the tasks.
#[derive(Default)]
struct Known {
    leases: Keyed<Stored>,
    tries: Keyed<Tries>,
    plans: Keyed<Planned>,
    /// When they fall due, and their places.
    scheduled: Keyed<(Millis, i64)>,
    /// When they died.
    dead: Keyed<Millis>,
    errors: HashSet<i64, MintedState>,
    cancelled: HashSet<i64, MintedState>,
    /// The highest place.
    last: i64,
}

impl Known {
    fn read(connection: &Connection) -> Result<Self, OpenError> {
        let mut known = Self::default();
        let version = file::version(connection)?;
        known.read_leases(connection, version >= file::WITH_STREAMS)?;
        if version >= file::WITH_LIFE {
            known.read_life(connection)?;
        }
        each(connection, "SELECT task, position, deliveries, failures, expiries FROM tries", |row| {
            let (task, position) = (row.get(0)?, row.get(1)?);
            let (deliveries, failures, expiries) = (row.get(2)?, row.get(3)?, row.get(4)?);
            let has_error = known.errors.remove(&task);
            known.last = known.last.max(position);
            known.tries.insert(task, Tries { position, deliveries, failures, expiries, has_error });
            Ok(())
        })?;
        each(connection, "SELECT task, died_at FROM dead", |row| {
            known.dead.insert(row.get(0)?, number(row, 1)?);
            Ok(())
        })?;
        Ok(known)
    }

    fn read_leases(&mut self, connection: &Connection, has_streams: bool) -> Sql<()> {
        let of_streams = if has_streams { "length, session" } else { "NULL, NULL" };
        let sql = format!("SELECT task, token, place, renewed_at, deadline, holders, {of_streams} FROM leases");
        each(connection, &sql, |row| {
            let holders = row.get_ref(5)?.as_blob()?.to_vec();
            let (token, order) = (Token(row.get(1)?), number(row, 2)?);
            let (renewed_at, deadline) = (number(row, 3)?, number(row, 4)?);
            let length = match row.get::<_, Option<i64>>(6)? {
                Some(length) => u64::try_from(length).unwrap_or(0),
                None => deadline.saturating_sub(renewed_at),
            };
            let session = row.get::<_, Option<[u8; 16]>>(7)?.map(SessionId);
            self.leases.insert(row.get(0)?, Stored { token, order, renewed_at, deadline, length, holders, session });
            Ok(())
        })
    }

    fn read_life(&mut self, connection: &Connection) -> Sql<()> {
        each(connection, "SELECT task, priority, ends_at, unique_key FROM plans", |row| {
            let ends_at = row.get::<_, Option<i64>>(2)?.map(|at| u64::try_from(at).unwrap_or(0));
            let unique_key = row.get::<_, Option<String>>(3)?.map(Arc::from);
            self.plans.insert(row.get(0)?, Planned { priority: row.get(1)?, ends_at, unique_key });
            Ok(())
        })?;
        each(connection, "SELECT task, due, place FROM scheduled", |row| {
            let place = row.get(2)?;
            self.last = self.last.max(place);
            self.scheduled.insert(row.get(0)?, (number(row, 1)?, place));
            Ok(())
        })?;
        each(connection, "SELECT task FROM errors", |row| {
            self.errors.insert(row.get(0)?);
            Ok(())
        })?;
        each(connection, "SELECT task FROM cancelled", |row| {
            self.cancelled.insert(row.get(0)?);
            Ok(())
        })
    }

    fn forget(&mut self, task: i64) {
        self.leases.remove(&task);
        self.tries.remove(&task);
        self.plans.remove(&task);
        self.scheduled.remove(&task);
        self.dead.remove(&task);
        self.cancelled.remove(&task);
    }

    fn is_empty(&self) -> bool {
        let Self { leases, tries, plans, scheduled, dead, errors, cancelled, .. } = self;
        let tables =
            [leases.len(), tries.len(), plans.len(), scheduled.len(), dead.len(), errors.len(), cancelled.len()];
        tables.iter().all(|left| *left == 0)
    }

    /// Puts a task where it belongs. True if it is ready and stands elsewhere than where its key says.
    fn place(&mut self, queue: &mut Queue, task: i64, id: TaskId, size: u64, opened: Option<Millis>) -> bool {
        queue.ids.insert(id, task);
        queue.bytes += size;
        let (mut priority, mut ends_at, mut unique_key) = (0, None, None);
        if id.has_plan() {
            let plan = self.plans.remove(&task).unwrap_or_default();
            (priority, ends_at, unique_key) = (plan.priority, plan.ends_at, plan.unique_key.clone());
            queue.plans.insert(task, plan);
        }
        let tries = self.tries.remove(&task);
        if let Some(tries) = tries {
            queue.tries.insert(task, tries);
            queue.front = queue.front.min(tries.position);
        }
        if let Some(died_at) = self.dead.remove(&task) {
            queue.bytes -= size;
            queue.dead.insert((died_at, id));
            return false;
        }
        queue.unique.extend(unique_key.map(|key| (key, id)));
        if let Some(stored) = self.leases.remove(&task) {
            queue.delivered = queue.delivered.max(stored.order);
            let token = stored.token;
            queue.load_lease(token, stored.lease(id, task, size, opened), opened.unwrap_or_default());
            if self.cancelled.remove(&task) {
                queue.cancelled.insert(task);
            }
            return false;
        }
        queue.ends.extend(ends_at.map(|at| (at, task)));
        if let Some((due, place)) = self.scheduled.remove(&task) {
            queue.scheduled.insert((due, place, task));
            return false;
        }
        queue.ready.push_back(priority, task);
        tries.is_some()
    }
}

/// Puts all tasks in their queues, and lists those of dropped ones. Answers the number of the next task.
pub(super) fn load(
    connection: &Connection,
    queues: &mut HashMap<i64, Queue>,
    dropped: &mut HashMap<i64, Vec<i64>>,
    opened: Option<Millis>,
) -> Result<i64, OpenError> {
    let mut known = Known::read(connection)?;
    let mut returned: HashSet<i64> = HashSet::new();
    let (mut last, mut strays) = (known.last.max(0), 0_u64);
    each(connection, "SELECT key, queue, id, length(envelope) FROM tasks ORDER BY key", |row| {
        let (task, queue, id): (i64, i64, _) = (row.get(0)?, row.get(1)?, TaskId(row.get(2)?));
        last = last.max(task);
        match queues.get_mut(&queue) {
            Some(of_queue) => {
                if known.place(of_queue, task, id, number(row, 3)?, opened) {
                    returned.insert(queue);
                }
            }
            None => match dropped.get_mut(&queue) {
                Some(tasks) => {
                    known.forget(task);
                    tasks.push(task);
                }
                None => strays += 1,
            },
        }
        Ok(())
    })?;
    for queue in returned {
        if let Some(Queue { ready, tries, .. }) = queues.get_mut(&queue) {
            ready.sort(|task| tries.get(&task).map_or(task, |tries| tries.position));
        }
    }
    if strays > 0 || !known.is_empty() {
        return Err(damaged("some of what it knows of tasks belongs to no task".to_owned()));
    }
    Ok(last.saturating_add(1))
}
