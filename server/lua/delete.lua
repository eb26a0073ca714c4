-- Deletes tasks, wherever they are; of leased ones it is noted that they go when they would go back.
--
-- KEYS     as in common.lua
-- ARGV     7 ids, one behind the other, 8 call id: a second run answers as the first
-- Returns  a digit for each: 1 gone, 2 leased, 3 unknown; or '': leases are being indexed, ask again
local call = call_key(ARGV[8])
local first = redis.call('GET', call)
if first then
  return first
end
is_rare = redis.call('EXISTS', RARE) == 1
local ids = rarely().ids_in(ARGV[7])
local states = whereabouts(ids)
if not states then
  index_leases()
  return ''
end
local rare, outcomes, waiting, dead, leased, is_gone = rarely(), {}, {}, {}, {}, {}
for i, id in ipairs(ids) do
  if is_gone[id] or not states[i] then
    outcomes[i] = '3'
  elseif states[i] == NUMBER.leased then
    outcomes[i], leased[#leased + 1] = '2', id
  else
    local from = states[i] == NUMBER.dead and dead or waiting
    outcomes[i], from[#from + 1], is_gone[id] = '1', id, true
  end
end
first_free()
rare.drop_waiting(waiting, 'deleted')
rare.drop_dead(dead, 'deleted')
if #leased > 0 then
  redis.call('SADD', rare.CANCELLED, unpack(leased))
  rare.mark()
end
redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
return table.concat(outcomes)
