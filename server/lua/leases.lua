-- Leases. Those that one pop made are a batch: in LEASES, under the stem of their tokens, there is one record of what they
-- have in common and of the ids of their tasks, and in LEASED one member. When some of them get another deadline or holder
-- than the others, the batch is split: each has a record of its own then, under its token, and a member, and is a batch of
-- one; the batch itself stays, for what it knows of its end. Which leases of a batch have ended is in its map, a byte for
-- each, under the stem and '-', once some have and others have not.
--
-- A record: order of the first, lease, renewed; count, 1 if it is split, length of holders; holders, ids unless it is
-- split. Holders are the tries of a repeatable pop that were answered with it, with commas between, or '-'.
-- A member: the order as 8 bytes, then the key of the record.
-- The last one tells of one that is held that its task goes when it would go back.
local APPLIED, ALREADY_ACKED, LEASE_LOST, DOOMED = '1', '2', '3', '4'
local RECLAIM_STEP = 200
local ENDED = 1
-- Whether there is what is not often there: tries, and what is rare.
local is_odd
local HEADER = '>I8I8I8BBBc0'
local sub, byte = string.sub, string.byte

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
  return sub(batch.record, from, from + 15)
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
    for at = STEM_BYTES + 1, #run, RANGE_BYTES do
      local high, low, length = byte(run, at, at + 2)
      for place = 256 * high + low + 1, 256 * high + low + length do
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

-- Whether the memory's ranges have a position. No batch has one that needs more than a byte.
local function is_among(ranges, position)
  for at = 1, position < 256 and #ranges - 1 or 0, 2 do
    local first, last = byte(ranges, at, at + 1)
    if first <= position and position <= last then
      return true
    end
  end
  return false
end

-- Fills the holes of `outcomes` where the token is not held: acked before, or lost.
local function outcomes_of_others(runs, outcomes)
  local keys, i = nil, 0
  for _, run in ipairs(runs) do
    local acked
    for at = STEM_BYTES + 1, #run, RANGE_BYTES do
      local high, low, length = byte(run, at, at + 2)
      for position = 256 * high + low, 256 * high + low + length - 1 do
        i = i + 1
        if not outcomes[i] then
          if not acked then
            acked, keys = {}, keys or seen_generations(memory('acked'))
            for n, key in ipairs(keys) do
              acked[n] = redis.call('HGET', key, sub(run, 1, STEM_BYTES)) or ''
            end
          end
          outcomes[i] = LEASE_LOST
          for _, ranges in ipairs(acked) do
            outcomes[i] = is_among(ranges, position) and ALREADY_ACKED or outcomes[i]
          end
        end
      end
    end
  end
  return outcomes
end

-- Ranges, and others; where one of those follows the last before it, they become one.
local function with_ranges(ranges, others)
  for at = 1, #others, 2 do
    local first, last = byte(others, at, at + 1)
    if #ranges > 0 and byte(ranges, -1) + 1 == first then
      ranges = sub(ranges, 1, -2) .. string.char(last)
    else
      ranges = ranges .. string.char(first, last)
    end
  end
  return ranges
end

