//! What a queue remembers of requests: what each was answered.

use md5::{Digest, Md5};

use super::{
    queue::Queue,
    tables::{Sql, StoredRequest},
    turn::{Step, Turn},
};
use crate::store::{Inserted, RequestKey, StoreError, TaskId};

/// Whose request ids: those of inserts and of pops are apart.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Call {
    Insert = 0,
    Pop = 1,
}

/// The key under which a request is found; who it was is in the file.
pub(super) fn request_digest(call: u8, id: &str) -> [u8; 16] {
    Md5::new().chain_update([call]).chain_update(id).finalize().into()
}

/// The version of a task's id is an even number. That of a duplicate, which was not inserted, is kept as the odd one behind it.
const DUPLICATE: u8 = 0x10;

/// What an insert was answered, as it is kept.
pub(super) fn ids_to_bytes(inserted: &Inserted) -> Vec<[u8; 16]> {
    let mut ids: Vec<[u8; 16]> = inserted.ids.iter().map(|id| id.0).collect();
    inserted.duplicates.iter().for_each(|at| ids[*at][6] |= DUPLICATE);
    ids
}

/// The reverse.
pub(super) fn ids_from_bytes(mut ids: Vec<[u8; 16]>, replayed: bool) -> Inserted {
    let is_duplicate = |id: &[u8; 16]| id[6] & DUPLICATE != 0;
    let duplicates = (0..ids.len()).filter(|at| is_duplicate(&ids[*at])).collect();
    ids.iter_mut().for_each(|id| id[6] &= !DUPLICATE);
    Inserted { ids: ids.into_iter().map(TaskId).collect(), duplicates, replayed, ..Inserted::default() }
}

impl Queue {
    pub(super) fn find_request(&self, call: Call, id: &str, turn: &Turn<'_>) -> Sql<Option<StoredRequest>> {
        let Some((generation, place)) = self.requests.get(&request_digest(call as u8, id), turn.now) else {
            return Ok(None);
        };
        let found = turn.tables.request(self.key, generation, *place)?;
        // Of two ids with one digest the later one is known, and the other as if it was never seen.
        Ok(found.filter(|found| found.call == call as u8 && found.id == id))
    }

    /// What a request was answered; refused if it had other content.
    pub(super) fn recall(&self, call: Call, request: &RequestKey, turn: &Turn<'_>) -> Step<Option<Vec<[u8; 16]>>> {
        Ok(match self.find_request(call, &request.id, turn)? {
            Some(first) if first.fingerprint != request.fingerprint => Err(StoreError::RequestIdReused),
            first => Ok(first.map(|first| first.answered)),
        })
    }

    pub(super) fn remember_request(
        &mut self,
        call: Call,
        request: &RequestKey,
        answered: Vec<[u8; 16]>,
        turn: &mut Turn<'_>,
    ) -> Sql<()> {
        if self.requests.is_due(turn.now) {
            self.requests.begin(turn.tables, self.key, turn.now, turn.sweeper)?;
        }
        let generation = &mut self.requests.current;
        let place = generation.rows;
        generation.rows += 1;
        generation.entries.insert(request_digest(call as u8, &request.id), place);
        let RequestKey { id, fingerprint } = request.clone();
        turn.tables.add_request(
            self.key,
            generation.number,
            place,
            StoredRequest { call: call as u8, id, fingerprint, answered },
        )
    }
}
