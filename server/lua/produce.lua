-- Puts a producer's inserts at the tail, those that it has not numbered before. Of the others the remembered answers are
-- given; as numbers ascend, those come first, and the new ones behind them are left to a further call. The first write is
-- one that a full Redis refuses.
--
-- KEYS     as in common.lua; built from data: producers ZSET, producer -> when it inserted something last;
--          producer:<producer> LIST of its last answers: number (8 bytes), fingerprint (16 bytes), ids
-- ARGV     7 producer, 8 as 7 in insert.lua, 9 answers to remember, 10 of each insert number (8 bytes, the
--          highest first), fingerprint, how many tasks (2 bytes); 11 the ids of all, one behind the other; then the
--          envelopes of all; then, if some tasks have a plan or fall due later, what `read_extras` reads
-- Returns  {0 inserted or answered again | 2 the next number has other content | 3 the next number is not known any more |
--          4 the generation is another one, and nothing was done |
--          {setting, its value}: the queue is too full for the next one, 1 if this made the queue, how many were inserted, the
--          ids of each that is answered again, or, if there are duplicates, of each that was inserted…}
--          The ids of duplicates are as in insert.lua.
local PRODUCERS, PRODUCER = BASE .. 'producers', BASE .. 'producer:' .. ARGV[7]
local NUMBER, FINGERPRINT, INSERT = 8, 16, 26
local FORGOTTEN_AT_ONCE = 200
local HEAD = NUMBER + FINGERPRINT
local window, inserts, given = tonumber(ARGV[1]), ARGV[10], ARGV[11]
local waiting, generation = string.match(ARGV[8], '(%d+) (%d+)')
waiting = tonumber(waiting)
local sub = string.sub

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
    if answer and sub(answer, 1, NUMBER) == number then
      return middle, answer
    elseif answer and is_after(number, answer) then
      low = middle + 1
    else
      high = middle - 1
    end
    middle = math.floor((low + high) / 2)
  end
end

local seen = redis.call('ZMSCORE', PRODUCERS, ARGV[7])[1]
local known = seen and now < seen + 2 * window
local last = known and redis.call('LINDEX', PRODUCER, -1)

if last and not is_after(inserts, last) then
  local answers, at, low, high = { 0, 0, 0 }, 1, 0, tonumber(ARGV[9]) - 1
  while at < #inserts and not is_after(sub(inserts, at), last) do
    local place, answer = find(sub(inserts, at, at + NUMBER - 1), low, high)
    if not place then
      answers[1] = 3
      return answers
    elseif sub(answer, NUMBER + 1, HEAD) ~= sub(inserts, at + NUMBER, at + HEAD - 1) then
      answers[1] = 2
      return answers
    end
    answers[#answers + 1] = sub(answer, HEAD + 1)
    low, at = place + 1, at + INSERT
  end
  return answers
end

local ids, new, numbers, tasks, records, last_task, n = {}, {}, {}, {}, {}, 0, 0
for task = 1, #given / 16 do
  ids[task] = sub(given, 16 * task - 15, 16 * task)
end
-- Tasks are there if this is a second run of the same call, so late that the producer was forgotten meanwhile.
local there = redis.call('HMGET', TASKS, unpack(ids))
is_rare = redis.call('EXISTS', RARE) == 1
local extras, gate = ARGV[12 + #ids], nil
if extras or is_rare then
  if (redis.call('HGET', META, 'generation') or '0') ~= generation then
    return { 4, 0, 0 }
  end
  gate = gate_of(ids, extras or '', function(task) return #ARGV[11 + task] end)
end
-- As in insert.lua.
local inserted_at = '\9' .. struct.pack('<I8', now)
local answer, has_duplicates = { 0, 0, 0 }, false
for i = 1, #inserts / INSERT do
  local head = INSERT * (i - 1)
  local high, low = string.byte(inserts, head + INSERT - 1, head + INSERT)
  local first, is_there, duplicates, is_full = last_task + 1, false, {}, nil
  last_task = last_task + 256 * high + low
  for task = first, last_task do
    is_there = is_there or there[task]
  end
  if gate then
    duplicates, is_full = gate.enter(first, last_task, is_there)
  end
  if is_full then
    answer[1] = is_full
    break
  end
  local of_insert = sub(given, 16 * first - 15, 16 * last_task)
  if next(duplicates) then
    of_insert, has_duplicates = gate.ids(first, last_task, duplicates), true
  end
  records[i] = sub(inserts, head + 1, head + HEAD) .. of_insert
  answer[3 + i] = of_insert
  for task = is_there and last_task + 1 or first, last_task do
    if not duplicates[task] then
      n = n + 1
      new[n], numbers[n], tasks[2 * n - 1], tasks[2 * n] = ids[task], task, ids[task], ARGV[11 + task] .. inserted_at
    end
  end
end
answer[3] = #records

local ready, inserted = n, 0
if gate then
  ready, inserted = gate.put_in(numbers, tasks)
elseif n > 0 then
  local before = redis.call('HMGET', META, 'ready', 'inserted', 'generation')
  if (before[3] or '0') ~= generation then
    return { 4, 0, 0 }
  end
  inserted = (before[2] or 0) + n
  redis.call('HSET', TASKS, unpack(tasks))
  redis.call('RPUSH', READY, unpack(new))
  redis.call('HSET', META, 'ready', int((before[1] or 0) + n), 'inserted', int(inserted))
end
if n > 0 and inserted == n then
  answer[2] = 1
  -- As in insert.lua.
  redis.call('HSETNX', META, 'life', redis.call('GET', BASE .. 'dropped') or 0)
end
if #records == 0 then
  return answer
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
if ready > waiting then
  wake_others(ready - waiting)
end
return has_duplicates and answer or { answer[1], answer[2], answer[3] }
