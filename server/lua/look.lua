-- Does what its time has come for, and looks at the queue for those who wait on it.
--
-- KEYS     as in common.lua
-- ARGV     7 for how many ms to say that this server waits, or 0
-- Returns  {ready, due in or -1, how many became ready, 1 if there is more to be done, 1 if the queue exists}
is_rare = redis.call('EXISTS', RARE) == 1
local reclaimed, more = reclaim()
if ARGV[7] ~= '0' then
  announce(tonumber(ARGV[7]))
end
if is_rare then
  local rare = rarely()
  more = rare.trim() or more
  rare.measure_some()
  if rare.is_over() then
    redis.call('DEL', RARE)
    is_rare = false
  end
end
local ready = ready_count()
if reclaimed > 0 and ready > 0 then
  wake_others(reclaimed)
end
return { ready, due_in(), reclaimed, more and 1 or 0, redis.call('EXISTS', META) }
