-- Changes settings. Once the bytes of a queue's tasks are limited, those that are there are measured, in steps.
--
-- KEYS     as in common.lua
-- ARGV     7 1 to change, and to make the queue if it is unknown; 0 to read; then names and values in turn, '' to leave it to the
--          rules
-- Returns  {1 if the queue exists, 1 if more is to be measured: call again, without changes, 1 if this made the queue, names and
--          values in turn…}
is_rare = redis.call('EXISTS', RARE) == 1
local rare, made = rarely(), false
if ARGV[7] == '1' then
  local before = rare.setting('max_bytes')
  made = redis.call('EXISTS', META) == 0
  -- A full Redis can be paused, too.
  first_free()
  for at = 8, #ARGV, 2 do
    if ARGV[at + 1] ~= '' then
      redis.call('HSET', rare.SETTINGS, ARGV[at], ARGV[at + 1])
      rare.mark()
    else
      redis.call('HDEL', rare.SETTINGS, ARGV[at])
    end
  end
  if made then
    redis.call('HSET', META, 'inserted', 0, 'life', redis.call('GET', BASE .. 'dropped') or 0)
  end
  rare.forget_settings()
  local after = rare.setting('max_bytes')
  if before and not after then
    redis.call('UNLINK', BASE .. 'sizes')
    redis.call('HDEL', META, 'bytes', 'measuring')
  elseif after and not before then
    redis.call('HSET', META, 'measuring', '0')
  end
end
local more = rare.measure_some()
return {
  redis.call('EXISTS', META), more and 1 or 0, made and 1 or 0, unpack(redis.call('HGETALL', rare.SETTINGS)),
}
