-- Leases. Those that one pop made are a batch: in LEASES, under the stem of their tokens, there is one record of what they
-- have in common and of the ids of their tasks, and in LEASED one member. When some of them get another deadline or holder
-- than the others, the batch is split: each has a record of its own then, under its token, and a member, and is a batch of
-- one; the batch itself stays, for what it knows of its end. Which leases of a batch have ended is in its map, a byte for
-- each, under the stem and '-', once some have and others have not.
--
-- A record: order of the first, lease, renewed; count, 1 if it is split, length of holders; holders, ids unless it is
-- split. Holders are the tries of a repeatable pop that were answered with it, with commas between, or '-'.
-- A member: the order as 8 bytes, then the key of the record.
local APPLIED, ALREADY_ACKED, LEASE_LOST, DEAD_LETTERED = '1', '2', '3', '4'
local RECLAIM_STEP = 200
local ENDED = 1
local HEADER = '>I8I8I8BBBc0'

local function read_batch(key, record)
  local order, lease, renewed, count, split, holders, ids = struct.unpack(HEADER, record)
  return {
    key = key, record = record, order = order, lease = lease, renewed = renewed, count = count, split = split == 1,
    holders = holders, ids = ids, left = count, ended = {},
  }
end

-- Its record; `rest` is what stands behind the header.
local function write_batch(batch, rest)
  local header = struct.pack(
    HEADER, batch.order, batch.lease, batch.renewed, batch.count, batch.split and 1 or 0, #batch.holders, batch.holders
  )
  return header .. (rest or string.sub(batch.record, batch.ids))
end

local function member(batch)
  return struct.pack('>I8', batch.order) .. batch.key
end

local function id_at(batch, place)
  local from = batch.ids + 16 * place - 16
  return string.sub(batch.record, from, from + 15)
end

-- The token at a place, which counts from 1.
local function token_at(batch, place)
  if #batch.key > STEM_BYTES then
    return batch.key
  end
  return batch.key .. string.char(0, place - 1)
end

