-- Acks, takes back what ran out, then leases from the head.
--
-- KEYS     as in common.lua
-- ARGV     7 the most tasks, 8 envelope bytes after which no further one is leased, 9 lease in ms, 10 stem of the tokens,
--          11 for how many ms to say that this server waits if nothing is found, or 0, 12 1: pop even if more leases
--          ran out than one step takes back, 13 request id or '', 14 fingerprint, 15 attempt or '-', 16 session or '',
--          17 stream, 18 how many spent stems follow; those; then tokens to ack
-- Returns  {0, ready, reclaimed, due in or -1, 1 if more leases ran out and nothing was popped for that, {outcomes},
--          {token, id, envelope, deliveries, expiries, left, deadline, … for each task}, 1 if another stream has the
--          session}, or {2}: request id reused
local max, max_bytes, lease_ms, stem = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
-- What insert.lua put behind each envelope.
local INSERTED_AT_BYTES = 9
local MAX_HOLDERS = 8
local request, holder = ARGV[13] ~= '' and 'p' .. ARGV[13], ARGV[15]

local session, stream, spent = ARGV[16] ~= '' and ARGV[16], ARGV[17], tonumber(ARGV[18])

local own_tokens = tokens_of_stem(stem, max)

-- Adds a try to those that were answered with a lease. They may be answered in another order than they were made, so
-- each of them counts. So many tries at once are not kept apart: the lease is then given back by nobody, and runs out.
local function with_holder(holders, one)
  local count = 0
  for other in string.gmatch(holders, '[^,]+') do
    if other == one or other == '*' then
      return holders
    end
    count = count + 1
  end
  return holders .. ',' .. (count < MAX_HOLDERS and one or '*')
end

-- What the first call was given and still holds, or what an earlier run of this very call leased.
local function leased_before(record)
  local held = held_of(tokens_of_record(record))
  if #held == 0 then
    held = held_of(own_tokens)
  end
  if #held > 0 and request then
    local records = {}
    for i, lease in ipairs(held) do
      lease.holder = with_holder(lease.holder, holder)
      records[2 * i - 1] = lease.token
      records[2 * i] = write_lease(lease)
    end
    first_free()
    redis.call('HSET', LEASES, unpack(records))
  end
  return held
end

-- From the head: how many ids to take off, and those of them whose task is there, up to `max_bytes`. The id of a task
-- that is gone may still be in the list; it is not counted as ready any more. Reads one envelope, then twice as many each
-- time, so that of large ones few are read in vain.
local function head()
  local ids, tasks, bytes = redis.call('LRANGE', READY, 0, max - 1), {}, 0
  local from, count = 1, 1
  while from <= #ids do
    local to = math.min(from + count - 1, #ids)
    for i, envelope in ipairs(redis.call('HMGET', TASKS, unpack(ids, from, to))) do
      if bytes >= max_bytes and #tasks > 0 then
        return from + i - 2, tasks
      end
      if envelope then
        tasks[#tasks + 1] = { id = ids[from + i - 1], envelope = envelope }
        bytes = bytes + #envelope - INSERTED_AT_BYTES
      end
    end
    from, count = to + 1, 2 * count
  end
  return #ids, tasks
end

local function lease_from_head()
  local taken, tasks = head()
  local held, records, scores, tokens = {}, {}, {}, {}
  if taken > 0 then
    redis.call('LPOP', READY, taken)
  end
  if #tasks == 0 then
    return held
  end
  redis.call('HINCRBY', META, 'ready', -#tasks)
  local order = redis.call('HINCRBY', META, 'delivered', #tasks) - #tasks
  for i, task in ipairs(tasks) do
    local lease = {
      token = own_tokens[i], id = task.id, order = order + i, lease = lease_ms, renewed = now, holder = holder,
      rest = '', envelope = task.envelope, deadline = now + lease_ms,
    }
    held[i] = lease
    tokens[i] = lease.token
    records[2 * i - 1] = lease.token
    records[2 * i] = write_lease(lease)
    scores[2 * i - 1] = int(lease.deadline)
    scores[2 * i] = member(lease)
  end
  redis.call('HSET', LEASES, unpack(records))
  redis.call('ZADD', LEASED, unpack(scores))
  if request then
    remember_request(request, ARGV[14] .. table.concat(tokens))
  end
  if session then
    use_session(session, stream, stem, #held)
  end
  return held
end

-- What a delivery that was made before lacks of what a new one knows.
local function look_up(held)
  local ids, members = {}, {}
  for i, lease in ipairs(held) do
    ids[i] = lease.id
    members[i] = member(lease)
  end
  local envelopes = redis.call('HMGET', TASKS, unpack(ids))
  local deadlines = redis.call('ZMSCORE', LEASED, unpack(members))
  for i, lease in ipairs(held) do
    lease.envelope = envelopes[i]
    lease.deadline = tonumber(deadlines[i])
  end
end

-- The delivery under way counts, though it is in the lease and not yet in tries.
local function answer(held)
  local ids, tasks = {}, {}
  for i, lease in ipairs(held) do
    ids[i] = lease.id
  end
  local tries = redis.call('HMGET', TRIES, unpack(ids))
  for i, lease in ipairs(held) do
    local deliveries, _, expiries = read_tries(tries[i])
    for _, field in ipairs({
      lease.token, lease.id, lease.envelope, deliveries + 1, expiries, math.max(0, lease.deadline - now), lease.deadline,
    }) do
      tasks[#tasks + 1] = field
    end
  end
  return tasks
end

local record = request and recall_request(request)
if record and string.sub(record, 1, 16) ~= ARGV[14] then
  return { 2 }
end
local outcomes = ack(args_from(19 + spent))
local reclaimed, more = reclaim()
if more and ARGV[12] ~= '1' then
  return { 0, 0, reclaimed, -1, 1, outcomes, {}, 0 }
end
if session and not has_session(session, stream) then
  return { 0, ready_count(), reclaimed, -1, 0, outcomes, {}, 1 }
end
if spent > 0 then
  redis.call('HDEL', session_key(session), unpack(ARGV, 19, 18 + spent))
end
local held = {}
-- Whoever made this call may have given it up, and withdrawn it, before it arrived.
if redis.call('EXISTS', call_key(stem)) == 0 then
  held = leased_before(record)
  if #held > 0 then
    look_up(held)
  else
    held = lease_from_head()
  end
end
local ready = ready_count()
if reclaimed > 0 and ready > 0 then
  wake_others(ready)
end
if #held > 0 then
  return { 0, ready, reclaimed, -1, 0, outcomes, answer(held), 0 }
end
if ARGV[11] ~= '0' then
  announce(tonumber(ARGV[11]))
end
return { 0, ready, reclaimed, due_in(), 0, outcomes, {}, 0 }
