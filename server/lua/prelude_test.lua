-- The prelude of the tests: the time is what they wrote in a key, and keys do not vanish by another clock than that.
local now = tonumber(redis.call('GET', string.match(KEYS[1], '^[^:]*') .. ':now') or '0')

local function expire() end
