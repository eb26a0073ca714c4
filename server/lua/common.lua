-- What the scripts share. It stands between the prelude, which gives `now` and `expire`, and the script itself.
--
-- KEYS  1 meta HASH      counters, and where the memories stand
--       2 tasks HASH     id -> envelope
--       3 ready LIST     of ids, the head first
--       4 leased ZSET    order as 8 bytes, then token -> deadline; so of equal deadlines the first delivered is first
--       5 leases HASH    token -> id (16 bytes), then 'order lease renewed holders': the tries of a repeatable pop that
--                        were answered with it, with commas between, or '-'
--       6 tries HASH     id -> 'deliveries failures expiries', the delivery under way not counted; absent when all are 0
--       7 waiters ZSET   server -> until when it waits
--       8 spare          never written, see `first_free`
--       9 dead ZSET      id -> when it was given up
-- ARGV  1 window, 2 half of the entries that a memory keeps, 3 this server, 4 the queue's name, 5 prefix of the channels
--       6 after how many expiries a task is given up, 7 and on: the script's own
-- Returns: nothing; each script states its own.
--
-- Fields that a later version appends to a lease or to tries are kept. Numbers never go through tostring, which rounds.
local META, TASKS, READY, LEASED, LEASES, TRIES, WAITERS, SPARE, DEAD = unpack(KEYS)
local BASE = string.sub(META, 1, -5)
local APPLIED, ALREADY_ACKED, LEASE_LOST, DEAD_LETTERED = 1, 2, 3, 4
local RECLAIM_STEP = 200

local function int(number)
  return string.format('%.0f', number)
end