-- The batches under these keys, or false, in order, and which of their leases have ended.
local function read_batches(keys)
  if #keys == 0 then
    return {}
  end
  local batches, many, fields = redis.call('HMGET', LEASES, unpack(keys)), {}, {}
  for i = 1, #keys do
    if batches[i] then
      local batch = read_batch(keys[i], batches[i])
      batches[i] = batch
      if batch.count > 1 then
        many[#many + 1] = batch
        fields[#fields + 1] = batch.key .. '-'
      end
    end
  end
  if #many > 0 then
    local maps = redis.call('HMGET', LEASES, unpack(fields))
    for i, batch in ipairs(many) do
      if maps[i] then
        local map = string.sub(maps[i], 1, batch.count)
        batch.has_map = true
        batch.ended = { string.byte(map, 1, -1) }
        batch.left = select(2, string.gsub(map, '%z', ''))
      end
    end
  end
  return batches
end

-- Reads leases that were split off, by their tokens. Each knows where it came from.
local function read_split(tokens, parents)
  local leases = read_batches(tokens)
  for i, token in ipairs(tokens) do
    if leases[i] then
      leases[i].parent = parents[i]
      leases[i].place = string.byte(token, 16) + 1
    end
  end
  return leases
end

-- Of each token in the runs, in order: the batch in which it is held, or false, and its place there.
local function find(runs)
  local by_stem, stems = {}, {}
  for _, run in ipairs(runs) do
    local stem = string.sub(run, 1, STEM_BYTES)
    if by_stem[stem] == nil then
      by_stem[stem] = false
      stems[#stems + 1] = stem
    end
  end
  for i, batch in ipairs(read_batches(stems)) do
    by_stem[stems[i]] = batch
  end
  local found, places, count = {}, {}, 0
  local split, tokens, parents = {}, {}, {}
  for _, run in ipairs(runs) do
    local batch = by_stem[string.sub(run, 1, STEM_BYTES)]
    local last = batch and batch.count or 0
    for at = STEM_BYTES + 1, #run, 2 do
      local high, low = string.byte(run, at, at + 1)
      local place = 256 * high + low + 1
      count = count + 1
      places[count] = place
      found[count] = place <= last and batch.ended[place] ~= ENDED and batch
      if found[count] and batch.split then
        split[#split + 1] = count
        tokens[#tokens + 1] = token_at(batch, place)
        parents[#parents + 1] = batch
      end
    end
  end
  if #split > 0 then
    local leases, by_token = read_split(tokens, parents), {}
    for i, at in ipairs(split) do
      by_token[tokens[i]] = by_token[tokens[i]] or leases[i]
      found[at], places[at] = by_token[tokens[i]], 1
    end
  end
  return found, places, count
end

-- The batches in which what a pop leased is held: one, or one for each lease that was split off.
local function held_under(stem)
  local batch = read_batches({ stem })[1]
  if not batch or not batch.split then
    return { batch or nil }
  end
  local tokens, parents = {}, {}
  for place = 1, batch.count do
    if batch.ended[place] ~= ENDED then
      tokens[#tokens + 1] = token_at(batch, place)
      parents[#parents + 1] = batch
    end
  end
  return read_split(tokens, parents)
end

-- The places of a batch's leases that are held, in the order of their delivery.
local function held_places(batch)
  local places = {}
  for place = 1, batch.count do
    if batch.ended[place] ~= ENDED then
      places[#places + 1] = place
    end
  end
  return places
end

-- Gives each of a batch's leases a record of its own. Returns them by place.
local function split(batch)
  local deadline = redis.call('ZSCORE', LEASED, member(batch))
  local rest, leases = string.sub(batch.record, batch.ids + 16 * batch.count), {}
  local records, scores = {}, {}
  for _, place in ipairs(held_places(batch)) do
    local lease = {
      key = token_at(batch, place), order = batch.order + place - 1, lease = batch.lease, renewed = batch.renewed,
      count = 1, split = false, holders = batch.holders, left = 1, ended = {}, parent = batch, place = place,
    }
    lease.record = write_batch(lease, id_at(batch, place) .. rest)
    lease.ids = batch.ids
    leases[place] = lease
    records[#records + 1] = lease.key
    records[#records + 1] = lease.record
    scores[#scores + 1] = deadline
    scores[#scores + 1] = member(lease)
  end
  batch.split = true
  redis.call('ZREM', LEASED, member(batch))
  redis.call('HSET', LEASES, batch.key, write_batch(batch, rest), unpack(records))
  redis.call('ZADD', LEASED, unpack(scores))
  return leases
end

-- Splits the batches that were found in part only, so that the others can be changed as a whole. Returns all that are to be
-- changed; `found` and `places` point to them then.
local function apart(found, places, count)
  local batches, wanted = {}, {}
  for i = 1, count do
    local batch = found[i]
    if batch then
      if not wanted[batch] then
        wanted[batch] = { count = 0 }
        batches[#batches + 1] = batch
      end
      if not wanted[batch][places[i]] then
        wanted[batch][places[i]] = true
        wanted[batch].count = wanted[batch].count + 1
      end
    end
  end
  local whole, leases = {}, {}
  for _, batch in ipairs(batches) do
    if wanted[batch].count == batch.left then
      whole[#whole + 1] = batch
    else
      leases[batch] = split(batch)
      for place, lease in pairs(leases[batch]) do
        if wanted[batch][place] then
          whole[#whole + 1] = lease
        end
      end
    end
  end
  for i = 1, count do
    local of_batch = leases[found[i]]
    if of_batch then
      found[i], places[i] = of_batch[places[i]], 1
    end
  end
  return whole
end

-- Batches of which leases have ended, not written yet.
local ending = {}

local function mark_ended(batch, place)
  batch.ended[place] = ENDED
  batch.left = batch.left - 1
  if not batch.is_ending then
    batch.is_ending = true
    ending[#ending + 1] = batch
  end
end

-- Ends a lease, in memory; `write_ends` follows.
local function end_lease(batch, place)
  mark_ended(batch, place)
  if batch.parent then
    mark_ended(batch.parent, batch.place)
  end
end

local function write_ends()
  local members, fields, maps = {}, {}, {}
  for _, batch in ipairs(ending) do
    if batch.left == 0 then
      fields[#fields + 1] = batch.key
      if batch.has_map then
        fields[#fields + 1] = batch.key .. '-'
      end
      if not batch.split then
        members[#members + 1] = member(batch)
      end
    else
      for place = 1, batch.count do
        batch.ended[place] = batch.ended[place] or 0
      end
      batch.has_map = true
      maps[#maps + 1] = batch.key .. '-'
      maps[#maps + 1] = string.char(unpack(batch.ended, 1, batch.count))
    end
    batch.is_ending = nil
  end
  ending = {}
  if #members > 0 then
    redis.call('ZREM', LEASED, unpack(members))
  end
  if #fields > 0 then
    redis.call('HDEL', LEASES, unpack(fields))
  else
    first_free()
  end
  if #maps > 0 then
    redis.call('HSET', LEASES, unpack(maps))
  end
end

-- Fills the holes of `outcomes` where the token is not held: acked before, or lost.
local function outcomes_of_others(runs, outcomes)
  local keys, i = nil, 0
  for _, run in ipairs(runs) do
    for at = STEM_BYTES + 1, #run, 2 do
      i = i + 1
      if not outcomes[i] then
        outcomes[i] = LEASE_LOST
        keys = keys or seen_generations(memory('acked'))
        for _, key in ipairs(keys) do
          local acked = redis.call('HGET', key, string.sub(run, 1, STEM_BYTES))
          if acked and string.sub(run, at, at) == '\0' and string.find(acked, string.sub(run, at + 1, at + 1), 1, true) then
            outcomes[i] = ALREADY_ACKED
          end
        end
      end
    end
  end
  return outcomes
end

-- What a generation has of batches of which leases ended before, and the same with those acked now.
local function remember_acks(acked, entered)
  local key, is_new = open_generation('acked', entered)
  local known, stems = {}, {}
  for _, batch in ipairs(acked) do
    if batch.has_map and not is_new then
      stems[#stems + 1] = batch.key
    end
  end
  for i, places in ipairs(#stems > 0 and redis.call('HMGET', key, unpack(stems)) or {}) do
    known[stems[i]] = places
  end
  local fields = {}
  for i, batch in ipairs(acked) do
    fields[2 * i - 1] = batch.key
    fields[2 * i] = (known[batch.key] or '') .. string.char(unpack(batch.acked))
  end
  redis.call('HSET', key, unpack(fields))
  if is_new then
    expire(key, 2 * tonumber(ARGV[1]))
  end
end

-- Ends tasks. Returns the outcomes.
local function ack(runs)
  if #runs == 0 then
    return ''
  end
  local found, places, count = find(runs)
  local outcomes, ids, acked, all = {}, {}, {}, true
  for i = 1, count do
    local batch, place = found[i], places[i]
    if not batch then
      all = false
    elseif batch.ended[place] == ENDED then
      outcomes[i] = ALREADY_ACKED
    else
      outcomes[i] = APPLIED
      end_lease(batch, place)
      ids[#ids + 1] = id_at(batch, place)
      if batch.parent then
        batch, place = batch.parent, batch.place
      end
      if not batch.acked then
        batch.acked = {}
        acked[#acked + 1] = batch
      end
      batch.acked[#batch.acked + 1] = place - 1
    end
  end
  if not all then
    outcomes_of_others(runs, outcomes)
  end
  if #ids > 0 then
    redis.call('HDEL', TASKS, unpack(ids))
    remember_acks(acked, redis.call('HINCRBY', META, 'acked', #ids) - #ids)
    write_ends()
    redis.call('HINCRBY', META, 'leased', -#ids)
    if redis.call('EXISTS', TRIES) == 1 then
      redis.call('HDEL', TRIES, unpack(ids))
    end
  end
  return table.concat(outcomes)
end

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

-- All leases of batches, as `to_head` takes them.
local function all_of(batches)
  local leases = {}
  for _, batch in ipairs(batches) do
    for _, place in ipairs(held_places(batch)) do
      leases[#leases + 1] = { batch, place }
    end
  end
  return leases
end

-- Takes a try off the batches that it was answered with. Returns those of which no other try is left.
local function disown(batches, attempt)
  local ownerless, kept = {}, {}
  for _, batch in ipairs(batches) do
    local others, found = {}, false
    for holder in string.gmatch(batch.holders, '[^,]+') do
      if holder == attempt then
        found = true
      else
        others[#others + 1] = holder
      end
    end
    if found and #others == 0 then
      ownerless[#ownerless + 1] = batch
    elseif found then
      batch.holders = table.concat(others, ',')
      kept[#kept + 1] = batch.key
      kept[#kept + 1] = write_batch(batch)
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

-- Says on this queue's behalf, until `ttl` ms from now, that this server waits.
local function announce(ttl)
  first_free()
  redis.call('ZREMRANGEBYSCORE', WAITERS, '-inf', now)
  redis.call('ZADD', WAITERS, now + ttl, ARGV[3])
  redis.call('PEXPIRE', WAITERS, ttl)
end

-- For a minute: how a call ended that cannot be told from its own second run; and under which stems a pop must not lease
-- any more, in one ZSET, stem -> until when.
local CALL_TTL = 60000
local WITHDRAWN = BASE .. 'withdrawn'
local function call_key(name)
  return BASE .. 'call:' .. name
end
