-- Counts a queue's tasks, after leases that ran out were taken back.
--
-- KEYS     as in common.lua
-- ARGV     none of its own
-- Returns  {1 if more leases ran out: ask again, 1 if the queue exists, ready, leased, inserted, acked}
local _, more = reclaim()
local counts = redis.call('HMGET', META, 'ready', 'inserted', 'acked')
return {
  more and 1 or 0, redis.call('EXISTS', META), tonumber(counts[1] or '0'), redis.call('ZCARD', LEASED),
  tonumber(counts[2] or '0'), tonumber(counts[3] or '0'),
}
