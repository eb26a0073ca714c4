-- Gives leased tasks back to the head.
--
-- KEYS     as in common.lua
-- ARGV     7 'put_back': the delivery counts; 'unsent': it does not, and only leases are given back that no other try
--          was answered with; 'held': delivery and expiry count, and only leases that were not renewed since a time are
--          given back, 8 the try, or that time, or '', 9 call id or '': a second run answers as the first; then tokens
-- Returns  {outcomes}, 4 for what 'held' made a dead letter
local kind, condition, call = ARGV[7], ARGV[8], ARGV[9] ~= '' and call_key(ARGV[9])
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

local tokens = args_from(10)
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
  local ready, given_up = to_head(released, kind == 'unsent' and 0 or 1, kind == 'held' and 1 or 0)
  for i, token in ipairs(tokens) do
    if given_up[token] and outcomes[i] == APPLIED then
      outcomes[i] = DEAD_LETTERED
    end
  end
  if call then
    redis.call('SET', call, table.concat(outcomes), 'PX', CALL_TTL)
  end
  wake_others(ready)
end
return outcomes
