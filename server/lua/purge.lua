-- Drops the first tasks of a state.
--
-- KEYS     as in common.lua
-- ARGV     7 the state: 'ready', 'scheduled', 'leased', 'dead', 8 at most so many, 9 call id: a second run answers as the first
-- Returns  how many
local state, most, call = ARGV[7], tonumber(ARGV[8]), call_key(ARGV[9])
local first = redis.call('GET', call)
if first then
  return tonumber(first)
end
is_rare = redis.call('EXISTS', RARE) == 1
local rare, ids = rarely(), {}

-- The ids of tasks that are ready, with those that lists have of tasks that are gone left where they are.
local function first_ready()
  local skipped = 0
  for _, list in ipairs(rare.lists()) do
    local at = 0
    while #ids < most and skipped < rare.MAX_SKIPPED do
      local part = redis.call('LRANGE', list.key, at, at + most - 1)
      for _, id in ipairs(part) do
        if #ids < most and redis.call('HEXISTS', TASKS, id) == 1 then
          ids[#ids + 1] = id
        else
          skipped = skipped + 1
        end
      end
      if #part < most then
        break
      end
      at = at + most
    end
  end
  rare.drop_waiting(ids, 'purged')
end

local function first_leased()
  local leases = {}
  for _, batch in ipairs(batches_of(redis.call('ZRANGE', LEASED, 0, most - 1))) do
    for _, place in ipairs(batch and held_places(batch) or {}) do
      if #leases < most then
        leases[#leases + 1] = { batch, place }
      end
    end
  end
  for i, lease in ipairs(leases) do
    ids[i] = id_at(lease[1], lease[2])
    end_lease(lease[1], lease[2])
  end
  if #ids > 0 then
    write_ends()
    rare.forget(ids, rare.plans_of(ids))
    rare.unlease(ids)
    rare.add('leased', -#ids)
    rare.add('purged', #ids)
  end
end

first_free()
if state == 'ready' then
  first_ready()
elseif state == 'leased' then
  first_leased()
elseif state == 'dead' then
  ids = redis.call('ZRANGE', DEAD, 0, most - 1)
  rare.drop_dead(ids, 'purged')
else
  for i, place in ipairs(redis.call('ZRANGE', rare.SCHEDULED, 0, most - 1)) do
    ids[i] = string.sub(place, 9)
  end
  rare.drop_waiting(ids, 'purged')
end
redis.call('SET', call, int(#ids), 'PX', CALL_TTL)
return #ids
