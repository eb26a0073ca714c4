-- What goes back to the head, and what a queue looks like.

-- deliveries, failures, expiries, and what a later version wrote behind them
local function read_tries(record)
  if not record then
    return 0, 0, 0, ''
  end
  local deliveries, failures, expiries, rest = string.match(record, '^(%d+) (%d+) (%d+)(.*)$')
  return tonumber(deliveries), tonumber(failures), tonumber(expiries), rest
end

-- Ends leases and puts their tasks at the head in the order of their delivery; each is given as {batch, place}. Counts for
-- each a delivery if `deliveries` is 1, and an expiry if `expiries` is; what expired once too often is a dead letter, and
-- its entry is marked so. Returns how many went to the head.
local function to_head(leases, deliveries, expiries)
  if #leases == 0 then
    return 0
  end
  local ids, ready, dead, records = {}, {}, {}, {}
  for _, lease in ipairs(leases) do
    lease.order = lease[1].order + lease[2]
    lease.id = id_at(lease[1], lease[2])
    end_lease(lease[1], lease[2])
  end
  table.sort(leases, function(a, b) return a.order > b.order end)
  for i, lease in ipairs(leases) do
    ids[i] = lease.id
  end
  if deliveries + expiries > 0 then
    for i, record in ipairs(redis.call('HMGET', TRIES, unpack(ids))) do
      local d, f, e, rest = read_tries(record)
      records[2 * i - 1] = ids[i]
      records[2 * i] = table.concat({ int(d + deliveries), ' ', int(f), ' ', int(e + expiries), rest })
      leases[i].is_dead = expiries > 0 and e + expiries >= tonumber(ARGV[6])
    end
  end
  for _, lease in ipairs(leases) do
    if lease.is_dead then
      dead[#dead + 1] = int(now)
      dead[#dead + 1] = lease.id
    else
      ready[#ready + 1] = lease.id
    end
  end
  write_ends()
  redis.call('HINCRBY', META, 'leased', -#leases)
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
  return #ready
end

-- Takes back leases that ran out, the latest deadlines first, of equal ones the last delivered. Returns how many tasks
-- went to the head, and whether there are more.
local function reclaim()
  local members = redis.call('ZREVRANGEBYSCORE', LEASED, now, '-inf', 'LIMIT', 0, RECLAIM_STEP)
  if #members == 0 then
    return 0, false
  end
  local keys, stems, by_stem = {}, {}, {}
  for i, of_batch in ipairs(members) do
    keys[i] = string.sub(of_batch, 9)
    local stem = string.sub(keys[i], 1, STEM_BYTES)
    if stem ~= keys[i] and not by_stem[stem] then
      by_stem[stem] = true
      stems[#stems + 1] = stem
    end
  end
  for i, batch in ipairs(read_batches(stems)) do
    by_stem[stems[i]] = batch
  end
  local leases = {}
  for i, batch in ipairs(read_batches(keys)) do
    if not batch then
      redis.call('ZREM', LEASED, members[i])
    else
      if #batch.key > STEM_BYTES then
        batch.parent, batch.place = by_stem[string.sub(batch.key, 1, STEM_BYTES)], string.byte(batch.key, 16) + 1
      end
      for place = batch.count, 1, -1 do
        if batch.ended[place] ~= ENDED and #leases < RECLAIM_STEP then
          leases[#leases + 1] = { batch, place }
        end
      end
    end
  end
  local count = #leases
  local ready = to_head(leases, 1, 1)
  return ready, count == RECLAIM_STEP and redis.call('ZCOUNT', LEASED, '-inf', now) > 0
end

-- How long until the first lease runs out, or -1.
local function due_in()
  local first = redis.call('ZRANGE', LEASED, 0, 0, 'WITHSCORES')
  return first[2] and math.max(0, first[2] - now) or -1
end

local function ready_count()
  return tonumber(redis.call('HGET', META, 'ready') or '0')
end

-- Says on this queue's behalf that this server waits, until `ttl` ms from now. What it said last is good while half of that is
-- left: a name that stands too long costs others a hint to nobody.
local function announce(ttl)
  local said = redis.call('ZSCORE', WAITERS, ARGV[3])
  if said and said - now >= ttl / 2 then
    return
  end
  first_free()
  redis.call('ZREMRANGEBYSCORE', WAITERS, '-inf', now)
  redis.call('ZADD', WAITERS, now + ttl, ARGV[3])
  redis.call('PEXPIRE', WAITERS, ttl)
end
