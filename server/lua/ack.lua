-- Ends tasks.
--
-- KEYS     as in common.lua
-- ARGV     6 and on: tokens
-- Returns  {outcomes}
return ack(args_from(6))
