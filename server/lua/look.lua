-- Takes back leases that ran out, and looks at the queue for those who wait on it.
--
-- KEYS     as in common.lua
-- ARGV     7 for how many ms to say that this server waits, or 0
-- Returns  {ready, due in or -1, reclaimed, 1 if more leases ran out, 1 if the queue exists: who waits is not told of one
--          without tasks}
-- Servers do this for every queue that is waited on, all the time: where nothing happens it only reads, and little.
local waits, due, reclaimed, more = ARGV[7] ~= '0', due_in(), 0, false
if due == 0 then
  reclaimed, more = reclaim()
  due = due_in()
end
if waits then
  announce(tonumber(ARGV[7]))
end
if reclaimed > 0 then
  wake_others(reclaimed)
end
local ready = redis.call('HGET', META, 'ready')
local exists = ready or not waits and redis.call('EXISTS', META) == 1
return { tonumber(ready or '0'), due, reclaimed, more and 1 or 0, exists and 1 or 0 }
