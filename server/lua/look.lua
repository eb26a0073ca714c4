-- Takes back leases that ran out, and looks at the queue for those who wait on it.
--
-- KEYS     as in common.lua
-- ARGV     7 for how many ms to say that this server waits, or 0
-- Returns  {ready, due in or -1, reclaimed, 1 if more leases ran out, 1 if the queue exists}
local reclaimed, more = reclaim()
if ARGV[7] ~= '0' then
  announce(tonumber(ARGV[7]))
end
if reclaimed > 0 then
  wake_others(reclaimed)
end
return { ready_count(), due_in(), reclaimed, more and 1 or 0, redis.call('EXISTS', META) }
