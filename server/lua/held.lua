-- Lists leases that were not renewed for a time, a part at a time.
--
-- KEYS     as in common.lua
-- ARGV     7 the cursor, '0' at first, 8 for how many ms, 9 not at first: the time that the first part answered
-- Returns  {next cursor, not renewed since this time, {the order of the first, stem and positions in 2 bytes each, … for
--          each batch}}; the order of a token is that and its position
local since = ARGV[9] and tonumber(ARGV[9]) or now - tonumber(ARGV[8])
local part = redis.call('HSCAN', LEASES, ARGV[7], 'COUNT', 200)
-- Only batches are listed, and each is read with the leases that were split off it: those have records that come and go
-- between the parts.
local stems, found = {}, {}
for at = 1, #part[2], 2 do
  if #part[2][at] == STEM_BYTES then
    stems[#stems + 1] = part[2][at]
  end
end
for _, batch in ipairs(read_batches(stems)) do
  local run = { batch.key }
  for _, leases in ipairs(batch.split and held_under(batch.key) or { batch }) do
    for _, place in ipairs(leases.renewed <= since and held_places(leases) or {}) do
      run[#run + 1] = string.sub(token_at(leases, place), -2)
    end
  end
  if #run > 1 then
    found[#found + 1] = int(batch.order)
    found[#found + 1] = table.concat(run)
  end
end
-- Nobody held anything before the epoch.
return { part[1], int(math.max(since, -1)), found }
