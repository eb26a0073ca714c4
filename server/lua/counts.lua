-- Counts a queue's tasks, after leases that ran out were taken back.
--
-- KEYS     as in common.lua
-- ARGV     none of its own
-- Returns  {1 if more leases ran out: ask again, 1 if the queue exists, ready, leased, dead, inserted, acked,
--          for how many ms the task at the head has been in the queue, or -1 if no task is ready, or none of the first
--          MAX_SKIPPED ids is that of a task that is still there}

-- The ids of tasks that are gone may still be in the list; a pop takes so many of them off.
local MAX_SKIPPED = 100

local function age_of_head()
  for at = 0, MAX_SKIPPED - 1 do
    local id = redis.call('LINDEX', READY, at)
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

local _, more = reclaim()
local counts = redis.call('HMGET', META, 'ready', 'inserted', 'acked', 'leased')
return {
  more and 1 or 0, redis.call('EXISTS', META), tonumber(counts[1] or '0'), tonumber(counts[4] or '0'),
  redis.call('ZCARD', DEAD), tonumber(counts[2] or '0'), tonumber(counts[3] or '0'), age_of_head(),
}
