-- What streams of deliveries do with the leases of their session.
--
-- KEYS     as in common.lua
-- ARGV     7 'resume': the stream gets the session, and deadlines move to now + ms at least; 'keep': the latter for the given
--          tokens; 'abandon': their deadlines move to now + ms at the latest, 8 session, 9 stream, 10 ms; then runs of
--          tokens, or for 'resume' after how many ms a lease is not extended any more
-- Returns  resume: {token, ms since its delivery or last heartbeat, … in the order of delivery}; keep: {1, outcomes}; keep and abandon: {0} if another stream has it
local kind, session, stream, ms = ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])
local exists = redis.call('EXISTS', META) == 1
is_rare = redis.call('EXISTS', RARE) == 1
-- So many values a call of Redis takes from Lua without trouble.
local AT_ONCE = 1000

local function move(batches, condition)
  for from = 1, #batches, AT_ONCE do
    local scores = {}
    for i = from, math.min(from + AT_ONCE - 1, #batches) do
      scores[#scores + 1] = int(now + ms)
      scores[#scores + 1] = member(batches[i])
    end
    redis.call('ZADD', LEASED, 'XX', condition, unpack(scores))
  end
end

-- The batches of the session, by what it knows of its pops. Those of which nothing is held need not be known any more.
local function batches_of_session()
  local fields, batches, spent = redis.call('HKEYS', session_key(session)), {}, {}
  for _, stem in ipairs(fields) do
    if #stem == STEM_BYTES then
      local held = held_under(stem)
      for _, batch in ipairs(held) do
        batches[#batches + 1] = batch
      end
      spent[#spent + 1] = #held == 0 and stem or nil
    end
  end
  for from = 1, #spent, AT_ONCE do
    redis.call('HDEL', session_key(session), unpack(spent, from, math.min(from + AT_ONCE - 1, #spent)))
  end
  table.sort(batches, function(a, b) return a.order < b.order end)
  return batches
end

first_free()
if kind == 'resume' then
  local answer = {}
  forget_old_session(session)
  local batches = batches_of_session()
  for _, lease in ipairs(all_of(batches)) do
    answer[#answer + 1] = token_at(lease[1], lease[2])
    answer[#answer + 1] = math.max(0, now - lease[1].renewed)
  end
  local young = {}
  for _, batch in ipairs(batches) do
    young[#young + 1] = now - batch.renewed < tonumber(ARGV[11]) and batch or nil
  end
  move(young, 'GT')
  if exists then
    use_session(session, stream)
  end
  return answer
end
if not has_session(session, stream) then
  return { 0 }
end
local runs = args_from(11)
local found, places, count = find(runs)
local outcomes = outcomes_of_held(found, places, count)
local held = apart(found, places, count)
if kind == 'abandon' then
  move(held, 'LT')
  return { 1 }
end
outcomes_of_others(runs, outcomes)
move(held, 'GT')
if exists then
  use_session(session, stream)
end
return { 1, table.concat(outcomes) }
