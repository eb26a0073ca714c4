-- The prelude of the tests: the time is what comes along behind the prefix of the channels, and keys do not vanish by another clock
-- than that.
local now = tonumber(string.match(ARGV[5], '\n(%d+)$'))
ARGV[5] = string.match(ARGV[5], '^[^\n]*')

local function expire() end
