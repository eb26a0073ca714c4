-- Lists tasks of a state, a page at a time.
--
-- KEYS     as in common.lua
-- ARGV     7 the state: 'ready', 'scheduled', 'leased', 'dead', 8 where the page before ended, or '', 9 at most so many, 10 when the
--          envelopes have so many bytes, no further task is listed
-- Returns  {1 if the queue exists, where this page ended, or '' if that was all, of each task what `see` tells…}
--
-- Such a place is what the state's tasks are ordered by. Ready: the priority, a byte, and the number of its place in that list,
-- 8 bytes, as lines.lua has it. Scheduled and dead: the score, 8 bytes, and the member.
-- Leased: the deadline and the order of the delivery, 8 bytes each.
local state, after, most, max_bytes = ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
-- What insert.lua puts behind an envelope.
local INSERTED_AT_BYTES = 9
-- Of members of LEASED, each of up to 200 leases.
local AT_ONCE = 20
is_rare = redis.call('EXISTS', RARE) == 1
local rare, page, bytes, skipped, last, has_more = rarely(), {}, 0, 0, nil, false

-- Takes a task into the page, unless it is gone. False if that is full, and there is more.
local function take(id, at, place)
  local size = redis.call('HSTRLEN', TASKS, id)
  skipped = skipped + (size == 0 and 1 or 0)
  if skipped > rare.MAX_SKIPPED or size > 0 and (#page == most or bytes >= max_bytes) then
    has_more = true
    return false
  end
  last = place
  if size > 0 then
    bytes, page[#page + 1] = bytes + size - INSERTED_AT_BYTES, { id, at }
  end
  return true
end

local function list_ready()
  local priority, number
  if after ~= '' then
    priority, number = struct.unpack('>BI8', after)
  end
  for _, list in ipairs(rare.lists()) do
    local numbers = rare.numbers_of(list)
    local at = priority == list.priority and numbers.place_behind(number) or 0
    local ids = (not priority or list.priority <= priority) and { '' } or {}
    while #ids > 0 do
      ids = redis.call('LRANGE', list.key, at, at + most)
      for i, id in ipairs(ids) do
        if not take(id, -1, struct.pack('>BI8', list.priority, numbers.at(at + i - 1))) then
          return
        end
      end
      at = at + #ids
    end
  end
end

-- By bytes: Lua's own order of strings is that of a locale.
local function is_before(one, other)
  for at = 1, math.min(#one, #other) do
    local a, b = byte(one, at), byte(other, at)
    if a ~= b then
      return a < b
    end
  end
  return #one < #other
end

-- How many entries of a sorted set there are up to a score and a member.
local function rank_behind(key, score, up_to)
  local low, high = redis.call('ZCOUNT', key, '-inf', '(' .. score), redis.call('ZCOUNT', key, '-inf', score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_before(up_to, redis.call('ZRANGE', key, middle, middle)[1]) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

local function list_sorted(key, id_from)
  local at = 0
  if after ~= '' then
    at = rank_behind(key, int(struct.unpack('>I8', after)), sub(after, 9))
  end
  local entries = redis.call('ZRANGE', key, at, at + most, 'WITHSCORES')
  for i = 1, #entries, 2 do
    if not take(sub(entries[i], id_from), entries[i + 1], struct.pack('>I8', tonumber(entries[i + 1])) .. entries[i]) then
      return
    end
  end
  has_more = #entries > 2 * most
end

local function list_leased()
  local at, deadline, order = 0, -1, -1
  if after ~= '' then
    deadline, order = struct.unpack('>I8I8', after)
    -- The page may have ended within a batch.
    at = math.max(0, rank_behind(LEASED, int(deadline), sub(after, 9) .. string.rep('\255', STEM_BYTES + 2)) - 1)
  end
  while true do
    local entries, members = redis.call('ZRANGE', LEASED, at, at + AT_ONCE - 1, 'WITHSCORES'), {}
    for i = 1, #entries, 2 do
      members[#members + 1] = entries[i]
    end
    if #members == 0 then
      return
    end
    for i, batch in ipairs(batches_of(members)) do
      local ends = tonumber(entries[2 * i])
      for _, place in ipairs(batch and held_places(batch) or {}) do
        local nth = batch.order + place - 1
        if (ends > deadline or ends == deadline and nth > order)
          and not take(id_at(batch, place), int(ends), struct.pack('>I8I8', ends, nth)) then
          return
        end
      end
    end
    at = at + AT_ONCE
  end
end

if state == 'ready' then
  list_ready()
elseif state == 'leased' then
  list_leased()
elseif state == 'dead' then
  list_sorted(DEAD, 1)
else
  list_sorted(rare.SCHEDULED, 9)
end
return { redis.call('EXISTS', META), has_more and last or '', unpack(see(page)) }
