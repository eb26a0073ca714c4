//! Every statement that runs while the server serves. `migrations/` explains the tables.

use bytes::Bytes;
use rusqlite::{CachedStatement, Connection, Error, OptionalExtension, Params, params};

use super::{
    memories::Kind,
    queue::{Ever, Planned},
};
use crate::store::{Attempt, Cause, Fingerprint, Millis, SessionId, Setting, TaskId, Token};

/// What SQLite answers.
pub(super) type Sql<T> = rusqlite::Result<T>;

/// The tables of an open file.
#[derive(Clone, Copy)]
pub(super) struct Tables<'c>(pub(super) &'c Connection);

/// What never changes of a task.
pub(super) struct StoredTask {
    pub(super) id: TaskId,
    pub(super) inserted_at: Millis,
    pub(super) envelope: Bytes,
}

/// Where a task is, and what its row says but for its value.
pub(super) struct Spot {
    pub(super) id: TaskId,
    /// Of the envelope, in bytes.
    pub(super) size: u64,
    pub(super) at: At,
}

/// Where a task is.
pub(super) enum At {
    Ready,
    /// When it falls due, and its place.
    Scheduled(Millis, i64),
    Leased(Token),
    /// When it died, and why.
    Dead(Millis, Cause),
}

/// A task that came back, or fell due.
#[derive(Clone, Copy, Default)]
pub(super) struct Tries {
    /// Its place when it is ready.
    pub(super) position: i64,
    pub(super) deliveries: u32,
    pub(super) failures: u32,
    pub(super) expiries: u32,
    /// Whether it has a last error.
    pub(super) has_error: bool,
}

/// A row of the memory of requests.
pub(super) struct StoredRequest {
    pub(super) call: u8,
    pub(super) id: String,
    pub(super) fingerprint: Fingerprint,
    /// Ids or tokens.
    pub(super) answered: Vec<[u8; 16]>,
}

/// Numbers in SQLite are signed; none of ours comes near the end of either kind.
pub(super) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn time(number: i64) -> Millis {
    u64::try_from(number).unwrap_or(0)
}

/// As it is kept: see the tables of version 3.
fn cause_to_int(cause: Cause) -> i64 {
    match cause {
        Cause::Failures => 0,
        Cause::Expiries => 1,
        Cause::Rejected => 2,
    }
}

fn cause_from_int(cause: i64) -> Cause {
    match cause {
        0 => Cause::Failures,
        2 => Cause::Rejected,
        _ => Cause::Expiries,
    }
}

fn concat<const N: usize>(parts: impl IntoIterator<Item = [u8; N]>) -> Vec<u8> {
    parts.into_iter().flatten().collect()
}

/// The tries that a lease was answered to, as they are stored.
pub(super) fn holders_to_bytes(holders: &[Attempt]) -> Vec<u8> {
    concat(holders.iter().map(|holder| holder.0))
}

/// The reverse.
pub(super) fn holders_from_bytes(bytes: &[u8]) -> Vec<Attempt> {
    bytes.as_chunks::<8>().0.iter().map(|holder| Attempt(*holder)).collect()
}

/// Adds tasks to a queue, one after the other: what they have in common is given once.
pub(super) struct AddTasks<'c>(CachedStatement<'c>);

impl AddTasks<'_> {
    pub(super) fn add(&mut self, key: i64, id: TaskId, envelope: &[u8]) -> Sql<()> {
        self.0.raw_bind_parameter(3, key)?;
        self.0.raw_bind_parameter(4, id.0)?;
        self.0.raw_bind_parameter(5, envelope)?;
        self.0.raw_execute().map(drop)
    }

    /// When those were inserted that are added from now on.
    pub(super) fn inserted_at(&mut self, time: Millis) -> Sql<()> {
        self.0.raw_bind_parameter(2, int(time))
    }
}

/// What the leases of a pop have in common.
pub(super) struct Hold<'h> {
    pub(super) renewed_at: Millis,
    pub(super) deadline: Millis,
    pub(super) length: Millis,
    pub(super) holders: &'h [Attempt],
    pub(super) session: Option<SessionId>,
}

