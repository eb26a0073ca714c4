-- Where tasks are. A lease cannot be found by its task, and keeps no index for that. Who asks for a task that is ready or leased
-- makes one, WHERE, which lasts as long as somebody asks now and then: its field '' is where the scan of the leases goes on that
-- were there before it, or 'all'. Scripts that lease tasks, or end leases, keep it true meanwhile.
local WHERE, WHERE_KEPT, SCANNED = rarely().WHERE, 600000, 20
local NUMBER = { ready = 1, scheduled = 2, leased = 3, dead = 4 }

-- A step of making it, if it is not there or not complete. Returns whether it is.
local function index_leases()
  local cursor = redis.call('HGET', WHERE, '')
  if cursor ~= 'all' then
    first_free()
    local part, stems, fields = redis.call('HSCAN', LEASES, cursor or '0', 'COUNT', SCANNED), {}, {}
    for at = 1, #part[2], 2 do
      if #part[2][at] == STEM_BYTES then
        stems[#stems + 1] = part[2][at]
      end
    end
    for _, stem in ipairs(stems) do
      for _, lease in ipairs(all_of(held_under(stem))) do
        fields[#fields + 1] = id_at(lease[1], lease[2])
        fields[#fields + 1] = token_at(lease[1], lease[2])
      end
      if #fields > 0 then
        redis.call('HSET', WHERE, unpack(fields))
        fields = {}
      end
    end
    cursor = part[1] == '0' and 'all' or part[1]
    redis.call('HSET', WHERE, '', cursor)
    rarely().mark()
  end
  expire(WHERE, WHERE_KEPT)
  return cursor == 'all'
end

-- Of these tasks: where they are, or false if they are gone; and what they are found by there, or -1: the place among those that
-- are scheduled, the token, or when it died. Nothing if the index has to be made first.
local function whereabouts(ids)
  local rare, states, by, undecided = rarely(), {}, {}, false
  local places, died_at = redis.call('HMGET', rare.PLACES, unpack(ids)), redis.call('ZMSCORE', DEAD, unpack(ids))
  local tokens = redis.call('HMGET', WHERE, unpack(ids))
  for i, id in ipairs(ids) do
    by[i] = -1
    if redis.call('HEXISTS', TASKS, id) == 0 then
      states[i] = false
    elseif places[i] then
      states[i], by[i] = NUMBER.scheduled, places[i]
    elseif died_at[i] then
      states[i], by[i] = NUMBER.dead, died_at[i]
    elseif tokens[i] then
      states[i], by[i] = NUMBER.leased, tokens[i]
    else
      states[i], undecided = NUMBER.ready, true
    end
  end
  if undecided and redis.call('HGET', WHERE, '') ~= 'all' then
    return
  end
  expire(WHERE, WHERE_KEPT)
  return states, by
end
