-- Makes dead letters ready again, at the tail, one after the other.
--
-- KEYS     as in common.lua
-- ARGV     7 ids, one behind the other, 8 call id: a second run answers as the first
-- Returns  a digit for each: 1 ready, 2 another task has its unique key, 3 its time was over, and it is gone, 4 no dead letter
local call = call_key(ARGV[8])
local first = redis.call('GET', call)
if first then
  return first
end
is_rare = redis.call('EXISTS', RARE) == 1
local rare, ids = rarely(), rarely().ids_in(ARGV[7])
local plans, died_at = rare.plans_of(ids), redis.call('ZMSCORE', DEAD, unpack(ids))
local outcomes, back, ended, keys, taken, is_done = {}, {}, {}, {}, {}, {}
local tries = redis.call('HMGET', TRIES, unpack(ids))

-- Whether another task has it; one whose time is over goes, and has none.
local function is_taken(key)
  if taken[key] == nil then
    local holder = rare.holder_of(key)
    taken[key] = holder ~= false
  end
  return taken[key]
end

local records = {}
for i, id in ipairs(ids) do
  local plan = plans[id] or {}
  if not died_at[i] or is_done[id] then
    outcomes[i] = '4'
  elseif not rare.is_kept(tonumber(died_at[i])) or plan.ends and plan.ends <= now then
    outcomes[i], ended[#ended + 1], is_done[id] = '3', id, true
  elseif plan.key and is_taken(plan.key) then
    outcomes[i] = '2'
  else
    outcomes[i], back[#back + 1], is_done[id] = '1', id, true
    if plan.key then
      taken[plan.key] = true
      keys[#keys + 1], keys[#keys + 2] = plan.key, id
    end
    local deliveries, _, _, rest = read_tries(tries[i])
    records[#records + 1], records[#records + 2] = id, int(deliveries) .. ' 0 0' .. string.gsub(rest, '^ %d ', ' 0 ', 1)
  end
end
first_free()
rare.drop_ended()
rare.drop_dead(ended, 'expired')
if #back > 0 then
  redis.call('ZREM', DEAD, unpack(back))
  redis.call('HSET', TRIES, unpack(records))
  rare.take_keys(keys)
  rare.push('RPUSH', back, plans)
  rare.measure(back)
  wake_others(#back)
end
redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
return table.concat(outcomes)
