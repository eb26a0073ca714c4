-- Moves deadlines to now + lease, never to an earlier time.
--
-- KEYS     as in common.lua
-- ARGV     7 lease in ms, or '?' and the one that holds unless the queue has a setting; then runs of tokens
-- Returns  {outcomes, a digit for each, now, the deadline of each that was extended…}
is_rare = redis.call('EXISTS', RARE) == 1
local lease_ms = tonumber(ARGV[7]) or is_rare and rarely().setting('lease') or tonumber(string.sub(ARGV[7], 2))
local runs = args_from(8)
local found, places, count = find(runs)
local outcomes, deadlines = outcomes_of_held(found, places, count), {}
outcomes_of_others(runs, outcomes)
local answer = { table.concat(outcomes), int(now) }
local batches = apart(found, places, count)
if #batches == 0 then
  return answer
end
local records, scores, members = {}, {}, {}
for i, batch in ipairs(batches) do
  batch.lease, batch.renewed = lease_ms, now
  members[i] = member(batch)
  records[2 * i - 1] = batch.key
  records[2 * i] = write_batch(batch)
end
for i, deadline in ipairs(redis.call('ZMSCORE', LEASED, unpack(members))) do
  deadlines[batches[i]] = int(math.max(tonumber(deadline), now + lease_ms))
  scores[2 * i - 1] = deadlines[batches[i]]
  scores[2 * i] = members[i]
end
first_free()
redis.call('HSET', LEASES, unpack(records))
redis.call('ZADD', LEASED, unpack(scores))
for i = 1, count do
  if found[i] then
    answer[#answer + 1] = deadlines[found[i]]
  end
end
return answer
