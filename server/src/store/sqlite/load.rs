//! Reads a file into the index, and checks on the way that its tables belong together.

use std::collections::{BTreeMap, HashMap};

use rusqlite::Connection;

use super::{
    file::{self, OpenError},
    memories::{Generation, Kind, Sweeper},
    producers::Producer,
    queue::{Lease, Queue, Withdrawn, request_digest},
    tables::{Sql, Tries, holders_from_bytes},
};
use crate::store::{Millis, MintedState, QueueName, Rules, SessionId, TaskId, Token, holders::Holders};

/// Everything that is known of a file's queues.
pub(super) struct Index {
    pub(super) queues: BTreeMap<QueueName, Queue>,
    pub(super) next_task: i64,
    pub(super) next_producer: i64,
    pub(super) sweeper: Sweeper,
    /// Not in the file: when it is opened, no pop is under way.
    pub(super) withdrawn: Withdrawn,
}

struct Stored {
    token: Token,
    order: u64,
    renewed_at: Millis,
    deadline: Millis,
    length: Millis,
    holders: Vec<u8>,
    session: Option<SessionId>,
}

/// The latest time that the file knows of: the store's clock must not go back behind it.
pub(super) fn latest_time(connection: &Connection) -> Sql<Millis> {
    let sql = "SELECT max(
        (SELECT coalesce(max(renewed_at), 0) FROM leases), (SELECT coalesce(max(began), 0) FROM generations),
        (SELECT coalesce(max(died_at), 0) FROM dead),
        (SELECT coalesce(max(inserted_at), 0) FROM (SELECT inserted_at FROM tasks ORDER BY key DESC LIMIT 1)))";
    connection.query_row(sql, (), |row| number(row, 0))
}

/// `opened`: leases that were renewed before run their full length again from this time on, because whoever holds them
/// could not be heard for a while.
pub(super) fn index(connection: &Connection, rules: Rules, opened: Option<Millis>) -> Result<Index, OpenError> {
    let mut names = HashMap::new();
    let mut queues: HashMap<i64, Queue> = HashMap::new();
    // By name, so that damage to the index of the names is seen now and not with the next new queue.
    each(connection, "SELECT key, name, inserted, acked FROM queues ORDER BY name", |row| {
        let (key, name): (i64, String) = (row.get(0)?, row.get(1)?);
        let counts = (number(row, 2)?, number(row, 3)?);
        let mut queue = Queue::new(rules);
        queue.key = key;
        (queue.inserted_count, queue.acked_count) = counts;
        names.insert(key, name);
        queues.insert(key, queue);
        Ok(())
    })?;
    let next_task = tasks(connection, &mut queues, opened)?;
    let mut sweeper = Sweeper::default();
    memories(connection, &mut queues, &mut sweeper)?;
    let next_producer = match file::version(connection)? >= file::WITH_STREAMS {
        true => producers(connection, &mut queues, &mut sweeper)?,
        false => 1,
    };

    let mut index = Index { queues: BTreeMap::new(), next_task, next_producer, sweeper, withdrawn: HashMap::new() };
    for (key, queue) in queues {
        let name = names.remove(&key).unwrap_or_default();
        if !queue.balances() {
            return Err(damaged(format!("the tasks of queue {name:?} are not those that were inserted and not acked")));
        }
        let name = QueueName::parse(&name).map_err(|error| damaged(format!("the name of queue {name:?} {error}")))?;
        index.queues.insert(name, queue);
    }
    Ok(index)
}

fn damaged(what: String) -> OpenError {
    OpenError::Refused(format!("is damaged: {what}"))
}

fn number(row: &rusqlite::Row<'_>, column: usize) -> Sql<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}

fn each(connection: &Connection, sql: &str, mut take: impl FnMut(&rusqlite::Row<'_>) -> Sql<()>) -> Sql<()> {
    let mut select = connection.prepare(sql)?;
    let mut rows = select.query(())?;
    while let Some(row) = rows.next()? {
        take(row)?;
    }
    Ok(())
}

/// Answers the key of the next task.
fn tasks(connection: &Connection, queues: &mut HashMap<i64, Queue>, opened: Option<Millis>) -> Result<i64, OpenError> {
    let mut leases = HashMap::new();
    let of_streams = match file::version(connection)? >= file::WITH_STREAMS {
        true => "length, session",
        false => "NULL, NULL",
    };
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
        leases.insert(row.get::<_, i64>(0)?, Stored { token, order, renewed_at, deadline, length, holders, session });
        Ok(())
    })?;
    let mut came_back = HashMap::new();
    each(connection, "SELECT task, position, deliveries, failures, expiries FROM tries", |row| {
        let tries = Tries { deliveries: row.get(2)?, failures: row.get(3)?, expiries: row.get(4)? };
        came_back.insert(row.get::<_, i64>(0)?, (row.get::<_, i64>(1)?, tries));
        Ok(())
    })?;
    let mut dead = std::collections::HashSet::new();
    each(connection, "SELECT task FROM dead", |row| {
        dead.insert(row.get::<_, i64>(0)?);
        Ok(())
    })?;

    let mut returned: HashMap<i64, Vec<(i64, i64)>> = HashMap::new();
    let (mut next, mut strays) = (1, 0_u64);
    each(connection, "SELECT key, queue, id FROM tasks ORDER BY key", |row| {
        let (task, queue, id): (i64, i64, _) = (row.get(0)?, row.get(1)?, TaskId(row.get(2)?));
        next = task.saturating_add(1);
        let Some(of_queue) = queues.get_mut(&queue) else {
            strays += 1;
            return Ok(());
        };
        of_queue.ids.insert(id, task);
        let position = came_back.remove(&task).map(|(position, tries)| {
            of_queue.tries.insert(task, tries);
            of_queue.front = of_queue.front.min(position);
            position
        });
        if let Some(stored) = leases.remove(&task) {
            of_queue.delivered = of_queue.delivered.max(stored.order);
            let token = stored.token;
            of_queue.load_lease(token, stored.lease(id, task, opened), opened.unwrap_or_default());
        } else if dead.remove(&task) {
            of_queue.dead += 1;
        } else if let Some(position) = position {
            returned.entry(queue).or_default().push((position, task));
        } else {
            of_queue.ready.push_back(task);
        }
        Ok(())
    })?;
    for (queue, mut tasks) in returned {
        // The lowest position is the head; the tail stands behind all of them.
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        if let Some(queue) = queues.get_mut(&queue) {
            tasks.into_iter().for_each(|(_, task)| queue.ready.push_front(task));
        }
    }
    if strays > 0 || !leases.is_empty() || !came_back.is_empty() || !dead.is_empty() {
        return Err(damaged("some of what it knows of tasks belongs to no task".to_owned()));
    }
    Ok(next)
}

