//! Reads a file into the index, and checks on the way that its tables belong together.

mod tasks;

use std::collections::{BTreeMap, HashMap};

use rusqlite::Connection;

use super::{
    file::{self, OpenError},
    memories::{Generation, Kind, Sweeper},
    producers::Producer,
    queue::{Ever, Queue},
    requests::request_digest,
    tables::Sql,
    turn::Withdrawn,
};
use crate::store::{Millis, MintedState, QueueName, Rules, Setting, Token};

/// Everything that is known of a file's queues.
pub(super) struct Index {
    pub(super) queues: BTreeMap<QueueName, Queue>,
    pub(super) next_task: i64,
    pub(super) next_producer: i64,
    pub(super) sweeper: Sweeper,
    /// Not in the file: when it is opened, no pop is under way.
    pub(super) withdrawn: Withdrawn,
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
    let mut dropped: HashMap<i64, Vec<i64>> = HashMap::new();
    let has_life = file::version(connection)? >= file::WITH_LIFE;
    let of_life = if has_life { "expired, deleted, purged, dropped" } else { "0, 0, 0, 0" };
    // By name, so that damage to the index of the names is seen now and not with the next new queue.
    each(connection, &format!("SELECT key, name, inserted, acked, {of_life} FROM queues ORDER BY name"), |row| {
        let (key, name): (i64, String) = (row.get(0)?, row.get(1)?);
        if row.get(7)? {
            dropped.insert(key, Vec::new());
            return Ok(());
        }
        let mut queue = Queue::new(rules);
        queue.key = key;
        queue.ever = Ever {
            inserted: number(row, 2)?,
            acked: number(row, 3)?,
            expired: number(row, 4)?,
            deleted: number(row, 5)?,
            purged: number(row, 6)?,
        };
        names.insert(key, name);
        queues.insert(key, queue);
        Ok(())
    })?;
    if has_life {
        settings(connection, &mut queues)?;
    }
    let next_task = tasks::load(connection, &mut queues, &mut dropped, opened)?;
    let mut sweeper = Sweeper::default();
    memories(connection, &mut queues, &mut sweeper)?;
    let next_producer = match file::version(connection)? >= file::WITH_STREAMS {
        true => producers(connection, &mut queues, &mut sweeper)?,
        false => 1,
    };
    dropped.into_iter().for_each(|(key, tasks)| sweeper.drop_queue(key, tasks));

    let mut index = Index { queues: BTreeMap::new(), next_task, next_producer, sweeper, withdrawn: HashMap::new() };
    for (key, queue) in queues {
        let name = names.remove(&key).unwrap_or_default();
        if !queue.balances() {
            return Err(damaged(format!(
                "the tasks of queue {name:?} are not those that were inserted and are not gone"
            )));
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

/// Settings of a newer server are left as they are.
fn settings(connection: &Connection, queues: &mut HashMap<i64, Queue>) -> Sql<()> {
    each(connection, "SELECT queue, name, value FROM settings", |row| {
        let name = row.get_ref(1)?.as_str()?;
        let setting = Setting::ALL.into_iter().find(|setting| setting.name() == name);
        if let (Some(queue), Some(setting)) = (queues.get_mut(&row.get(0)?), setting) {
            queue.set(setting, Some(row.get::<_, i64>(2)?.cast_unsigned()));
        }
        Ok(())
    })
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
    // What is left is of queues that were dropped.
    acked.iter().for_each(|((queue, _), generation)| sweeper.drop_generation(*queue, Kind::Acked, generation));
    requests.iter().for_each(|((queue, _), generation)| sweeper.drop_generation(*queue, Kind::Requests, generation));
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
