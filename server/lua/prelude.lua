-- What every script begins with: the time, in milliseconds since the Unix epoch, by Redis' own clock.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Lets a key vanish by itself after so many ms.
local function expire(key, ms)
  redis.call('PEXPIRE', key, ms)
end