/// Adds the leases of a pop, one after the other.
pub(super) struct AddLeases<'c>(CachedStatement<'c>);

impl AddLeases<'_> {
    pub(super) fn add(&mut self, task: i64, token: &Token, order: u64) -> Sql<()> {
        self.0.raw_bind_parameter(6, task)?;
        self.0.raw_bind_parameter(7, token.0)?;
        self.0.raw_bind_parameter(8, int(order))?;
        self.0.raw_execute().map(drop)
    }
}

impl<'c> Tables<'c> {
    pub(super) fn add_tasks(&self, queue: i64, now: Millis) -> Sql<AddTasks<'c>> {
        let sql = "INSERT INTO tasks (queue, inserted_at, key, id, envelope) VALUES (?1, ?2, ?3, ?4, ?5)";
        let mut insert = self.0.prepare_cached(sql)?;
        insert.raw_bind_parameter(1, queue)?;
        let mut adding = AddTasks(insert);
        adding.inserted_at(now)?;
        Ok(adding)
    }

    pub(super) fn add_leases(&self, hold: &Hold<'_>) -> Sql<AddLeases<'c>> {
        let sql = "INSERT INTO leases (renewed_at, deadline, length, holders, session, task, token, place)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let mut insert = self.0.prepare_cached(sql)?;
        insert.raw_bind_parameter(1, int(hold.renewed_at))?;
        insert.raw_bind_parameter(2, int(hold.deadline))?;
        insert.raw_bind_parameter(3, int(hold.length))?;
        insert.raw_bind_parameter(4, holders_to_bytes(hold.holders))?;
        insert.raw_bind_parameter(5, hold.session.map(|session| session.0))?;
        Ok(AddLeases(insert))
    }
}

