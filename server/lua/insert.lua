-- Puts the tasks of some calls at the tail, of each call all or none. Its first write is one that a full Redis refuses.
--
-- KEYS     as in common.lua
-- ARGV     7 pops that wait on this server and, behind a space, the generation by which the tasks belong to this shard, 8 how many
--          tasks each call has, in 2 bytes, 9 how many calls have a request id;
--          of each of those which call it is, request id, fingerprint; then the ids of all, one behind the other, in one;
--          then the envelopes of all; then, if some tasks have a plan or fall due later, what `read_extras` reads
-- Returns  {-1} if the generation is another one, and nothing was done; else
--          {1 if this made the queue, of each call 0: inserted, 2: request id reused, or the ids that were answered before (of what
--          is imported: or that are there already), one behind the other, or {those}: inserted but for duplicates, or
--          {setting, its value}: the queue is full}
--          The ids of duplicates are those of the tasks that have their keys, marked: 16 is added to the 7th byte.
local sub, byte = string.sub, string.byte
local sizes, asked, recalled, at = ARGV[8], {}, {}, 10
local waiting, generation = string.match(ARGV[7], '(%d+) (%d+)')
waiting = tonumber(waiting)
for _ = 1, tonumber(ARGV[9]) do
  asked[tonumber(ARGV[at])] = { id = 'i' .. ARGV[at + 1], fingerprint = ARGV[at + 2] }
  at = at + 3
end
local all, given = ARGV[at], {}
for task = 1, #all / 16 do
  given[task] = sub(all, 16 * task - 15, 16 * task)
end
-- A second run of the same call changes nothing, even if some of its tasks are gone by now.
local there = redis.call('HMGET', TASKS, unpack(given))
is_rare = redis.call('EXISTS', RARE) == 1
local extras, gate = ARGV[at + #given + 1]
if extras or is_rare then
  if (redis.call('HGET', META, 'generation') or '0') ~= generation then
    return { -1 }
  end
  gate = gate_of(given, extras or '', function(task) return #ARGV[at + task] end)
end

-- Nothing if the request id is new, else the answer to its call.
local function answered(request)
  local record = recalled[request.id] or recall_request(request.id)
  if record then
    return sub(record, 1, 16) ~= request.fingerprint and 2 or sub(record, 17)
  end
end

local ids, numbers, tasks, answer, requests, none, last, n = {}, {}, {}, { 0 }, {}, {}, 0, 0
-- An envelope is a protobuf message; the time of the insert is its field 1, a fixed64, put behind the others.
local inserted_at = '\9' .. struct.pack('<I8', now)
for i = 1, #sizes / 2 do
  local high, low = byte(sizes, 2 * i - 1, 2 * i)
  local first, request = last + 1, asked[i]
  last = last + 256 * high + low
  local has_keys = gate and not request and gate.has_keys(first, last)
  local known = request and answered(request) or has_keys and gate.recall(first)
  local duplicates, is_full = none, nil
  if not known then
    local again = false
    for task = first, last do
      again = again or there[task]
    end
    if gate then
      duplicates, is_full = gate.enter(first, last, again)
    end
    local imported = again and gate and gate.is_import(first)
    if imported then
      duplicates = none
    end
    local as_given = next(duplicates) == nil
    local answered_ids = not as_given and gate.ids(first, last, duplicates) or request and sub(all, 16 * first - 15, 16 * last)
    known = is_full or imported and answered_ids or again and (as_given and 0 or { answered_ids })
    answer[i + 1] = known or as_given and 0 or { answered_ids }
    if request and not known then
      recalled[request.id] = request.fingerprint .. answered_ids
      requests[#requests + 1] = request.id
    elseif has_keys and not known then
      gate.remember(first, answered_ids)
    end
  else
    answer[i + 1] = known
  end
  for task = known and last + 1 or first, last do
    if not duplicates[task] then
      n = n + 1
      ids[n], tasks[2 * n - 1], tasks[2 * n] = given[task], given[task], ARGV[at + task] .. inserted_at
      if gate then
        numbers[n] = task
      end
    end
  end
end
local ready, inserted = n, 0
if gate then
  ready, inserted = gate.put_in(numbers, tasks)
elseif n > 0 then
  local before = redis.call('HMGET', META, 'ready', 'inserted', 'generation')
  if (before[3] or '0') ~= generation then
    return { -1 }
  end
  inserted = (before[2] or 0) + n
  redis.call('HSET', TASKS, unpack(tasks))
  redis.call('RPUSH', READY, unpack(ids))
  redis.call('HSET', META, 'ready', int((before[1] or 0) + n), 'inserted', int(inserted))
end
if n > 0 and inserted == n then
  answer[1] = 1
  -- See sessions.lua. A change of settings may have made the queue before.
  redis.call('HSETNX', META, 'life', redis.call('GET', BASE .. 'dropped') or 0)
end
for _, request in ipairs(requests) do
  remember_request(request, recalled[request])
end
if ready > waiting then
  wake_others(ready - waiting)
end
return answer
