-- Lists leases that were not renewed for a time, a part at a time.
--
-- KEYS     as in common.lua
-- ARGV     7 the cursor, '0' at first, 8 for how many ms, 9 not at first: the time that the first part answered
-- Returns  {next cursor, not renewed since this time, {the order of the first, stem and positions in 2 bytes each, … for
--          each batch}}; the order of a token is that and its position
local since = ARGV[9] and tonumber(ARGV[9]) or now - tonumber(ARGV[8])
local part = redis.call('HSCAN', LEASES, ARGV[7], 'COUNT', 200)
local keys, found = {}, {}
for at = 1, #part[2], 2 do
  local length = #part[2][at]
  if length == STEM_BYTES or length == STEM_BYTES + 2 then
    keys[#keys + 1] = part[2][at]
  end
end
for _, batch in ipairs(read_batches(keys)) do
  if batch and not batch.split and batch.renewed <= since then
    local run = { string.sub(batch.key, 1, STEM_BYTES) }
    for _, place in ipairs(held_places(batch)) do
      run[#run + 1] = string.sub(token_at(batch, place), -2)
    end
    local first = batch.order - (#batch.key > STEM_BYTES and string.byte(batch.key, 16) or 0)
    found[#found + 1] = int(first)
    found[#found + 1] = table.concat(run)
  end
end
-- Nobody held anything before the epoch.
return { part[1], int(math.max(since, -1)), found }