local function args_from(first)
  local list = {}
  for i = first, #ARGV do
    list[#list + 1] = ARGV[i]
  end
  return list
end

-- A Redis that is full refuses a script's first write unless it is a command that frees, and lets the rest through then.
local function first_free()
  redis.call('DEL', SPARE)
end

local function read_lease(token, record)
  local order, lease, renewed, holder, rest = string.match(record, '^(%d+) (%d+) (%d+) (%S+)(.*)$', 17)
  return {
    token = token, id = string.sub(record, 1, 16), order = tonumber(order), lease = tonumber(lease),
    renewed = tonumber(renewed), holder = holder, rest = rest,
  }
end

local function write_lease(lease)
  return table.concat({
    lease.id, int(lease.order), ' ', int(lease.lease), ' ', int(lease.renewed), ' ', lease.holder, lease.rest,
  })
end

-- A lease's member in LEASED.
local function member(lease)
  lease.member = lease.member or struct.pack('>I8', lease.order) .. lease.token
  return lease.member
end

-- deliveries, failures, expiries, and what a later version wrote behind them
local function read_tries(record)
  if not record then
    return 0, 0, 0, ''
  end
  local deliveries, failures, expiries, rest = string.match(record, '^(%d+) (%d+) (%d+)(.*)$')
  return tonumber(deliveries), tonumber(failures), tonumber(expiries), rest
end

-- The current lease of each token, or false, in order.
local function leases_of(tokens)
  if #tokens == 0 then
    return {}
  end
  local leases = redis.call('HMGET', LEASES, unpack(tokens))
  for i, record in ipairs(leases) do
    leases[i] = record and read_lease(tokens[i], record)
  end
  return leases
end

-- The leases of those tokens that are held, each once.
local function held_of(tokens)
  local held, twice = {}, {}
  for _, lease in ipairs(leases_of(tokens)) do
    if lease and not twice[lease.token] then
      twice[lease.token] = true
      held[#held + 1] = lease
    end
  end
  return held
end

-- The tokens that a pop leases under.
local function tokens_of_stem(stem, count)
  local tokens = {}
  for position = 0, count - 1 do
    tokens[position + 1] = stem .. string.char(math.floor(position / 256), position % 256)
  end
  return tokens
end

-- The tokens that the record of a pop's request names.
local function tokens_of_record(record)
  local tokens = {}
  for at = 17, record and #record or 0, 16 do
    tokens[#tokens + 1] = string.sub(record, at, at + 15)
  end
  return tokens
end

-- Where it is kept for a minute that a pop must not lease any more under its stem, or how a call ended that cannot be
-- told from its own second run.
local CALL_TTL = 60000
local function call_key(name)
  return BASE .. 'call:' .. name
end

-- A session, a hash, knows its stream, when that last took a step, and how many tasks each of its pops leased, by stem.
local SESSION_KEPT, STEM_BYTES = 600000, 14
local function session_key(session)
  return BASE .. 'session:' .. session
end

-- True if no other stream has it.
local function has_session(session, stream)
  local seen = redis.call('HMGET', session_key(session), 'stream', 'at')
  return not seen[1] or seen[1] == stream or now >= tonumber(seen[2]) + SESSION_KEPT
end

local function forget_old_session(session)
  local at = redis.call('HGET', session_key(session), 'at')
  if at and now >= tonumber(at) + SESSION_KEPT then
    redis.call('UNLINK', session_key(session))
  end
end

-- The stream has the session from now on; further fields may follow.
local function use_session(session, stream, ...)
  forget_old_session(session)
  redis.call('HSET', session_key(session), 'stream', stream, 'at', int(now), ...)
  expire(session_key(session), SESSION_KEPT)
end

-- A memory, 'acked' (sets) or 'requests' (hashes), has two generations. One takes entries for the window, or until it
-- has half of all; then the older is dropped and a new one begins. It is seen until twice the window after it began.
local function memory(kind)
  local at = redis.call('HMGET', META, kind .. ':at', kind .. ':0', kind .. ':1')
  return { kind = kind, at = tonumber(at[1] or '0'), began = { [0] = tonumber(at[2] or '0'), [1] = tonumber(at[3] or '0') } }
end

local function generation_key(mem, generation)
  return BASE .. mem.kind .. ':' .. generation
end

-- The keys of the generations that are still seen, the current one first.
local function seen_generations(mem)
  local keys = {}
  for _, generation in ipairs({ mem.at, 1 - mem.at }) do
    if now < mem.began[generation] + 2 * tonumber(ARGV[1]) then
      keys[#keys + 1] = generation_key(mem, generation)
    end
  end
  return keys
end

-- Puts entries in a memory, by `command`. Begins a new generation when it is time. A generation vanishes when it is not
-- seen any more, so that a queue that nobody uses keeps none.
local function remember(kind, size_command, command, ...)
  local mem, window = memory(kind), tonumber(ARGV[1])
  local key = generation_key(mem, mem.at)
  local begins = now >= mem.began[mem.at] + window or redis.call(size_command, key) >= tonumber(ARGV[2])
  if begins then
    mem.at = 1 - mem.at
    key = generation_key(mem, mem.at)
    redis.call('UNLINK', key)
    redis.call('HSET', META, kind .. ':at', mem.at, kind .. ':' .. mem.at, int(now))
  end
  redis.call(command, key, ...)
  if begins then
    expire(key, 2 * window)
  end
end

local function recall_request(field)
  for _, key in ipairs(seen_generations(memory('requests'))) do
    local record = redis.call('HGET', key, field)
    if record then
      return record
    end
  end
  return false
end

local function remember_request(field, record)
  remember('requests', 'HLEN', 'HSET', field, record)
end

-- Fills the holes of `outcomes` where the token is not held: acked before, or lost.
local function outcomes_of_others(tokens, outcomes)
  local keys
  for i, token in ipairs(tokens) do
    if not outcomes[i] then
      keys = keys or seen_generations(memory('acked'))
      outcomes[i] = LEASE_LOST
      for _, key in ipairs(keys) do
        if redis.call('SISMEMBER', key, token) == 1 then
          outcomes[i] = ALREADY_ACKED
        end
      end
    end
  end
  return outcomes
end

local function ack(tokens)
  local outcomes, gone, members, ids, twice = {}, {}, {}, {}, {}
  for i, lease in ipairs(leases_of(tokens)) do
    if lease and not twice[lease.token] then
      twice[lease.token] = true
      outcomes[i] = APPLIED
      gone[#gone + 1] = lease.token
      members[#members + 1] = member(lease)
      ids[#ids + 1] = lease.id
    elseif lease then
      outcomes[i] = ALREADY_ACKED
    end
  end
  outcomes_of_others(tokens, outcomes)
  if #gone > 0 then
    redis.call('ZREM', LEASED, unpack(members))
    redis.call('HDEL', LEASES, unpack(gone))
    redis.call('HDEL', TASKS, unpack(ids))
    redis.call('HDEL', TRIES, unpack(ids))
    redis.call('HINCRBY', META, 'acked', #gone)
    remember('acked', 'SCARD', 'SADD', unpack(gone))
  end
  return outcomes
end

-- Ends leases and puts their tasks at the head in the order of their delivery. Counts for each a delivery if `deliveries`
-- is 1, and an expiry if `expiries` is; what expired once too often is a dead letter. Returns how many went to the head,
-- and the set of the other tokens.
local function to_head(leases, deliveries, expiries)
  local tokens, members, ids, ready, dead, given_up = {}, {}, {}, {}, {}, {}
  if #leases == 0 then
    return 0, given_up
  end
  table.sort(leases, function(a, b) return a.order > b.order end)
  for i, lease in ipairs(leases) do
    tokens[i] = lease.token
    members[i] = member(lease)
    ids[i] = lease.id
  end
  local records = {}
  if deliveries + expiries > 0 then
    for i, record in ipairs(redis.call('HMGET', TRIES, unpack(ids))) do
      local d, f, e, rest = read_tries(record)
      records[2 * i - 1] = ids[i]
      records[2 * i] = table.concat({ int(d + deliveries), ' ', int(f), ' ', int(e + expiries), rest })
      given_up[tokens[i]] = expiries > 0 and e + expiries >= tonumber(ARGV[6]) or nil
    end
  end
  for i, id in ipairs(ids) do
    if given_up[tokens[i]] then
      dead[#dead + 1] = int(now)
      dead[#dead + 1] = id
    else
      ready[#ready + 1] = id
    end
  end
  redis.call('ZREM', LEASED, unpack(members))
  redis.call('HDEL', LEASES, unpack(tokens))
  if #ready > 0 then
    redis.call('LPUSH', READY, unpack(ready))
    redis.call('HINCRBY', META, 'ready', #ready)
  end
  if #dead > 0 then
    redis.call('ZADD', DEAD, unpack(dead))
  end
  if #records > 0 then
    redis.call('HSET', TRIES, unpack(records))
  end
  return #ready, given_up
end

-- Takes a try off the leases that it was answered with. Returns those of which no other try is left.
local function disown(leases, attempt)
  local ownerless, kept = {}, {}
  for _, lease in ipairs(leases) do
    local others, found = {}, false
    for holder in string.gmatch(lease.holder, '[^,]+') do
      if holder == attempt then
        found = true
      else
        others[#others + 1] = holder
      end
    end
    if found and #others == 0 then
      ownerless[#ownerless + 1] = lease
    elseif found then
      lease.holder = table.concat(others, ',')
      kept[#kept + 1] = lease.token
      kept[#kept + 1] = write_lease(lease)
    end
  end
  if #kept > 0 then
    first_free()
    redis.call('HSET', LEASES, unpack(kept))
  end
  return ownerless
end

-- Takes back leases that ran out, the latest deadlines first, of equal ones the last delivered. Returns how many tasks
-- went to the head, and whether there are more.
local function reclaim()
  local tokens = redis.call('ZREVRANGEBYSCORE', LEASED, now, '-inf', 'LIMIT', 0, RECLAIM_STEP)
  for i, member_of_lease in ipairs(tokens) do
    tokens[i] = string.sub(member_of_lease, 9)
  end
  local ready = to_head(leases_of(tokens), 1, 1)
  return ready, #tokens == RECLAIM_STEP and redis.call('ZCOUNT', LEASED, '-inf', now) > 0
end

-- How long until the first lease runs out, or -1.
local function due_in()
  local first = redis.call('ZRANGE', LEASED, 0, 0, 'WITHSCORES')
  return first[2] and math.max(0, first[2] - now) or -1
end

local function ready_count()
  return tonumber(redis.call('HGET', META, 'ready') or '0')
end

-- Says on this queue's behalf, until `ttl` ms from now, that this server waits.
local function announce(ttl)
  first_free()
  redis.call('ZREMRANGEBYSCORE', WAITERS, '-inf', now)
  redis.call('ZADD', WAITERS, now + ttl, ARGV[3])
  redis.call('PEXPIRE', WAITERS, ttl)
end

-- Tells the other servers that wait here about `count` tasks. A hint: it may be lost, they also look by themselves.
local function wake_others(count)
  for _, server in ipairs(redis.call('ZRANGEBYSCORE', WAITERS, now, '+inf')) do
    if server ~= ARGV[3] then
      redis.call('PUBLISH', ARGV[5] .. server, int(count) .. ' ' .. ARGV[4])
    end
  end
end
