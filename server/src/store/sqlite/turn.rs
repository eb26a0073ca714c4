//! What the steps of one transaction have in common.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rusqlite::ffi::ErrorCode;

use super::{
    memories::Sweeper,
    tables::{Sql, StoredTask, Tables},
};
use crate::store::{Millis, Stem, StoreError};

/// A step that was refused and changed nothing is no failure of the file.
pub(super) type Step<T> = Sql<Result<T, StoreError>>;

/// What the steps of one transaction have in common.
pub(super) struct Turn<'e> {
    pub(super) tables: Tables<'e>,
    pub(super) now: Millis,
    pub(super) next_task: &'e mut i64,
    pub(super) next_producer: &'e mut i64,
    pub(super) sweeper: &'e mut Sweeper,
    pub(super) withdrawn: &'e mut Withdrawn,
    /// How many leases, and tasks that have waited for their time, this transaction may still see to.
    pub(super) reclaims: &'e mut usize,
    pub(super) unreadable: &'e Unreadable,
}

/// Tasks whose values lie on damaged pages. They must not stand in the way of the others: they stay where they are, and are
/// passed over until the next start. One that is found ends the transaction, as SQLite writes nothing more in it; so what
/// is known of them outlives the index.
#[derive(Default)]
pub(super) struct Unreadable(Mutex<BTreeSet<i64>>);

impl Unreadable {
    pub(super) fn contains(&self, task: i64) -> bool {
        self.tasks().contains(&task)
    }

    pub(super) fn has_any(&self) -> bool {
        !self.tasks().is_empty()
    }

    /// Of tasks that could not be taken out of the file, notes the one that cannot be read.
    pub(super) fn look_for(&self, tables: Tables<'_>, first: i64, last: i64, error: &rusqlite::Error) {
        if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) {
            let found = (first..=last).find_map(|task| {
                let error = tables.tasks(task, task, 1, &mut Vec::new()).err()?;
                Some((task, error))
            });
            if let Some((task, error)) = found {
                self.note(task, &error);
            }
        }
    }

    fn note(&self, task: i64, error: &rusqlite::Error) {
        tracing::error!(task, %error, "a task cannot be read and is passed over; `data-queue-server check` tells more");
        self.tasks().insert(task);
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeSet<i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    /// Of a task, or of where one stands in a line.
    pub(super) fn next_number(&mut self) -> i64 {
        *self.next_task += 1;
        *self.next_task - 1
    }

    /// Nothing for a task that cannot be read.
    pub(super) fn read(&self, task: i64) -> Sql<Option<StoredTask>> {
        Ok(self.read_run(task, task, 1)?.pop())
    }

    /// Of tasks whose keys follow each other the first ones, up to so many bytes; none if the first cannot be read.
    pub(super) fn read_run(&self, first: i64, mut last: i64, max_bytes: usize) -> Sql<Vec<StoredTask>> {
        match self.unreadable.tasks().range(first..=last).next() {
            Some(task) if *task == first => return Ok(Vec::new()),
            Some(task) => last = task - 1,
            None => {}
        }
        let mut found = Vec::new();
        match self.tables.tasks(first, last, max_bytes, &mut found) {
            Ok(()) => Ok(found),
            Err(error) => {
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) {
                    self.unreadable.note(first + found.len() as i64, &error);
                }
                Err(error)
            }
        }
    }
}

/// Until when a pop must not lease any more under its stem, be its queue known already or not.
pub(super) type Withdrawn = HashMap<Stem, Millis>;
