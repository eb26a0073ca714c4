-- Looks at tasks by their ids.
--
-- KEYS     as in common.lua
-- ARGV     7 ids, one behind the other
-- Returns  {1, of each what `see` tells, with its state before it: 1 ready, 2 scheduled, 3 leased, 4 dead; or ''}; or {0}: leases
--          are being indexed, ask again
is_rare = redis.call('EXISTS', RARE) == 1
local ids = rarely().ids_in(ARGV[7])
local states, by = whereabouts(ids)
if not states then
  index_leases()
  return { 0 }
end
local tasks = {}
for i, id in ipairs(ids) do
  local at = by[i]
  if states[i] == NUMBER.scheduled then
    at = redis.call('ZSCORE', rarely().SCHEDULED, by[i] .. id)
  elseif states[i] == NUMBER.leased then
    local found, places = find({ string.sub(by[i], 1, STEM_BYTES) .. string.sub(by[i], -2) .. '\1' })
    at = found[1] and places[1] and redis.call('ZSCORE', LEASED, member(found[1])) or -1
  end
  tasks[i] = { id, at }
end
local seen = see(tasks)
for i, task in ipairs(seen) do
  seen[i] = task ~= '' and { states[i], task } or ''
end
return { 1, unpack(seen) }
