-- Gives leased tasks back to the head.
--
-- KEYS     as in common.lua
-- ARGV     6 'put_back': the delivery counts; 'unsent': it does not, and only leases are given back that no other try
--          was answered with; 'held': delivery and expiry count, and only leases that were not renewed since a time are
--          given back, 7 the try, or that time, or '', 8 call id or '': a second run answers as the first; then tokens
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

-- The tries that were answered with a lease, but for one; false if that is not among them.
local function holders_without(holders, one)
  local others, found = {}, false
  for other in string.gmatch(holders, '[^,]+') do
    if other == one then
      found = true
    else
      others[#others + 1] = other
    end
  end
  return found and table.concat(others, ',')
end

local disowned = {}
local function applies(lease)
  if kind == 'unsent' then
    local others = holders_without(lease.holder, condition)
    if others and others ~= '' then
      lease.holder = others
      disowned[#disowned + 1] = lease.token
      disowned[#disowned + 1] = write_lease(lease)
    end
    return others == ''
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
if #disowned > 0 then
  first_free()
  redis.call('HSET', LEASES, unpack(disowned))
end
if #released > 0 then
  to_head(released, kind == 'unsent' and 0 or 1, kind == 'held' and 1 or 0)
  if call then
    redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
  end
  wake_others(#released)
end
return outcomes
