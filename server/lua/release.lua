-- Gives leased tasks back to the head.
--
-- KEYS     as in common.lua
-- ARGV     6 'put_back': the delivery counts; 'unsent': it does not, and only leases are given back that no other try
--          was answered with; 'held': delivery and expiry count, and only leases that were not renewed since a time are
--          given back, 7 the try, or that time, or '', 8 call id or '': a second run answers as the first; then tokens
-- Returns  {outcomes}
local kind, condition, call = ARGV[6], ARGV[7], ARGV[8] ~= '' and call_key(ARGV[8])
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

local tokens = args_from(9)
local held = held_of(tokens)
local released = held
if kind == 'unsent' then
  released = disown(held, condition)
elseif kind == 'held' then
  released = {}
  for _, lease in ipairs(held) do
    if lease.renewed <= tonumber(condition) then
      released[#released + 1] = lease
    end
  end
end

local is_held, is_released = {}, {}
for _, lease in ipairs(held) do
  is_held[lease.token] = true
end
for _, lease in ipairs(released) do
  is_released[lease.token] = true
end
local outcomes = {}
for i, token in ipairs(tokens) do
  if is_released[token] then
    is_released[token] = nil
    outcomes[i] = APPLIED
  elseif is_held[token] then
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
