-- The prelude of the tests: the time is what they wrote in a key.
local now = tonumber(redis.call('GET', string.match(KEYS[1], '^[^:]*') .. ':now') or '0')
