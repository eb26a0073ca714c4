-- Tasks as administration sees them.

-- Of tasks, each given as {id, at}: {id, at or -1, envelope, tries or '', plan or '', 1 if it is cancelled}, or '' of those that
-- are not there.
local function see(tasks)
  local rare, ids, seen = rarely(), {}, {}
  for i, task in ipairs(tasks) do
    ids[i] = task[1]
  end
  if #ids == 0 then
    return seen
  end
  local envelopes, tries = redis.call('HMGET', TASKS, unpack(ids)), redis.call('HMGET', TRIES, unpack(ids))
  local plans = rare.records_of(ids)
  local cancelled = rare.cancelled_among(ids)
  for i, id in ipairs(ids) do
    local parts = { id, tasks[i][2], envelopes[i], tries[i] or '', plans[id] or '', cancelled[id] and 1 or 0 }
    seen[i] = envelopes[i] and parts or ''
  end
  return seen
end
