-- The tables of version 1. Every time is in milliseconds since the Unix epoch, by the store's clock; every id, token and
-- fingerprint has 16 bytes. A task that is in neither `leases` nor `dead` is ready.

-- Queues, and how many tasks were ever inserted and acked: with the tasks that are there, these have to add up.
CREATE TABLE queues (
  key      INTEGER PRIMARY KEY,
  name     TEXT    NOT NULL UNIQUE,
  inserted INTEGER NOT NULL,
  acked    INTEGER NOT NULL
) STRICT;

-- What never changes of a task. Keys ascend with each insert and are the order of the tail.
CREATE TABLE tasks (
  key         INTEGER PRIMARY KEY,
  queue       INTEGER NOT NULL,
  id          BLOB    NOT NULL,
  inserted_at INTEGER NOT NULL,
  envelope    BLOB    NOT NULL
) STRICT;

-- Tasks that came back at least once: where they stand before the tail (below 0, the lowest is the head), and what
-- happened to them. The delivery under way is not counted.
CREATE TABLE tries (
  task       INTEGER PRIMARY KEY,
  position   INTEGER NOT NULL,
  deliveries INTEGER NOT NULL,
  failures   INTEGER NOT NULL,
  expiries   INTEGER NOT NULL
) STRICT;

-- Tasks that are held. `place` is the order of delivery within the queue; `holders` are the tries of a repeatable pop that
-- were answered with the lease, 8 bytes each.
CREATE TABLE leases (
  task       INTEGER PRIMARY KEY,
  token      BLOB    NOT NULL,
  place      INTEGER NOT NULL,
  renewed_at INTEGER NOT NULL,
  deadline   INTEGER NOT NULL,
  holders    BLOB    NOT NULL
) STRICT;

-- Tasks that were given up.
CREATE TABLE dead (
  task    INTEGER PRIMARY KEY,
  died_at INTEGER NOT NULL
) STRICT;

-- The generations of what a queue remembers: `memory` is 0 for acked tokens, 1 for requests. The highest number is the
-- current generation, the one before it is still seen, older ones are on their way out.
CREATE TABLE generations (
  queue  INTEGER NOT NULL,
  memory INTEGER NOT NULL,
  number INTEGER NOT NULL,
  began  INTEGER NOT NULL,
  PRIMARY KEY (queue, memory, number)
) STRICT, WITHOUT ROWID;

-- Acked tokens, several in a row so that a row takes a quarter of a page at the most.
CREATE TABLE acked (
  queue      INTEGER NOT NULL,
  generation INTEGER NOT NULL,
  place      INTEGER NOT NULL,
  tokens     BLOB    NOT NULL,
  PRIMARY KEY (queue, generation, place)
) STRICT, WITHOUT ROWID;

-- Requests: `call` is 0 for inserts, 1 for pops; `answered` are the ids or tokens.
CREATE TABLE requests (
  queue       INTEGER NOT NULL,
  generation  INTEGER NOT NULL,
  place       INTEGER NOT NULL,
  call        INTEGER NOT NULL,
  id          TEXT    NOT NULL,
  fingerprint BLOB    NOT NULL,
  answered    BLOB    NOT NULL,
  PRIMARY KEY (queue, generation, place)
) STRICT, WITHOUT ROWID;
