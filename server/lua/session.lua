-- What streams of deliveries do with the leases of their session.
--
-- KEYS     as in common.lua
-- ARGV     7 'resume': the stream gets the session, and deadlines move to now + ms at least; 'keep': the latter for the given
--          tokens; 'abandon': their deadlines move to now + ms at the latest, 8 session, 9 stream, 10 ms; then tokens
-- Returns  resume: {tokens in the order of delivery}; keep: {1, {outcomes}}; keep and abandon: {0} if another stream has it
local kind, session, stream, ms = ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])
local exists = redis.call('EXISTS', META) == 1
-- So many values a call of Redis takes from Lua without trouble.
local AT_ONCE = 1000

local function move(leases, condition)
  local scores = {}
  for _, lease in ipairs(leases) do
    scores[#scores + 1] = int(now + ms)
    scores[#scores + 1] = member(lease)
  end
  if #scores > 0 then
    redis.call('ZADD', LEASED, 'XX', condition, unpack(scores))
  end
end

-- The leases of the session, by what it knows of its pops.
local function leases_of_session()
  local fields, found, tokens = redis.call('HGETALL', session_key(session)), {}, {}
  local function look_up()
    for _, lease in ipairs(held_of(tokens)) do
      found[#found + 1] = lease
    end
    tokens = {}
  end
  for i = 1, #fields, 2 do
    if #fields[i] == STEM_BYTES then
      for _, token in ipairs(tokens_of_stem(fields[i], tonumber(fields[i + 1]))) do
        tokens[#tokens + 1] = token
      end
      if #tokens >= AT_ONCE then
        look_up()
      end
    end
  end
  look_up()
  table.sort(found, function(a, b) return a.order < b.order end)
  return found
end

first_free()
if kind == 'resume' then
  local answer, step = {}, {}
  forget_old_session(session)
  for i, lease in ipairs(leases_of_session()) do
    answer[i] = lease.token
    step[#step + 1] = lease
    if #step == AT_ONCE then
      move(step, 'GT')
      step = {}
    end
  end
  move(step, 'GT')
  if exists then
    use_session(session, stream)
  end
  return answer
end
if not has_session(session, stream) then
  return { 0 }
end
local tokens = args_from(11)
local held = held_of(tokens)
if kind == 'abandon' then
  move(held, 'LT')
  return { 1 }
end
local is_held, outcomes = {}, {}
for _, lease in ipairs(held) do
  is_held[lease.token] = true
end
for i, token in ipairs(tokens) do
  outcomes[i] = is_held[token] and APPLIED or nil
end
outcomes_of_others(tokens, outcomes)
move(held, 'GT')
if exists then
  use_session(session, stream)
end
return { 1, outcomes }
