-- Puts the tasks of some calls at the tail, of each call all or none. Its first write is one that a full Redis refuses.
--
-- KEYS     as in common.lua
-- ARGV     7 pops that wait on this server, 8 how many tasks each call has, in 2 bytes, 9 how many calls have a request id;
--          of each of those which call it is, request id, fingerprint; then the ids of all, one behind the other, in one;
--          then the envelopes of all
-- Returns  {1 if this made the queue, of each call 0: inserted, 2: request id reused, or the ids that were answered before,
--          one behind the other}
local sub, byte = string.sub, string.byte
local waiting, counts, asked, recalled, at = tonumber(ARGV[7]), ARGV[8], {}, {}, 10
for _ = 1, tonumber(ARGV[9]) do
  asked[tonumber(ARGV[at])] = { id = 'i' .. ARGV[at + 1], fingerprint = ARGV[at + 2] }
  at = at + 3
end
local all, given = ARGV[at], {}
for task = 1, #ARGV - at do
  given[task] = sub(all, 16 * task - 15, 16 * task)
end
-- A second run of the same call changes nothing, even if some of its tasks are gone by now.
local there = redis.call('HMGET', TASKS, unpack(given))

-- Nothing if the request id is new, else the answer to its call.
local function answered(request)
  local record = recalled[request.id] or recall_request(request.id)
  if record then
    return sub(record, 1, 16) ~= request.fingerprint and 2 or sub(record, 17)
  end
end

local ids, tasks, answer, requests, last, n = {}, {}, { 0 }, {}, 0, 0
-- An envelope is a protobuf message; the time of the insert is its field 1, a fixed64, put behind the others.
local inserted_at = '\9' .. struct.pack('<I8', now)
for i = 1, #counts / 2 do
  local high, low = byte(counts, 2 * i - 1, 2 * i)
  local first, request = last + 1, asked[i]
  last = last + 256 * high + low
  local known = request and answered(request)
  for task = first, last do
    known = known or there[task] and 0
  end
  answer[i + 1] = known or 0
  if not known then
    for task = first, last do
      n = n + 1
      ids[n], tasks[2 * n - 1], tasks[2 * n] = given[task], given[task], ARGV[at + task] .. inserted_at
    end
    if request then
      recalled[request.id] = request.fingerprint .. sub(all, 16 * first - 15, 16 * last)
      requests[#requests + 1] = request.id
    end
  end
end
if #ids > 0 then
  local before = redis.call('HMGET', META, 'ready', 'inserted')
  local ready, inserted = (before[1] or 0) + #ids, (before[2] or 0) + #ids
  redis.call('HSET', TASKS, unpack(tasks))
  redis.call('RPUSH', READY, unpack(ids))
  redis.call('HSET', META, 'ready', int(ready), 'inserted', int(inserted))
  answer[1] = inserted == #ids and 1 or 0
end
for _, request in ipairs(requests) do
  remember_request(request, recalled[request])
end
if #ids > waiting then
  wake_others(#ids - waiting)
end
return answer
