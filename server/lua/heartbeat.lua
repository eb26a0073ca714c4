-- Moves deadlines to now + lease, never to an earlier time.
--
-- KEYS     as in common.lua
-- ARGV     7 lease in ms; then tokens
-- Returns  {left of the lease that ends first among those extended or -1, its deadline, {outcomes}}
local lease_ms, tokens = tonumber(ARGV[7]), args_from(8)
local leases = leases_of(tokens)
local outcomes, records, scores, earliest = {}, {}, {}, nil
local held = {}
for i, lease in ipairs(leases) do
  if lease then
    outcomes[i] = APPLIED
    held[#held + 1] = member(lease)
    lease.lease = lease_ms
    lease.renewed = now
    records[#records + 1] = lease.token
    records[#records + 1] = write_lease(lease)
  end
end
if #held > 0 then
  for i, deadline in ipairs(redis.call('ZMSCORE', LEASED, unpack(held))) do
    deadline = math.max(tonumber(deadline), now + lease_ms)
    earliest = math.min(earliest or deadline, deadline)
    scores[2 * i - 1] = int(deadline)
    scores[2 * i] = held[i]
  end
end
outcomes_of_others(tokens, outcomes)
if #held > 0 then
  first_free()
  redis.call('HSET', LEASES, unpack(records))
  redis.call('ZADD', LEASED, unpack(scores))
end
return { earliest and math.max(0, earliest - now) or -1, earliest or 0, outcomes }