impl Tables<'_> {
    fn run(&self, sql: &'static str, params: impl Params) -> Sql<usize> {
        self.0.prepare_cached(sql)?.execute(params)
    }

    /// Whether a commit waits for the disk.
    pub(super) fn sync_commits(&self, syncs: bool) -> Sql<()> {
        let sql = if syncs { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
        self.run(sql, ()).map(drop)
    }

    pub(super) fn begin(&self) -> Sql<()> {
        self.run("BEGIN", ()).map(drop)
    }

    pub(super) fn commit(&self) -> Sql<()> {
        self.run("COMMIT", ()).map(drop)
    }

    /// How many pages of the file are free to be used again.
    pub(super) fn free_pages(&self) -> Sql<u64> {
        self.0.prepare_cached("PRAGMA freelist_count")?.query_row((), |row| row.get(0).map(time))
    }

    pub(super) fn add_queue(&self, name: &str) -> Sql<i64> {
        self.run("INSERT INTO queues (name, inserted, acked) VALUES (?1, 0, 0)", [name])?;
        Ok(self.0.last_insert_rowid())
    }

    pub(super) fn save_counts(&self, queue: i64, ever: Ever) -> Sql<()> {
        let sql = "UPDATE queues SET inserted = ?2, acked = ?3, expired = ?4, deleted = ?5, purged = ?6 WHERE key = ?1";
        let Ever { inserted, acked, expired, deleted, purged } = ever;
        self.run(sql, params![queue, int(inserted), int(acked), int(expired), int(deleted), int(purged)]).map(drop)
    }

    /// Frees its name. Its tasks are swept later.
    pub(super) fn drop_queue(&self, queue: i64) -> Sql<()> {
        self.run("UPDATE queues SET dropped = 1, name = '#' || key WHERE key = ?1", [queue])?;
        self.run("DELETE FROM settings WHERE queue = ?1", [queue])?;
        self.run("DELETE FROM producers WHERE queue = ?1", [queue]).map(drop)
    }

    pub(super) fn remove_queue(&self, queue: i64) -> Sql<()> {
        self.run("DELETE FROM queues WHERE key = ?1", [queue]).map(drop)
    }

    /// All that is known of tasks whose keys follow each other.
    pub(super) fn sweep_tasks(&self, first: i64, last: i64) -> Sql<()> {
        self.remove_tasks(first, last)?;
        self.run("DELETE FROM tries WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM plans WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM scheduled WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM errors WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM cancelled WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM dead WHERE task BETWEEN ?1 AND ?2", [first, last]).map(drop)
    }

    /// Nothing is kept of what is not set.
    pub(super) fn save_setting(&self, queue: i64, setting: Setting, value: Option<u64>) -> Sql<()> {
        match value {
            Some(value) => {
                let sql = "INSERT INTO settings (queue, name, value) VALUES (?1, ?2, ?3)
                    ON CONFLICT (queue, name) DO UPDATE SET value = excluded.value";
                self.run(sql, params![queue, setting.name(), value.cast_signed()]).map(drop)
            }
            None => {
                let sql = "DELETE FROM settings WHERE queue = ?1 AND name = ?2";
                self.run(sql, params![queue, setting.name()]).map(drop)
            }
        }
    }

    /// Tasks whose keys follow each other, all of which are there, until their envelopes have so many bytes. Those before one
    /// that cannot be read are found all the same.
    pub(super) fn tasks(&self, first: i64, last: i64, max_bytes: usize, found: &mut Vec<StoredTask>) -> Sql<()> {
        let sql = "SELECT key, id, inserted_at, envelope FROM tasks WHERE key BETWEEN ?1 AND ?2 ORDER BY key";
        let mut select = self.0.prepare_cached(sql)?;
        let mut rows = select.query([first, last])?;
        let mut bytes = 0;
        for key in first..=last {
            let row = rows.next()?.filter(|row| row.get(0) == Ok(key)).ok_or(Error::QueryReturnedNoRows)?;
            let envelope = Bytes::copy_from_slice(row.get_ref(3)?.as_blob()?);
            bytes += envelope.len();
            found.push(StoredTask { id: TaskId(row.get(1)?), inserted_at: time(row.get(2)?), envelope });
            if bytes >= max_bytes {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn inserted_at(&self, key: i64) -> Sql<Millis> {
        let mut select = self.0.prepare_cached("SELECT inserted_at FROM tasks WHERE key = ?1")?;
        select.query_row([key], |row| row.get(0).map(time))
    }

    pub(super) fn remove_tries(&self, key: i64) -> Sql<()> {
        self.run("DELETE FROM tries WHERE task = ?1", [key]).map(drop)
    }

    /// Tasks whose keys follow each other, and their leases.
    pub(super) fn remove_tasks(&self, first: i64, last: i64) -> Sql<()> {
        self.run("DELETE FROM leases WHERE task BETWEEN ?1 AND ?2", [first, last])?;
        self.run("DELETE FROM tasks WHERE key BETWEEN ?1 AND ?2", [first, last]).map(drop)
    }

    pub(super) fn save_tries(&self, key: i64, tries: Tries) -> Sql<()> {
        let sql = "INSERT INTO tries (task, position, deliveries, failures, expiries) VALUES (?1, ?2, ?3, ?4, ?5)
            ON CONFLICT (task) DO UPDATE SET position = excluded.position, deliveries = excluded.deliveries,
                failures = excluded.failures, expiries = excluded.expiries";
        let Tries { position, deliveries, failures, expiries, .. } = tries;
        self.run(sql, params![key, position, deliveries, failures, expiries]).map(drop)
    }

    pub(super) fn add_plan(&self, task: i64, plan: &Planned) -> Sql<()> {
        let sql = "INSERT INTO plans (task, priority, ends_at, unique_key) VALUES (?1, ?2, ?3, ?4)";
        let Planned { priority, ends_at, unique_key } = plan;
        self.run(sql, params![task, priority, ends_at.map(int), unique_key.as_deref()]).map(drop)
    }

    pub(super) fn remove_plan(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM plans WHERE task = ?1", [task]).map(drop)
    }

    pub(super) fn add_scheduled(&self, task: i64, due: Millis, place: i64) -> Sql<()> {
        self.run("INSERT INTO scheduled (task, due, place) VALUES (?1, ?2, ?3)", params![task, int(due), place])
            .map(drop)
    }

    pub(super) fn remove_scheduled(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM scheduled WHERE task = ?1", [task]).map(drop)
    }

    pub(super) fn save_error(&self, task: i64, error: &str) -> Sql<()> {
        let sql = "INSERT INTO errors (task, error) VALUES (?1, ?2)
            ON CONFLICT (task) DO UPDATE SET error = excluded.error";
        self.run(sql, params![task, error]).map(drop)
    }

    pub(super) fn error(&self, task: i64) -> Sql<String> {
        let mut select = self.0.prepare_cached("SELECT error FROM errors WHERE task = ?1")?;
        select.query_row([task], |row| row.get(0))
    }

    pub(super) fn remove_error(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM errors WHERE task = ?1", [task]).map(drop)
    }

    pub(super) fn add_cancelled(&self, task: i64) -> Sql<()> {
        self.run("INSERT INTO cancelled (task) VALUES (?1)", [task]).map(drop)
    }

    pub(super) fn remove_cancelled(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM cancelled WHERE task = ?1", [task]).map(drop)
    }

    pub(super) fn add_dead(&self, task: i64, died_at: Millis, cause: Cause) -> Sql<()> {
        let sql = "INSERT INTO dead (task, died_at, cause) VALUES (?1, ?2, ?3)";
        self.run(sql, params![task, int(died_at), cause_to_int(cause)]).map(drop)
    }

    pub(super) fn remove_dead(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM dead WHERE task = ?1", [task]).map(drop)
    }

    /// Of a task that is there. The length of a value is known without it.
    pub(super) fn spot(&self, task: i64) -> Sql<Spot> {
        let sql = "SELECT tasks.id, length(tasks.envelope), leases.token, scheduled.due, scheduled.place,
                dead.died_at, dead.cause
            FROM tasks LEFT JOIN leases ON leases.task = tasks.key LEFT JOIN scheduled ON scheduled.task = tasks.key
                LEFT JOIN dead ON dead.task = tasks.key
            WHERE tasks.key = ?1";
        let read = |row: &rusqlite::Row<'_>| {
            let at = if let Some(token) = row.get(2)? {
                At::Leased(Token(token))
            } else if let Some(due) = row.get(3)? {
                At::Scheduled(time(due), row.get(4)?)
            } else if let Some(died_at) = row.get(5)? {
                At::Dead(time(died_at), cause_from_int(row.get(6)?))
            } else {
                At::Ready
            };
            Ok(Spot { id: TaskId(row.get(0)?), size: time(row.get(1)?), at })
        };
        self.0.prepare_cached(sql)?.query_row([task], read)
    }

    pub(super) fn save_lease(&self, lease: &super::queue::Lease) -> Sql<()> {
        let sql = "UPDATE leases SET renewed_at = ?2, deadline = ?3, length = ?4, holders = ?5 WHERE task = ?1";
        let holders = holders_to_bytes(lease.holders.attempts());
        let (renewed_at, deadline, length) = (int(lease.renewed_at), int(lease.deadline), int(lease.length));
        self.run(sql, params![lease.task, renewed_at, deadline, length, holders]).map(drop)
    }

    pub(super) fn remove_lease(&self, task: i64) -> Sql<()> {
        self.run("DELETE FROM leases WHERE task = ?1", [task]).map(drop)
    }

    pub(super) fn add_generation(&self, queue: i64, kind: Kind, number: i64, began: Millis) -> Sql<()> {
        let sql = "INSERT INTO generations (queue, memory, number, began) VALUES (?1, ?2, ?3, ?4)";
        self.run(sql, params![queue, kind as u8, number, int(began)]).map(drop)
    }

    pub(super) fn remove_generation(&self, queue: i64, kind: Kind, number: i64) -> Sql<()> {
        let sql = "DELETE FROM generations WHERE queue = ?1 AND memory = ?2 AND number = ?3";
        self.run(sql, params![queue, kind as u8, number]).map(drop)
    }

    /// Of a generation, the rows before this place.
    pub(super) fn remove_entries(&self, queue: i64, kind: Kind, generation: i64, before: i64) -> Sql<()> {
        let sql = match kind {
            Kind::Acked => "DELETE FROM acked WHERE queue = ?1 AND generation = ?2 AND place < ?3",
            Kind::Requests => "DELETE FROM requests WHERE queue = ?1 AND generation = ?2 AND place < ?3",
        };
        self.run(sql, params![queue, generation, before]).map(drop)
    }

    pub(super) fn add_acked(&self, queue: i64, generation: i64, place: i64, tokens: &[Token]) -> Sql<()> {
        let sql = "INSERT INTO acked (queue, generation, place, tokens) VALUES (?1, ?2, ?3, ?4)";
        self.run(sql, params![queue, generation, place, concat(tokens.iter().map(|token| token.0))]).map(drop)
    }

    pub(super) fn add_request(&self, queue: i64, generation: i64, place: i64, request: StoredRequest) -> Sql<()> {
        let sql = "INSERT INTO requests (queue, generation, place, call, id, fingerprint, answered)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        let StoredRequest { call, id, fingerprint, answered } = request;
        self.run(sql, params![queue, generation, place, call, id, fingerprint.0, concat(answered)]).map(drop)
    }

    pub(super) fn add_producer(&self, key: i64, queue: i64, id: &str) -> Sql<()> {
        self.run("INSERT INTO producers (key, queue, id) VALUES (?1, ?2, ?3)", params![key, queue, id]).map(drop)
    }

    /// What it was answered is swept later.
    pub(super) fn remove_producer(&self, producer: i64) -> Sql<()> {
        self.run("DELETE FROM producers WHERE key = ?1", [producer]).map(drop)
    }

    /// `last` is the number of the last one of them, and `count` how many the producer was ever given, these included.
    pub(super) fn add_answers(&self, producer: i64, last: u64, count: u64, now: Millis, answers: &[u8]) -> Sql<()> {
        let sql = "INSERT INTO answers (producer, last, count, inserted_at, answers) VALUES (?1, ?2, ?3, ?4, ?5)";
        self.run(sql, params![producer, last.to_be_bytes(), int(count), int(now), answers]).map(drop)
    }

    /// The row that a number is in if it is in any, and its count.
    pub(super) fn answers(&self, producer: i64, number: u64) -> Sql<Option<(u64, Vec<u8>)>> {
        let sql = "SELECT count, answers FROM answers WHERE producer = ?1 AND last >= ?2 ORDER BY last LIMIT 1";
        let mut select = self.0.prepare_cached(sql)?;
        let read = |row: &rusqlite::Row<'_>| Ok((time(row.get(0)?), row.get(1)?));
        select.query_row(params![producer, number.to_be_bytes()], read).optional()
    }

    /// Rows that only have answers before the given one.
    pub(super) fn remove_answers(&self, producer: i64, before: u64) -> Sql<()> {
        self.run("DELETE FROM answers WHERE producer = ?1 AND count <= ?2", params![producer, int(before)]).map(drop)
    }

    /// Of a producer that was forgotten, at most so many rows. Answers how many it were.
    pub(super) fn sweep_answers(&self, producer: i64, limit: i64) -> Sql<usize> {
        let sql = "DELETE FROM answers WHERE producer = ?1
            AND last IN (SELECT last FROM answers WHERE producer = ?1 ORDER BY last LIMIT ?2)";
        self.run(sql, params![producer, limit])
    }

    pub(super) fn request(&self, queue: i64, generation: i64, place: i64) -> Sql<Option<StoredRequest>> {
        let sql = "SELECT call, id, fingerprint, answered FROM requests
            WHERE queue = ?1 AND generation = ?2 AND place = ?3";
        let mut select = self.0.prepare_cached(sql)?;
        let read = |row: &rusqlite::Row<'_>| {
            Ok(StoredRequest {
                call: row.get(0)?,
                id: row.get(1)?,
                fingerprint: Fingerprint(row.get(2)?),
                answered: row.get_ref(3)?.as_blob()?.as_chunks::<16>().0.to_vec(),
            })
        };
        select.query_row(params![queue, generation, place], read).optional()
    }
}
