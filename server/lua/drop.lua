-- Drops a queue with all that is known of it. Who waits on it still waits, and a pop that was withdrawn stays so: both vanish by
-- themselves. So do the sessions, which know nothing of the queue's next life.
--
-- KEYS     as in common.lua
-- ARGV     7 1 to drop it with its tasks, 8 call id: a second run answers as the first, 9 the generation that its settings have, or '',
--          10 of a shard: the generation that nothing is inserted by before the shard was opened again, see change.lua, or ''
-- Returns  0 there is none, 1 dropped, 2 it has tasks, 3 the generation is another one
-- For longer than a call that found the queue spread may take to come here.
local FENCED = 600000
local call = call_key(ARGV[8])
local first = redis.call('GET', call)
if first then
  return tonumber(first)
end
if redis.call('EXISTS', META) == 0 and ARGV[10] == '' then
  return 0
elseif ARGV[9] ~= '' and (redis.call('HGET', META, 'generation') or '0') ~= ARGV[9] then
  return 3
elseif ARGV[7] ~= '1' and redis.call('EXISTS', TASKS) == 1 then
  return 2
end
local life = tonumber(redis.call('HGET', META, 'life') or '0')
local AT_ONCE = 1000
local keys = { TASKS, READY, LEASED, LEASES, TRIES, DEAD, BASE .. 'places', BASE .. 'producers', RARE, META }
for _, key in ipairs(rarely().ALL) do
  keys[#keys + 1] = key
end
for priority = 1, 9 do
  keys[#keys + 1] = BASE .. 'ready:' .. priority
end
for _, kind in ipairs({ 'acked', 'requests' }) do
  keys[#keys + 1] = BASE .. kind .. ':0'
  keys[#keys + 1] = BASE .. kind .. ':1'
end
for _, producer in ipairs(redis.call('ZRANGE', BASE .. 'producers', 0, -1)) do
  keys[#keys + 1] = BASE .. 'producer:' .. producer
end
for from = 1, #keys, AT_ONCE do
  redis.call('UNLINK', unpack(keys, from, math.min(from + AT_ONCE - 1, #keys)))
end
redis.call('SET', BASE .. 'dropped', int(life + 1))
expire(BASE .. 'dropped', 2 * SESSION_KEPT)
if ARGV[10] ~= '' then
  redis.call('HSET', META, 'generation', ARGV[10])
  expire(META, FENCED)
end
redis.call('SET', call, 1, 'PX', CALL_TTL)
return 1
