-- Counts a queue's tasks, after what its time had come for was done.
--
-- KEYS     as in common.lua
-- ARGV     none of its own
-- Returns  {1 if more is to be done: ask again, 1 if the queue exists, ready, scheduled, leased, dead, inserted, acked, expired,
--          deleted, purged, for how many ms the task at the head has been in the queue, or -1 if no task is ready, or none of
--          the first MAX_SKIPPED ids is that of a task that is still there}
local function age_of_head(list)
  for at = 0, MAX_SKIPPED - 1 do
    local id = redis.call('LINDEX', list, at)
    if not id then
      return -1
    end
    local envelope = redis.call('HGET', TASKS, id)
    if envelope then
      -- What insert.lua put behind it.
      return math.max(0, now - struct.unpack('<I8', string.sub(envelope, -8)))
    end
  end
  return -1
end

read_counts('ready', 'leased', 'inserted', 'acked', 'expired', 'deleted', 'purged')
local _, more = reclaim()
local scheduled, list = 0, READY
if counts.rare then
  more = rarely().trim() or more
  scheduled, list = redis.call('ZCARD', rarely().SCHEDULED), rarely().lists()[1].key
end
return counted({
  more and 1 or 0, redis.call('EXISTS', META), counts.ready, scheduled, counts.leased, redis.call('ZCARD', DEAD),
  counts.inserted, counts.acked, counts.expired, counts.deleted, counts.purged, age_of_head(list),
})
