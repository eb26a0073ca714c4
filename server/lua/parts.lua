-- Where some of a batch's leases get another deadline or holder than the others, and what is told of those that are held.

-- Gives each of a batch's leases a record of its own. Returns them by place.
local function split(batch)
  local deadline = redis.call('ZSCORE', LEASED, member(batch))
  local rest, leases = string.sub(batch.record, batch.ids + 16 * batch.count), {}
  local records, scores = {}, {}
  for _, place in ipairs(held_places(batch)) do
    local lease = {
      key = token_at(batch, place), order = batch.order + place - 1, lease = batch.lease, renewed = batch.renewed,
      count = 1, split = false, holders = batch.holders, left = 1, ended = {}, parent = batch, place = place,
    }
    lease.record = write_batch(lease, id_at(batch, place) .. rest)
    lease.ids = batch.ids
    leases[place] = lease
    records[#records + 1] = lease.key
    records[#records + 1] = lease.record
    scores[#scores + 1] = deadline
    scores[#scores + 1] = member(lease)
  end
  batch.split = true
  redis.call('ZREM', LEASED, member(batch))
  redis.call('HSET', LEASES, batch.key, write_batch(batch, rest), unpack(records))
  redis.call('ZADD', LEASED, unpack(scores))
  return leases
end

-- Splits the batches that were found in part only, so that the others can be changed as a whole. Returns all that are to be
-- changed; `found` and `places` point to them then.
local function apart(found, places, count)
  local batches, wanted = {}, {}
  for i = 1, count do
    local batch = found[i]
    if batch then
      if not wanted[batch] then
        wanted[batch] = { count = 0 }
        batches[#batches + 1] = batch
      end
      if not wanted[batch][places[i]] then
        wanted[batch][places[i]] = true
        wanted[batch].count = wanted[batch].count + 1
      end
    end
  end
  local whole, leases = {}, {}
  for _, batch in ipairs(batches) do
    if wanted[batch].count == batch.left then
      whole[#whole + 1] = batch
    else
      leases[batch] = split(batch)
      for place, lease in pairs(leases[batch]) do
        if wanted[batch][place] then
          whole[#whole + 1] = lease
        end
      end
    end
  end
  for i = 1, count do
    local of_batch = leases[found[i]]
    if of_batch then
      found[i], places[i] = of_batch[places[i]], 1
    end
  end
  return whole
end

-- Takes a try off the batches that it was answered with. Returns those of which no other try is left.
local function disown(batches, attempt)
  local ownerless, kept = {}, {}
  for _, batch in ipairs(batches) do
    local others, found = {}, false
    for holder in string.gmatch(batch.holders, '[^,]+') do
      if holder == attempt then
        found = true
      else
        others[#others + 1] = holder
      end
    end
    if found and #others == 0 then
      ownerless[#ownerless + 1] = batch
    elseif found then
      batch.holders = table.concat(others, ',')
      kept[#kept + 1] = batch.key
      kept[#kept + 1] = write_batch(batch)
    end
  end
  if #kept > 0 then
    first_free()
    redis.call('HSET', LEASES, unpack(kept))
  end
  return ownerless
end

-- Of those that are held, whether their tasks go when they would go back.
local function outcomes_of_held(found, places, count)
  local outcomes, ids, at = {}, {}, {}
  for i = 1, count do
    outcomes[i] = found[i] and APPLIED
    if found[i] and is_rare then
      ids[#ids + 1], at[#at + 1] = id_at(found[i], places[i]), i
    end
  end
  local cancelled = #ids > 0 and rarely().cancelled_among(ids) or {}
  for n, id in ipairs(ids) do
    outcomes[at[n]] = cancelled[id] and DOOMED or APPLIED
  end
  return outcomes
end
