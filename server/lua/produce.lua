-- Puts a producer's inserts at the tail, those that it has not numbered before. Of the others the remembered answers are
-- given; as numbers ascend, those come first, and the new ones behind them are left to a further call. The first write is
-- one that a full Redis refuses.
--
-- KEYS     as in common.lua; built from data: producers ZSET, producer -> when it inserted something last;
--          producer:<producer> LIST of its last answers: number (8 bytes), fingerprint (16 bytes), ids
-- ARGV     7 producer, 8 pops that wait on this server, 9 answers to remember; then of each insert: number (8 bytes,
--          the highest first), fingerprint, how many tasks; then id, envelope of each of them
-- Returns  {0 inserted or answered again | 2 the next number has other content | 3 the next number is not known any more,
--          1 if this made the queue, how many were inserted, the ids of each that is answered again…}
local PRODUCERS, PRODUCER = BASE .. 'producers', BASE .. 'producer:' .. ARGV[7]
local NUMBER, FINGERPRINT = 8, 16
local FORGOTTEN_AT_ONCE = 200
local HEAD = NUMBER + FINGERPRINT
local window = tonumber(ARGV[1])

-- Numbers have 64 bits, which Lua's own do not; and its order of strings is that of a locale.
local function is_after(number, other)
  local high, low = struct.unpack('>I4I4', number)
  local other_high, other_low = struct.unpack('>I4I4', other)
  return high > other_high or (high == other_high and low > other_low)
end

-- Where the answer to a number is, not before `low`, and the answer; it is looked for at `low` first.
local function find(number, low, high)
  local middle = low
  while low <= high do
    local answer = redis.call('LINDEX', PRODUCER, middle)
    if answer and string.sub(answer, 1, NUMBER) == number then
      return middle, answer
    elseif answer and is_after(number, answer) then
      low = middle + 1
    else
      high = middle - 1
    end
    middle = math.floor((low + high) / 2)
  end
end

-- Where the arguments of the next insert begin.
local function behind(at)
  return at + 3 + 2 * tonumber(ARGV[at + 2])
end

local seen = redis.call('ZMSCORE', PRODUCERS, ARGV[7])[1]
local known = seen and now < seen + 2 * window
local last = known and redis.call('LINDEX', PRODUCER, -1)

if last and not is_after(ARGV[10], last) then
  local answers, at, low, high = { 0, 0, 0 }, 10, 0, tonumber(ARGV[9]) - 1
  while at <= #ARGV and not is_after(ARGV[at], last) do
    local place, answer = find(ARGV[at], low, high)
    if not place then
      answers[1] = 3
      return answers
    elseif string.sub(answer, NUMBER + 1, HEAD) ~= ARGV[at + 1] then
      answers[1] = 2
      return answers
    end
    answers[#answers + 1] = string.sub(answer, HEAD + 1)
    low, at = place + 1, behind(at)
  end
  return answers
end

-- Tasks are there if this is a second run of the same call, so late that the producer was forgotten meanwhile.
local given, there, at = {}, {}, 10
while at <= #ARGV do
  for task = at + 3, behind(at) - 1, 2 do
    given[#given + 1] = ARGV[task]
  end
  at = behind(at)
end
for i, envelope in ipairs(redis.call('HMGET', TASKS, unpack(given))) do
  if envelope then
    there[given[i]] = true
  end
end

local ids, tasks, records, count = {}, {}, {}, 0
-- As in insert.lua.
local inserted_at = '\9' .. struct.pack('<I8', now)
at = 10
while at <= #ARGV do
  local from, next = at + 3, behind(at)
  local record, is_new = { ARGV[at], ARGV[at + 1] }, true
  for task = from, next - 1, 2 do
    record[#record + 1] = ARGV[task]
    is_new = is_new and not there[ARGV[task]]
  end
  for task = is_new and from or next, next - 1, 2 do
    ids[#ids + 1] = ARGV[task]
    tasks[#tasks + 1] = ARGV[task]
    tasks[#tasks + 1] = ARGV[task + 1] .. inserted_at
  end
  count, at = count + 1, next
  records[count] = table.concat(record)
end

local made = false
if #ids > 0 then
  redis.call('HSET', TASKS, unpack(tasks))
  redis.call('RPUSH', READY, unpack(ids))
  redis.call('HINCRBY', META, 'ready', #ids)
  made = redis.call('HINCRBY', META, 'inserted', #ids) == #ids
end
if not known then
  redis.call('UNLINK', PRODUCER)
  redis.call('ZREMRANGEBYSCORE', PRODUCERS, '-inf', int(now - 2 * window))
  -- A hundredth of what a memory keeps, of which the argument is half. Should that have become much less, the surplus
  -- goes little by little.
  local surplus = redis.call('ZCARD', PRODUCERS) + 1 - math.max(1, math.floor(tonumber(ARGV[2]) / 50))
  if surplus > 0 then
    local oldest = redis.call('ZRANGE', PRODUCERS, 0, math.min(surplus, FORGOTTEN_AT_ONCE) - 1)
    for _, producer in ipairs(oldest) do
      redis.call('UNLINK', BASE .. 'producer:' .. producer)
    end
    redis.call('ZREM', PRODUCERS, unpack(oldest))
  end
end
redis.call('ZADD', PRODUCERS, int(now), ARGV[7])
local old = redis.call('RPUSH', PRODUCER, unpack(records)) - tonumber(ARGV[9])
if old > 0 then
  redis.call('LTRIM', PRODUCER, old, -1)
end
expire(PRODUCERS, 2 * window)
expire(PRODUCER, 2 * window)
local others = #ids - tonumber(ARGV[8])
if others > 0 then
  wake_others(others)
end
return { 0, made and 1 or 0, count }
