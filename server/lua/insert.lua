-- Puts the tasks of some calls at the tail, of each call all or none. Its first write is one that a full Redis refuses.
--
-- KEYS     as in common.lua
-- ARGV     7 how many calls; of each: how many tasks, pops that wait on this server, request id or '', fingerprint; then
--          the ids of all, then the envelopes of all
-- Returns  {1 if this made the queue, of each call 0: inserted, 2: request id reused, or the ids that were answered before,
--          one behind the other}
local calls, at, recalled = {}, 8, {}
for i = 1, tonumber(ARGV[7]) do
  calls[i] = {
    count = tonumber(ARGV[at]), waiting = tonumber(ARGV[at + 1]), fingerprint = ARGV[at + 3],
    request = ARGV[at + 2] ~= '' and 'i' .. ARGV[at + 2],
  }
  at = at + 4
end
local first, total = at, (#ARGV - at + 1) / 2
-- A second run of the same call changes nothing, even if some of its tasks are gone by now.
local there = redis.call('HMGET', TASKS, unpack(ARGV, first, first + total - 1))

-- Nothing if the call is to insert its tasks, else its answer.
local function answered(call)
  if call.request then
    local record = recalled[call.request] or recall_request(call.request)
    if record then
      return string.sub(record, 1, 16) ~= call.fingerprint and 2 or string.sub(record, 17)
    end
  end
  for task = at - first + 1, at - first + call.count do
    if there[task] then
      return 0
    end
  end
end

local ids, tasks, answer, waiting, requests = {}, {}, { 0 }, 0, {}
-- An envelope is a protobuf message; the time of the insert is its field 1, a fixed64, put behind the others.
local inserted_at = '\9' .. struct.pack('<I8', now)
for i, call in ipairs(calls) do
  local known = answered(call)
  answer[i + 1] = known or 0
  if not known then
    for task = at, at + call.count - 1 do
      ids[#ids + 1] = ARGV[task]
      tasks[#tasks + 1] = ARGV[task]
      tasks[#tasks + 1] = ARGV[task + total] .. inserted_at
    end
    -- They are the same pops, whichever call tells of them.
    waiting = math.max(waiting, call.waiting)
    if call.request then
      recalled[call.request] = call.fingerprint .. table.concat(ARGV, '', at, at + call.count - 1)
      requests[#requests + 1] = call.request
    end
  end
  at = at + call.count
end
if #ids > 0 then
  redis.call('HSET', TASKS, unpack(tasks))
  redis.call('RPUSH', READY, unpack(ids))
  redis.call('HINCRBY', META, 'ready', #ids)
  answer[1] = redis.call('HINCRBY', META, 'inserted', #ids) == #ids and 1 or 0
end
for _, request in ipairs(requests) do
  remember_request(request, recalled[request])
end
if #ids > waiting then
  wake_others(#ids - waiting)
end
return answer