impl Stored {
    fn lease(self, id: TaskId, task: i64, opened: Option<Millis>) -> Lease {
        let Self { order, renewed_at, deadline, length, holders, session, .. } = self;
        let again = opened.filter(|opened| renewed_at < *opened).map_or(0, |opened| opened + length);
        let (deadline, holders) = (deadline.max(again), Holders::new(holders_from_bytes(&holders)));
        Lease { id, task, order, renewed_at, deadline, length, holders, session }
    }
}

fn memories(connection: &Connection, queues: &mut HashMap<i64, Queue>, sweeper: &mut Sweeper) -> Result<(), OpenError> {
    let mut acked: BTreeMap<(i64, i64), Generation<Token, (), MintedState>> = BTreeMap::new();
    let mut requests: BTreeMap<(i64, i64), Generation<[u8; 16], i64>> = BTreeMap::new();
    each(connection, "SELECT queue, memory, number, began FROM generations", |row| {
        let (queue, number, began) = (row.get(0)?, row.get(2)?, self::number(row, 3)?);
        if row.get::<_, i64>(1)? == Kind::Acked as i64 {
            acked.insert((queue, number), Generation { number, began, ..Generation::default() });
        } else {
            requests.insert((queue, number), Generation { number, began, ..Generation::default() });
        }
        Ok(())
    })?;
    each(connection, "SELECT queue, generation, place, tokens FROM acked", |row| {
        let Some(generation) = acked.get_mut(&(row.get(0)?, row.get(1)?)) else { return Ok(()) };
        generation.rows = row.get::<_, i64>(2)? + 1;
        let tokens = row.get_ref(3)?.as_blob()?.as_chunks::<16>().0;
        generation.entries.extend(tokens.iter().map(|token| (Token(*token), ())));
        Ok(())
    })?;
    each(connection, "SELECT queue, generation, place, call, id FROM requests", |row| {
        let Some(generation) = requests.get_mut(&(row.get(0)?, row.get(1)?)) else { return Ok(()) };
        let place = row.get(2)?;
        generation.rows = place + 1;
        generation.entries.insert(request_digest(row.get(3)?, row.get_ref(4)?.as_str()?), place);
        Ok(())
    })?;
    for (key, queue) in queues {
        let of_queue = (*key, i64::MIN)..=(*key, i64::MAX);
        let keys: Vec<_> = acked.range(of_queue.clone()).map(|(key, _)| *key).collect();
        let generations = keys.iter().filter_map(|key| acked.remove(key)).collect();
        queue.acked.restore(generations, *key, sweeper);
        let keys: Vec<_> = requests.range(of_queue).map(|(key, _)| *key).collect();
        let generations = keys.iter().filter_map(|key| requests.remove(key)).collect();
        queue.requests.restore(generations, *key, sweeper);
    }
    Ok(())
}

/// Of each producer, what its last row of answers tells. Answers that belong to nobody are of one that was forgotten.
/// Answers the key of the next producer.
fn producers(connection: &Connection, queues: &mut HashMap<i64, Queue>, sweeper: &mut Sweeper) -> Sql<i64> {
    let known = "SELECT producers.queue, producers.key, producers.id, answers.last, answers.count, answers.inserted_at
        FROM producers JOIN answers ON answers.producer = producers.key
            AND answers.last = (SELECT max(last) FROM answers WHERE producer = producers.key)";
    each(connection, known, |row| {
        let Some(queue) = queues.get_mut(&row.get(0)?) else { return Ok(()) };
        let last = u64::from_be_bytes(row.get(3)?);
        let producer = Producer { key: row.get(1)?, last, count: number(row, 4)?, inserted_at: number(row, 5)? };
        queue.producers.restore(row.get(2)?, producer);
        Ok(())
    })?;
    let forgotten = "SELECT DISTINCT producer FROM answers WHERE producer NOT IN (SELECT key FROM producers)";
    each(connection, forgotten, |row| {
        sweeper.drop_answers(row.get(0)?);
        Ok(())
    })?;
    let last =
        "SELECT max((SELECT coalesce(max(key), 0) FROM producers), (SELECT coalesce(max(producer), 0) FROM answers))";
    connection.query_row(last, (), |row| row.get::<_, i64>(0).map(|last| last.saturating_add(1)))
}