-- Remembers acks: `fields` has them of batches that had none before, stem and ranges in turn; `more` has those of others.
local function remember_acks(fields, more, entered)
  local key, is_new = open_generation('acked', entered)
  local stems, known = {}, {}
  for i, batch in ipairs(more) do
    stems[i] = batch.key
  end
  if #stems > 0 and not is_new then
    known = redis.call('HMGET', key, unpack(stems))
  end
  for i, batch in ipairs(more) do
    fields[#fields + 1] = batch.key
    fields[#fields + 1] = with_ranges(known[i] or '', batch.acked)
  end
  redis.call('HSET', key, unpack(fields))
  if is_new then
    expire(key, 2 * tonumber(ARGV[1]))
  end
end

-- Ends in memory what is held of these tokens. Puts the ids of the tasks behind `ids`, and the batches, with the ranges that
-- were acked, behind `batches`. Returns the outcomes.
local function end_tasks(runs, ids, batches)
  local found, places, count = find(runs)
  local outcomes, all = {}, true
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
        batch.acked = ''
        batches[#batches + 1] = batch
      end
      batch.acked = batch.acked .. string.char(place - 1, place - 1)
    end
  end
  return all and outcomes or outcomes_of_others(runs, outcomes)
end

-- What of a batch's record, if there is one and it is not split, tells where its ids are: how many, and behind what.
local function shape(record)
  if not record then
    return 0
  end
  local count, is_split, holders = byte(record, 25, 27)
  return is_split == 0 and count or 0, 27 + holders
end

-- The maps of batches of several, given by their stems and records, for the runs at `wide`.
local function maps_at(wide, stems)
  if #wide == 0 then
    return {}
  end
  local fields = {}
  for n, i in ipairs(wide) do
    fields[n] = stems[i] .. '-'
  end
  return redis.call('HMGET', LEASES, unpack(fields))
end

-- Ends tasks. Returns the outcomes. A run that is one range of leases that all are held, as it is where tasks are popped one
-- by one, or acked as they came, is ended without much ado; records are read as `write_batch` makes them.
local function ack(runs)
  if #runs == 0 then
    return ''
  end
  local stems, outcomes, again = {}, {}, {}
  for i, run in ipairs(runs) do
    local stem = sub(run, 1, STEM_BYTES)
    stems[i], again[stem] = stem, again[stem] ~= nil
  end
  local records = redis.call('HMGET', LEASES, unpack(stems))
  local ids, fields, members, acked, more, maps, wide, rest, rest_at = {}, {}, {}, {}, {}, {}, {}, {}, {}
  for i, run in ipairs(runs) do
    local stem, record = stems[i], records[i]
    local count, behind = shape(record)
    if count == 1 and not again[stem] and sub(run, STEM_BYTES + 1) == '\0\0\1' then
      local n = #fields + 1
      ids[n], fields[n], members[n] = sub(record, behind + 1, behind + 16), stem, sub(record, 1, 8) .. stem
      acked[2 * n - 1], acked[2 * n] = stem, '\0\0'
      outcomes[i] = APPLIED
    elseif count > 1 and not again[stem] and #run == STEM_BYTES + RANGE_BYTES then
      wide[#wide + 1] = i
    else
      rest[#rest + 1], rest_at[#rest_at + 1] = run, i
    end
  end
  for n, map in ipairs(maps_at(wide, stems)) do
    local i = wide[n]
    local stem, record = stems[i], records[i]
    local count, behind = shape(record)
    local high, low, length = byte(runs[i], STEM_BYTES + 1, -1)
    local first = 256 * high + low
    local last = first + length
    local before = map or string.rep('\0', count)
    if last > count or string.find(sub(before, first + 1, last), '\1', 1, true) then
      rest[#rest + 1], rest_at[#rest_at + 1] = runs[i], i
    else
      for from = behind + 16 * first + 1, behind + 16 * last, 16 do
        ids[#ids + 1] = sub(record, from, from + 15)
      end
      outcomes[i] = string.rep(APPLIED, length)
      local range = string.char(first, last - 1)
      if map then
        more[#more + 1] = { key = stem, acked = range }
      else
        acked[#acked + 1] = stem
        acked[#acked + 1] = range
      end
      local after = sub(before, 1, first) .. string.rep('\1', length) .. sub(before, last + 1)
      if string.find(after, '\0', 1, true) then
        maps[#maps + 1] = stem .. '-'
        maps[#maps + 1] = after
      else
        fields[#fields + 1] = stem
        fields[#fields + 1] = map and stem .. '-' or nil
        members[#members + 1] = sub(record, 1, 8) .. stem
      end
    end
  end
  local of_rest = #rest > 0 and end_tasks(rest, ids, more) or {}
  local at = 0
  for n, i in ipairs(rest_at) do
    local length = 0
    for from = STEM_BYTES + RANGE_BYTES, #rest[n], RANGE_BYTES do
      length = length + byte(rest[n], from)
    end
    outcomes[i] = table.concat(of_rest, '', at + 1, at + length)
    at = at + length
  end
  if #ids > 0 then
    local before = redis.call('HMGET', META, 'acked', 'leased')
    local entered, leased = tonumber(before[1] or '0'), (before[2] or 0) - #ids
    redis.call('HDEL', TASKS, unpack(ids))
    redis.call('HSET', META, 'acked', int(entered + #ids), 'leased', int(leased))
    remember_acks(acked, more, entered)
    if #fields > 0 then
      redis.call('HDEL', LEASES, unpack(fields))
      redis.call('ZREM', LEASED, unpack(members))
    end
    if #maps > 0 then
      redis.call('HSET', LEASES, unpack(maps))
    end
    if #ending > 0 then
      write_ends()
    end
    if is_rare == nil then
      is_odd = redis.call('EXISTS', TRIES, RARE) > 0
      is_rare = is_odd and redis.call('EXISTS', RARE) == 1
    end
    if is_rare then
      local rare = rarely()
      rare.forget_all_but_tasks(ids, rare.plans_of(ids))
      rare.unlease(ids)
    elseif is_odd then
      redis.call('HDEL', TRIES, unpack(ids))
    end
  end
  return table.concat(outcomes)
end
