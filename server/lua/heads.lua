-- What goes back to the head, and what a queue looks like.

-- deliveries, failures, expiries, and what a later version wrote behind them
local function read_tries(record)
  if not record then
    return 0, 0, 0, ''
  end
  local deliveries, failures, expiries, rest = string.match(record, '^(%d+) (%d+) (%d+)(.*)$')
  return tonumber(deliveries), tonumber(failures), tonumber(expiries), rest
end

-- Ends leases, each given as {batch, place}, and gives their tasks back, one after the other in the order of their delivery:
-- those without a delay go to the head. Of `back`: `deliveries` and `expiries`, 1 if that counts; of what a holder puts back
-- also whether it `failed` or `is_rejected`, `delay`, `reason`, `chance`, and the rules for what failed. Returns how many were put
-- back, how many of them are ready, how many are dead.
local function give_back(leases, back)
  if #leases == 0 then
    return 0, 0, 0
  end
  -- How a task whose lease ended is judged: of its record of tries and how many of the call went before it, whether it dies, else
  -- after how long it can be popped again; and its record then. Behind the counters there is, once a task failed or died, why it
  -- is dead (0: it is not, 1 failures, 2 expiries, 3 rejected), and how long and what its holder said last.
  local function judging()
    local rare = is_rare and rarely()
    local function rule(name, otherwise)
      return rare and rare.setting(name) or otherwise
    end
    local max_expiries = rule('max_expiries', tonumber(ARGV[6]))
    local max_failures = back.failed and rule('max_failures', back.max_failures)

    -- As the store's `Backoff` has it.
    local function backoff(failures, nth)
      local min, max = rule('backoff_min', back.backoff_min), rule('backoff_max', back.backoff_max)
      local span = math.min(min * 2 ^ math.min(math.max(failures - 1, 0), 40), math.max(min, max))
      local part = (back.chance + 40503 * nth) % 65536
      return span + math.floor(math.floor(span / 4) * part / 65536)
    end

    return function(record, nth)
      local d, f, e, rest = read_tries(record)
      local cause, delay = 0, 0
      d, f, e = d + back.deliveries, f + (back.failed and 1 or 0), e + back.expiries
      if back.expiries > 0 and e >= max_expiries then
        cause = 2
      elseif back.failed and f >= max_failures then
        cause = 1
      elseif back.is_rejected then
        cause = 3
      elseif back.delay or back.failed then
        delay = back.delay or backoff(f, nth)
      end
      local known, length, from = string.match(rest, '^ (%d) (%d+) ()')
      local said, later = '', rest
      if known then
        said, later = string.sub(rest, from, from + length - 1), string.sub(rest, from + length)
      end
      if back.failed or back.is_rejected then
        said = back.reason
      end
      if known or cause > 0 or said ~= '' then
        rest = table.concat({ ' ', int(cause), ' ', int(#said), ' ', said, later })
      end
      return cause > 0, delay, table.concat({ int(d), ' ', int(f), ' ', int(e), rest })
    end
  end

  local ids, ready, dead, later, records, gone, ended = {}, {}, {}, {}, {}, {}, {}
  for _, lease in ipairs(leases) do
    lease.order = lease[1].order + lease[2]
    lease.id = id_at(lease[1], lease[2])
    end_lease(lease[1], lease[2])
  end
  table.sort(leases, function(a, b) return a.order < b.order end)
  for i, lease in ipairs(leases) do
    ids[i] = lease.id
  end
  local is_counted = back.deliveries + back.expiries > 0
  local tries = is_counted and redis.call('HMGET', TRIES, unpack(ids)) or {}
  local judge = is_counted and judging()
  local rare = is_rare and rarely()
  local plans = rare and rare.plans_of(ids) or {}
  local cancelled = rare and rare.cancelled_among(ids) or {}
  for i, id in ipairs(ids) do
    local is_dead, delay, record = false, 0, nil
    if judge then
      is_dead, delay, record = judge(tries[i], i - 1)
    end
    if cancelled[id] then
      gone[#gone + 1] = id
    elseif not is_dead and plans[id] and plans[id].ends and plans[id].ends <= now then
      ended[#ended + 1] = id
    else
      if record then
        records[#records + 1] = id
        records[#records + 1] = record
      end
      if is_dead then
        dead[#dead + 1] = id
      elseif delay > 0 then
        later[#later + 1] = { id, now + delay }
      else
        ready[#ready + 1] = id
      end
    end
  end
  write_ends()
  redis.call('HINCRBY', META, 'leased', -#ids)
  local from_last = {}
  for i = #ready, 1, -1 do
    from_last[#from_last + 1] = ready[i]
  end
  if rare then
    rare.unlease(ids)
    rare.push('LPUSH', from_last, plans)
    rare.forget(gone, plans)
    rare.forget(ended, plans)
    rare.add('deleted', #gone)
    rare.add('expired', #ended)
  elseif #ready > 0 then
    redis.call('LPUSH', READY, unpack(from_last))
    redis.call('HINCRBY', META, 'ready', #ready)
  end
  if #later > 0 then
    rarely().schedule(later, plans)
  end
  if #dead > 0 then
    local scores = {}
    for i, id in ipairs(dead) do
      scores[2 * i - 1], scores[2 * i] = int(now), id
    end
    redis.call('ZADD', DEAD, unpack(scores))
    if rare then
      rare.free_keys(dead, plans)
      rare.forget_sizes(dead)
    end
  end
  if #records > 0 then
    redis.call('HSET', TRIES, unpack(records))
    is_odd = true
  end
  return #ready + #later, #ready, #dead
end

-- The batches, or false, of members of LEASED, in order. Those that were split off know where they came from.
local function batches_of(members)
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
  local batches = read_batches(keys)
  for _, batch in ipairs(batches) do
    if batch and #batch.key > STEM_BYTES then
      batch.parent, batch.place = by_stem[string.sub(batch.key, 1, STEM_BYTES)], string.byte(batch.key, 16) + 1
    end
  end
  return batches
end

-- Does what its time has come for, a step of each: tasks whose time is over go; leases that ran out are taken back, the latest
-- deadlines first, of equal ones the last delivered; what is due is put at the tail. Returns how many tasks became ready,
-- whether there are more, and whether among those are tasks whose time is over and that may still stand in a line.
local function reclaim()
  local members = redis.call('ZREVRANGEBYSCORE', LEASED, now, '-inf', 'LIMIT', 0, RECLAIM_STEP)
  if #members == 0 and not is_rare then
    return 0, false, false
  end
  local more_ended, more_dead
  if is_rare then
    more_ended, more_dead = rarely().end_tasks()
  end
  local leases = {}
  for i, batch in ipairs(batches_of(members)) do
    if not batch then
      redis.call('ZREM', LEASED, members[i])
    else
      for place = batch.count, 1, -1 do
        if batch.ended[place] ~= ENDED and #leases < RECLAIM_STEP then
          leases[#leases + 1] = { batch, place }
        end
      end
    end
  end
  local count = #leases
  local _, ready = give_back(leases, { deliveries = 1, expiries = 1 })
  local more = count == RECLAIM_STEP and redis.call('ZCOUNT', LEASED, '-inf', now) > 0 or more_ended or more_dead or false
  -- What is due may have ended, too.
  if is_rare and not more_ended then
    local due, more_due = rarely().make_due_ready()
    ready, more = ready + due, more or more_due
  end
  return ready, more, more_ended
end

-- How long until the first lease runs out or the first task falls due; -1 if there is none, or nothing is delivered.
local function due_in()
  local first = redis.call('ZRANGE', LEASED, 0, 0, 'WITHSCORES')
  local at = tonumber(first[2] or math.huge)
  if is_rare then
    at = rarely().is_paused() and math.huge or math.min(at, rarely().first_due())
  end
  return at < math.huge and math.max(0, at - now) or -1
end

-- How many tasks can be popped.
local function ready_count()
  return is_rare and rarely().is_paused() and 0 or tonumber(redis.call('HGET', META, 'ready') or '0')
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
