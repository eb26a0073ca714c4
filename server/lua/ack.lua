-- Ends tasks.
--
-- KEYS     as in common.lua
-- ARGV     7 and on: tokens
-- Returns  {outcomes}
return ack(args_from(7))
