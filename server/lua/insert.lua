-- Puts tasks at the tail, all or none. Its first write is one that a full Redis refuses.
--
-- KEYS     as in common.lua
-- ARGV     7 request id or '', 8 fingerprint, 9 pops that wait on this server; then id, envelope of each task
-- Returns  {0 inserted | 1 replayed | 2 request id reused, 1 if this made the queue, ids…}
local request = ARGV[7] ~= '' and 'i' .. ARGV[7]
if request then
  local record = recall_request(request)
  if record then
    if string.sub(record, 1, 16) ~= ARGV[8] then
      return { 2, 0 }
    end
    local answer = { 1, 0 }
    for at = 17, #record, 16 do
      answer[#answer + 1] = string.sub(record, at, at + 15)
    end
    return answer
  end
end

local ids, tasks = {}, {}
-- An envelope is a protobuf message; the time of the insert is its field 1, a fixed64, put behind the others.
local inserted_at = '\9' .. struct.pack('<I8', now)
for at = 10, #ARGV, 2 do
  ids[#ids + 1] = ARGV[at]
  tasks[#tasks + 1] = ARGV[at]
  tasks[#tasks + 1] = ARGV[at + 1] .. inserted_at
end
-- A second run of the same call changes nothing, even if some of its tasks are gone by now.
for _, envelope in ipairs(redis.call('HMGET', TASKS, unpack(ids))) do
  if envelope then
    return { 0, 0, unpack(ids) }
  end
end
redis.call('HSET', TASKS, unpack(tasks))
redis.call('RPUSH', READY, unpack(ids))
redis.call('HINCRBY', META, 'ready', #ids)
local made = redis.call('HINCRBY', META, 'inserted', #ids) == #ids
if request then
  remember_request(request, ARGV[8] .. table.concat(ids))
end
local others = #ids - tonumber(ARGV[9])
if others > 0 then
  wake_others(others)
end
return { 0, made and 1 or 0, unpack(ids) }
