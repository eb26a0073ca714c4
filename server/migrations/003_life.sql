-- The tables of version 3: version 2, and what sets tasks and queues apart. Each of the new tables has rows only for what is not
-- as it is with most. A number that says where something stands in a line is drawn from the same row as the keys of tasks.

-- What a task has that was inserted with a priority, a time to live or a unique key. `ends_at` is when its time is over.
CREATE TABLE plans (
  task       INTEGER PRIMARY KEY,
  priority   INTEGER NOT NULL,
  ends_at    INTEGER,
  unique_key TEXT
) STRICT;

-- Tasks that are not due yet. Of those that fall due at the same time, the lowest place is first.
CREATE TABLE scheduled (
  task  INTEGER PRIMARY KEY,
  due   INTEGER NOT NULL,
  place INTEGER NOT NULL
) STRICT;

-- What the holder of a task said when it failed or was rejected the last time, if anything.
CREATE TABLE errors (
  task  INTEGER PRIMARY KEY,
  error TEXT    NOT NULL
) STRICT;

-- Tasks that are held, and go when they would go back.
CREATE TABLE cancelled (
  task INTEGER PRIMARY KEY
) STRICT;

-- Why a task was given up: 0 it failed too often, 1 its leases ran out too often, 2 its holder rejected it.
ALTER TABLE dead ADD COLUMN cause INTEGER NOT NULL DEFAULT 1;

-- What is set for a queue. Names that are not known are kept.
CREATE TABLE settings (
  queue INTEGER NOT NULL,
  name  TEXT    NOT NULL,
  value INTEGER NOT NULL,
  PRIMARY KEY (queue, name)
) STRICT, WITHOUT ROWID;

-- What became of the tasks that are not there any more and were not acked.
ALTER TABLE queues ADD COLUMN expired INTEGER NOT NULL DEFAULT 0;
ALTER TABLE queues ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE queues ADD COLUMN purged  INTEGER NOT NULL DEFAULT 0;

-- 1 for a queue that is none any more: its name is `#` and its key, and what it had leaves the file little by little. Until
-- then no other queue gets its key.
ALTER TABLE queues ADD COLUMN dropped INTEGER NOT NULL DEFAULT 0;

-- Besides, a position in `tries` may be above 0: it stands at the tail then, as if it was the task's key.
