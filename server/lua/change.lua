-- Reads or changes settings.
--
-- A queue that is spread has its settings in shard 0, where they hold, and a copy in each other one. Each change of them is one of
-- shard 0, which gets a greater generation with it; the others are opened with the same settings and generation then. A shard takes
-- only what is inserted by its own generation: so nothing comes into one that is none any more, or not yet. Before the number of
-- shards changes, the others are fenced with the generation that is to come, each only if it is empty. If that one does not come
-- about, whoever meets such a shard raises shard 0 to it, with nothing else changed.
--
-- KEYS     as in common.lua
-- ARGV     7 'read'; 'change': and make the queue if it is unknown; 'open' or 'fence' a shard that is not 0, 8 the generation that the
--          settings have, else nothing is changed, 9 the one that they get, 10 1 if the queue, or the shard, has to be empty; then names
--          and values in turn, '' to leave it to the rules; to open a shard all there are
-- Returns  {1 if the queue exists, 1 if more is to be measured: read again, 1 if this made the queue, 0: done, 1: the generation is
--          another one, 2: not empty, now, names and values in turn…}
-- In META, since also scripts for queues with nothing rare have to do with them.
local SPREAD = { 'generation', 'shards', 'spread' }
local what, made, status = ARGV[7], false, 0
is_rare = redis.call('EXISTS', RARE) == 1
local rare = rarely()
local generation = tonumber(redis.call('HGET', META, 'generation') or '0')

local function set(name, value)
  local key = (name == SPREAD[1] or name == SPREAD[2] or name == SPREAD[3]) and META or rare.SETTINGS
  if value == '' then
    redis.call('HDEL', key, name)
    return
  end
  redis.call('HSET', key, name, value)
  if key ~= META then
    rare.mark()
  end
end

local function change()
  local before = rare.setting('max_bytes')
  -- A full Redis can be paused, too.
  first_free()
  if what ~= 'change' then
    redis.call('DEL', rare.SETTINGS)
    -- One that was dropped would vanish by and by.
    redis.call('PERSIST', META)
  end
  for at = 11, #ARGV, 2 do
    set(ARGV[at], ARGV[at + 1])
  end
  if ARGV[9] ~= '0' then
    set('generation', ARGV[9])
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

if what == 'change' then
  if generation ~= tonumber(ARGV[8]) then
    status = 1
  elseif ARGV[10] == '1' and redis.call('EXISTS', TASKS) == 1 then
    status = 2
  else
    made = redis.call('EXISTS', META) == 0
    change()
    if made then
      redis.call('HSET', META, 'inserted', 0, 'life', redis.call('GET', BASE .. 'dropped') or 0)
    end
  end
elseif what == 'open' then
  if generation > tonumber(ARGV[9]) then
    status = 1
  elseif generation < tonumber(ARGV[9]) then
    change()
  end
elseif what == 'fence' then
  if generation > tonumber(ARGV[9]) then
    status = 1
  elseif ARGV[10] == '1' and redis.call('EXISTS', TASKS) == 1 then
    status = 2
  elseif generation < tonumber(ARGV[9]) then
    first_free()
    set('generation', ARGV[9])
  end
end
local more = what ~= 'fence' and rare.measure_some()
local answer = { redis.call('EXISTS', META), more and 1 or 0, made and 1 or 0, status, int(now) }
for i, value in ipairs(redis.call('HMGET', META, unpack(SPREAD))) do
  if value then
    answer[#answer + 1], answer[#answer + 2] = SPREAD[i], value
  end
end
for _, part in ipairs(redis.call('HGETALL', rare.SETTINGS)) do
  answer[#answer + 1] = part
end
return answer
