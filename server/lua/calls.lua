-- Calls whose answer may be lost, or that may still arrive.

-- For a minute: how a call ended that cannot be told from its own second run; and under which stems a pop must not lease
-- any more, in one ZSET, stem -> until when.
local CALL_TTL = 60000
local WITHDRAWN = BASE .. 'withdrawn'
local function call_key(name)
  return BASE .. 'call:' .. name
end

-- All leases of batches, each a batch and a place in it.
local function all_of(batches)
  local leases = {}
  for _, batch in ipairs(batches) do
    for _, place in ipairs(held_places(batch)) do
      leases[#leases + 1] = { batch, place }
    end
  end
  return leases
end
