-- Ends tasks.
--
-- KEYS     as in common.lua
-- ARGV     7 and on: runs of tokens
-- Returns  outcomes, a digit for each
return ack(args_from(7))
