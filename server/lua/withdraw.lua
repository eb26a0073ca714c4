-- Withdraws a pop whose answer was lost. If it has run, what it leased goes back to the head, uncounted, unless another try
-- was answered with it; if it has not run, it will lease nothing when it does.
--
-- KEYS     as in common.lua
-- ARGV     7 stem of its tokens, 8 request id or '', 9 attempt or '-'
-- Returns  how many tasks went back
local stem, attempt = ARGV[7], ARGV[9]
is_rare = redis.call('EXISTS', RARE) == 1
local held = held_under(stem)
-- It may have been answered with what an earlier try had leased.
local record = ARGV[8] ~= '' and recall_request('p' .. ARGV[8])
local earlier = record and string.sub(record, 17, 16 + STEM_BYTES)
if earlier and earlier ~= stem then
  for _, batch in ipairs(held_under(earlier)) do
    held[#held + 1] = batch
  end
end
first_free()
redis.call('ZREMRANGEBYSCORE', WITHDRAWN, '-inf', int(now))
redis.call('ZADD', WITHDRAWN, int(now + CALL_TTL), stem)
expire(WITHDRAWN, CALL_TTL)
local ownerless = all_of(disown(held, attempt))
local put_back, ready = give_back(ownerless, { deliveries = 0, expiries = 0 })
if ready > 0 then
  wake_others(ready)
end
return put_back
