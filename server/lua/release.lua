-- Gives leased tasks back to the head.
--
-- KEYS     as in common.lua
-- ARGV     6 'put_back': the delivery counts; 'unsent': it does not, and only leases of this holder are given back;
--          'held': delivery and expiry count, and only leases that were not renewed since a time are given back,
--          7 the holder, or that time, or '', 8 call id or '': a second run answers as the first; then tokens
-- Returns  {outcomes}
local kind, condition, call = ARGV[6], ARGV[7], ARGV[8] ~= '' and BASE .. 'call:' .. ARGV[8]
local CALL_TTL = 60000
if call then
  local first = redis.call('GET', call)
  if first then
    local outcomes = {}
    for outcome in string.gmatch(first, '%d') do
      outcomes[#outcomes + 1] = tonumber(outcome)
    end
    return outcomes
  end
end

local function applies(lease)
  if kind == 'unsent' then
    return lease.holder == condition
  elseif kind == 'held' then
    return lease.renewed <= tonumber(condition)
  end
  return true
end

local tokens = args_from(9)
local outcomes, released, twice = {}, {}, {}
for i, lease in ipairs(leases_of(tokens)) do
  if lease and applies(lease) and not twice[lease.token] then
    twice[lease.token] = true
    released[#released + 1] = lease
    outcomes[i] = APPLIED
  elseif lease then
    outcomes[i] = LEASE_LOST
  end
end
outcomes_of_others(tokens, outcomes)
if #released > 0 then
  to_head(released, kind == 'unsent' and 0 or 1, kind == 'held' and 1 or 0)
  if call then
    redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
  end
  wake_others(#released)
end
return outcomes
