-- Gives leased tasks back.
--
-- KEYS     as in common.lua
-- ARGV     7 'put_back': the delivery counts; 'unsent': it does not, and only leases are given back that no other try
--          was answered with; 'held': delivery and expiry count, and only leases that were not renewed since a time are
--          given back, 8 the try, or that time, or '', 9 call id or '': a second run answers as the first; of what is put back:
--          10 1 if it failed, 11 1 if it is rejected, 12 after how many ms it can be popped again, or '', 13 why, 14 what the
--          random part of the backoff is made of, 15 after how many failures a task is given up, 16 least and 17 greatest
--          backoff in ms, where no settings are; then runs of tokens
-- Returns  outcomes, a digit for each; then how many were put back, how many of those are ready, how many are dead letters, a
--          blank before each
local kind, condition, call = ARGV[7], ARGV[8], ARGV[9] ~= '' and call_key(ARGV[9])
local first = call and redis.call('GET', call)
if first then
  return first
end

is_rare = redis.call('EXISTS', RARE) == 1
local back = { deliveries = 0, expiries = 0 }
if kind == 'held' then
  back = { deliveries = 1, expiries = 1 }
elseif kind == 'put_back' then
  back = {
    deliveries = 1, expiries = 0, failed = ARGV[10] == '1', is_rejected = ARGV[11] == '1', delay = tonumber(ARGV[12]),
    reason = ARGV[13], chance = tonumber(ARGV[14]), max_failures = tonumber(ARGV[15]), backoff_min = tonumber(ARGV[16]),
    backoff_max = tonumber(ARGV[17]),
  }
end
local runs = args_from(18)
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
      released[#released + 1] = { batch, place }
    end
  end
end
outcomes_of_others(runs, outcomes)
local put_back, ready, dead = give_back(released, back)
local answer = table.concat({ table.concat(outcomes), ' ', int(put_back), ' ', int(ready), ' ', int(dead) })
if #released > 0 then
  if call then
    redis.call('SET', call, answer, 'PX', CALL_TTL)
  end
  if ready > 0 then
    wake_others(ready)
  end
end
return answer
