-- Counts a queue's tasks, after what its time had come for was done.
--
-- KEYS     as in common.lua
-- ARGV     none of its own
-- Returns  {1 if more is to be done: ask again, 1 if the queue exists, ready, scheduled, leased, dead, inserted, acked, expired,
--          deleted, purged, for how many ms the task at the head has been in the queue, or -1 if no task is ready, or none of
--          the first MAX_SKIPPED ids is that of a task that is still there, 1 if nothing is delivered, the generation of the settings}
-- The ids of tasks that are gone may still be in the list.
local MAX_SKIPPED = 100

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

is_rare = redis.call('EXISTS', RARE) == 1
local _, more = reclaim()
local scheduled, list, is_paused = 0, READY, false
if is_rare then
  is_paused = rarely().is_paused()
  more = rarely().trim() or more
  scheduled, list = redis.call('ZCARD', rarely().SCHEDULED), rarely().lists()[1].key
end
local counts = redis.call('HMGET', META, 'ready', 'leased', 'inserted', 'acked', 'expired', 'deleted', 'purged')
for i = 1, #counts do
  counts[i] = tonumber(counts[i] or '0')
end
local ready, leased, inserted, acked, expired, deleted, purged = unpack(counts)
return {
  more and 1 or 0, redis.call('EXISTS', META), ready, scheduled, leased, redis.call('ZCARD', DEAD), inserted, acked,
  expired, deleted, purged, age_of_head(list), is_paused and 1 or 0,
  tonumber(redis.call('HGET', META, 'generation') or '0'),
}
