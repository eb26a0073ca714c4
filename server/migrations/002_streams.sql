-- The tables of version 2: version 1, and what streams need: what is remembered of producers, who number their inserts, and
-- whose leases are whose.

-- Producers that are remembered. A key is not used again as long as it has answers: those of a forgotten producer go only
-- little by little.
CREATE TABLE producers (
  key   INTEGER PRIMARY KEY,
  queue INTEGER NOT NULL,
  id    TEXT    NOT NULL
) STRICT;

-- What they were answered, a row for each step of inserts: one answer behind the other, each with its number (8 bytes,
-- the highest first), fingerprint, how many ids (4 bytes, the highest first), and the ids. `last` is the last number, in
-- the same form; `count` is how many answers the producer was ever given, these included.
CREATE TABLE answers (
  producer    INTEGER NOT NULL,
  last        BLOB    NOT NULL,
  count       INTEGER NOT NULL,
  inserted_at INTEGER NOT NULL,
  answers     BLOB    NOT NULL,
  PRIMARY KEY (producer, last)
) STRICT, WITHOUT ROWID;

-- Of a lease that a stream made, its client's session.
ALTER TABLE leases ADD COLUMN session BLOB;

-- What was left of the lease when its deadline was last moved; where it is not there, the time from `renewed_at` on.
ALTER TABLE leases ADD COLUMN length INTEGER;
