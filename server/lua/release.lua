-- Gives leased tasks back to the head.
--
-- KEYS     as in common.lua
-- ARGV     7 'put_back': the delivery counts; 'unsent': it does not, and only leases are given back that no other try
--          was answered with; 'held': delivery and expiry count, and only leases that were not renewed since a time are
--          given back, 8 the try, or that time, or '', 9 call id or '': a second run answers as the first; then runs of
--          tokens
-- Returns  outcomes, a digit for each, 4 for what 'held' made a dead letter
local kind, condition, call = ARGV[7], ARGV[8], ARGV[9] ~= '' and call_key(ARGV[9])
local first = call and redis.call('GET', call)
if first then
  return first
end

local runs = args_from(10)
local found, places, count = find(runs)
local is_released = {}
if kind == 'unsent' then
  for _, batch in ipairs(disown(apart(found, places, count), condition)) do
    is_released[batch] = true
  end
end
local outcomes, released, taken = {}, {}, {}
for i = 1, count do
  local batch, place = found[i], places[i]
  if batch then
    taken[batch] = taken[batch] or {}
    local goes = not taken[batch][place]
    if kind == 'unsent' then
      goes = goes and is_released[batch]
    elseif kind == 'held' then
      goes = goes and batch.renewed <= tonumber(condition)
    end
    outcomes[i] = goes and APPLIED or LEASE_LOST
    if goes then
      taken[batch][place] = true
      released[#released + 1] = { batch, place, at = i }
    end
  end
end
outcomes_of_others(runs, outcomes)
if #released > 0 then
  local ready = to_head(released, kind == 'unsent' and 0 or 1, kind == 'held' and 1 or 0)
  for _, lease in ipairs(released) do
    if lease.is_dead then
      outcomes[lease.at] = DEAD_LETTERED
    end
  end
  if call then
    redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
  end
  wake_others(ready)
end
return table.concat(outcomes)
