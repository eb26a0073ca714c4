-- Lists leases that were not renewed for a time, a part at a time.
--
-- KEYS     as in common.lua
-- ARGV     7 the cursor, '0' at first, 8 for how many ms, 9 not at first: the time that the first part answered
-- Returns  {next cursor, not renewed since this time, {token, order, … for each lease}}
local since = ARGV[9] and tonumber(ARGV[9]) or now - tonumber(ARGV[8])
local part = redis.call('HSCAN', LEASES, ARGV[7], 'COUNT', 200)
local found = {}
for at = 1, #part[2], 2 do
  local lease = read_lease(part[2][at], part[2][at + 1])
  if lease.renewed <= since then
    found[#found + 1] = lease.token
    found[#found + 1] = lease.order
  end
end
return { part[1], since, found }
