-- Does what its time has come for, and looks at the queue for those who wait on it.
--
-- KEYS     as in common.lua
-- ARGV     7 for how many ms to say that this server waits, or 0
-- Returns  {ready, due in or -1, how many became ready, 1 if there is more to be done, 1 if the queue exists: who waits is not told
--          of one without tasks, the generation of the settings}
-- Servers do this for every queue that is waited on, all the time: where nothing happens it only reads, and little.
is_rare = redis.call('EXISTS', RARE) == 1
local waits, due, reclaimed, more = ARGV[7] ~= '0', due_in(), 0, false
if due == 0 or is_rare then
  reclaimed, more = reclaim()
  due = due_in()
end
if waits then
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
if reclaimed > 0 then
  wake_others(reclaimed)
end
local ready, generation = unpack(redis.call('HMGET', META, 'ready', 'generation'))
local exists = ready or not waits and redis.call('EXISTS', META) == 1
ready = is_rare and rarely().is_paused() and 0 or tonumber(ready or '0')
return { ready, due, reclaimed, more and 1 or 0, exists and 1 or 0, generation or '0' }
