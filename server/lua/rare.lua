-- What only some queues have: priorities, times, unique keys, settings, limits. common.lua says under which keys. One function
-- makes all that touches them, so that a script has to make but that one where none of it is there; two parts of it are in lines.lua
-- and sizes.lua, which stand before it.

local rarities
local function rarely()
  if rarities then
    return rarities
  end
  -- What could be taken from outside costs each script for it, also those that never call this.
  local call, sub, byte, pack = redis.call, string.sub, string.byte, struct.pack
  local META, BASE = KEYS[1], sub(KEYS[1], 1, -5)
  local TASKS, READY, TRIES, DEAD = BASE .. 'tasks', BASE .. 'ready:0', BASE .. 'tries', BASE .. 'dead'
  local HIGH, SCHEDULED, PLACES, PLANS = BASE .. 'high', BASE .. 'scheduled', BASE .. 'places', BASE .. 'plans'
  local ENDS, UNIQUE, SETTINGS, CANCELLED = BASE .. 'ends', BASE .. 'unique', BASE .. 'settings', BASE .. 'cancelled'
  local SIZES, WHERE, GONE, NUMBERS = BASE .. 'sizes', BASE .. 'where', BASE .. 'gone', BASE .. 'numbers'
  local ALL = { HIGH, SCHEDULED, PLANS, ENDS, UNIQUE, SETTINGS, CANCELLED, SIZES, WHERE, GONE, NUMBERS }
  local STEP = 200
  local settings, ended = nil, {}
  local rare = {
    PLACES = PLACES, SCHEDULED = SCHEDULED, CANCELLED = CANCELLED, SETTINGS = SETTINGS, WHERE = WHERE, ALL = ALL,
    TASKS = TASKS, DEAD = DEAD, SIZES = SIZES, GONE = GONE, NUMBERS = NUMBERS,
  }
  rarities = rare

  local function int(number)
    return string.format('%.0f', number)
  end

  function rare.mark()
    if not is_rare then
      is_rare = true
      call('SET', BASE .. 'rare', 1)
    end
  end

  -- A counter of META.
  local function count_of(name)
    return tonumber(call('HGET', META, name) or '0')
  end

  local function add(name, number)
    if number ~= 0 then
      call('HINCRBY', META, name, int(number))
    end
  end
  rare.count_of, rare.add = count_of, add

  -- To ask first costs less than to take a hundred fields off what is not there.
  local function remove_from(command, key, fields)
    if call('EXISTS', key) == 1 then
      call(command, key, unpack(fields))
    end
  end

  function rare.setting(name)
    if not settings then
      settings = {}
      local all = call('HGETALL', SETTINGS)
      for at = 1, #all, 2 do
        settings[all[at]] = tonumber(all[at + 1])
      end
    end
    return settings[name]
  end

  function rare.forget_settings()
    settings = nil
  end

  function rare.is_paused()
    return (rare.setting('paused') or 0) ~= 0
  end

  local function read_plan(record)
    local priority, ends, length = struct.unpack('>BI8I2', record)
    return { priority = priority, ends = ends > 0 and ends, key = length > 0 and sub(record, 12, 10 + length) }
  end

  -- Plans as they are kept, by id, of those that have one.
  function rare.records_of(ids)
    local records, asked = {}, {}
    for _, id in ipairs(ids) do
      if byte(id, 7) >= 128 then
        asked[#asked + 1] = id
      end
    end
    for i, record in ipairs(#asked > 0 and call('HMGET', PLANS, unpack(asked)) or {}) do
      records[asked[i]] = record or nil
    end
    return records
  end

  function rare.plans_of(ids)
    local plans = {}
    for id, record in pairs(rare.records_of(ids)) do
      plans[id] = read_plan(record)
    end
    return plans
  end

  function rare.list_of(priority)
    return priority == 0 and READY or BASE .. 'ready:' .. priority
  end

  -- The lists in which tasks are ready, those of the highest priority first; each with how many are.
  function rare.lists()
    local high, lists, rest = {}, {}, count_of('ready')
    local all = call('HGETALL', HIGH)
    for at = 1, #all, 2 do
      high[tonumber(all[at])] = tonumber(all[at + 1])
    end
    for priority = 9, 1, -1 do
      if high[priority] then
        lists[#lists + 1] = { key = rare.list_of(priority), priority = priority, ready = high[priority] }
        rest = rest - high[priority]
      end
    end
    lists[#lists + 1] = { key = READY, priority = 0, ready = rest }
    return lists
  end

  local function note_ends(ids, plans)
    local scores = {}
    for _, id in ipairs(ids) do
      if plans[id] and plans[id].ends then
        scores[#scores + 1] = int(plans[id].ends)
        scores[#scores + 1] = id
      end
    end
    if #scores > 0 then
      call('ZADD', ENDS, unpack(scores))
      rare.mark()
    end
  end

  -- What is ready or scheduled no more has no end that anybody waits for.
  local function forget_ends(ids, plans)
    local ended = {}
    for _, id in ipairs(ids) do
      ended[#ended + 1] = plans[id] and plans[id].ends and id or nil
    end
    if #ended > 0 then
      call('ZREM', ENDS, unpack(ended))
    end
  end

  -- Makes tasks ready: 'LPUSH' puts them before the others of their priority, each before the last one, 'RPUSH' behind. How many
  -- were ever put behind is counted: by that a place in a list has a number that stays, see lines.lua.
  function rare.push(command, ids, plans)
    local lists = {}
    for _, id in ipairs(ids) do
      local priority = plans[id] and plans[id].priority or 0
      lists[priority] = lists[priority] or {}
      table.insert(lists[priority], id)
    end
    for priority, of_list in pairs(lists) do
      call(command, rare.list_of(priority), unpack(of_list))
      if command == 'RPUSH' then
        add('tail:' .. priority, #of_list)
      end
      if priority > 0 then
        call('HINCRBY', HIGH, priority, #of_list)
        rare.mark()
      end
    end
    note_ends(ids, plans)
    add('ready', #ids)
  end

  -- Each is given as {id, due}.
  function rare.schedule(tasks, plans)
    if #tasks == 0 then
      return
    end
    local scores, places, ids, from = {}, {}, {}, count_of('schedules')
    for i, task in ipairs(tasks) do
      local place = pack('>I8', from + i)
      ids[i] = task[1]
      scores[2 * i - 1], scores[2 * i] = int(task[2]), place .. task[1]
      places[2 * i - 1], places[2 * i] = task[1], place
    end
    call('ZADD', SCHEDULED, unpack(scores))
    call('HSET', PLACES, unpack(places))
    note_ends(ids, plans)
    add('schedules', #tasks)
    rare.mark()
  end

  -- So many tasks of a priority are not ready any more.
  function rare.leave(priority, count)
    if priority > 0 and call('HINCRBY', HIGH, priority, -count) <= 0 then
      call('HDEL', HIGH, priority)
    end
  end

  -- These are leased.
  function rare.lease(ids, tokens)
    if call('EXISTS', ENDS) == 1 then
      forget_ends(ids, rare.plans_of(ids))
    end
    if call('EXISTS', WHERE) == 1 then
      local fields = {}
      for i, id in ipairs(ids) do
        fields[2 * i - 1], fields[2 * i] = id, tokens[i]
      end
      call('HSET', WHERE, unpack(fields))
    end
  end

  -- These are leased no more.
  function rare.unlease(ids)
    remove_from('HDEL', WHERE, ids)
  end

  -- Frees the unique keys that these tasks have.
  function rare.free_keys(ids, plans)
    local keys, owners, own = {}, {}, {}
    for _, id in ipairs(ids) do
      if plans[id] and plans[id].key then
        keys[#keys + 1], owners[#owners + 1] = plans[id].key, id
      end
    end
    for i, id in ipairs(#keys > 0 and call('HMGET', UNIQUE, unpack(keys)) or {}) do
      own[#own + 1] = id == owners[i] and keys[i] or nil
    end
    if #own > 0 then
      call('HDEL', UNIQUE, unpack(own))
    end
  end

  -- These are gone; wherever they were, they are not there any more.
  function rare.forget(ids, plans)
    if #ids > 0 then
      call('HDEL', TASKS, unpack(ids))
      rare.forget_all_but_tasks(ids, plans)
    end
  end

  function rare.forget_all_but_tasks(ids, plans)
    remove_from('HDEL', TRIES, ids)
    remove_from('SREM', CANCELLED, ids)
    rare.forget_sizes(ids)
    rare.free_keys(ids, plans)
    if next(plans) then
      call('HDEL', PLANS, unpack(ids))
    end
  end

  -- Tasks that are ready or scheduled are gone, and counted under this name. The ids of ready ones stay in their lists, until
  -- they are met there.
  function rare.drop_waiting(ids, name)
    if #ids == 0 then
      return
    end
    local plans, places = rare.plans_of(ids), call('HMGET', PLACES, unpack(ids))
    local members, scheduled, ready, by_priority = {}, {}, {}, {}
    for i, id in ipairs(ids) do
      if places[i] then
        members[#members + 1], scheduled[#scheduled + 1] = places[i] .. id, id
      else
        local priority = plans[id] and plans[id].priority or 0
        ready[#ready + 1], by_priority[priority] = id, (by_priority[priority] or 0) + 1
      end
    end
    rare.forget(ids, plans)
    if #members > 0 then
      call('ZREM', SCHEDULED, unpack(members))
      call('HDEL', PLACES, unpack(scheduled))
    end
    for priority, count in pairs(by_priority) do
      rare.leave(priority, count)
    end
    add('ready', -#ready)
    if #ready > 0 then
      call('SADD', GONE, unpack(ready))
      rare.mark()
    end
    forget_ends(ids, plans)
    add(name, #ids)
  end

  -- Dead letters are gone, and counted under this name.
  function rare.drop_dead(ids, name)
    if #ids > 0 then
      local plans = rare.plans_of(ids)
      call('ZREM', DEAD, unpack(ids))
      rare.forget(ids, plans)
      add(name, #ids)
    end
  end

  -- By id, whether these leased tasks go when they would go back.
  function rare.cancelled_among(ids)
    local cancelled = {}
    if #ids > 0 and call('EXISTS', CANCELLED) == 1 then
      for i, is_cancelled in ipairs(call('SMISMEMBER', CANCELLED, unpack(ids))) do
        cancelled[ids[i]] = is_cancelled == 1
      end
    end
    return cancelled
  end

  -- After how long a dead letter goes; never, if nothing is set.
  function rare.is_kept(died_at)
    local kept = rare.setting('dead_letter_retention')
    return not kept or died_at + kept > now
  end

  -- Tasks whose time is over go, and dead letters that are kept no longer. Returns whether there are more of either.
  function rare.end_tasks()
    local ended = call('ZRANGEBYSCORE', ENDS, '-inf', now, 'LIMIT', 0, STEP)
    rare.drop_waiting(ended, 'expired')
    local kept, dead = rare.setting('dead_letter_retention'), {}
    if kept then
      dead = call('ZRANGEBYSCORE', DEAD, '-inf', int(now - kept), 'LIMIT', 0, STEP)
      rare.drop_dead(dead, 'expired')
    end
    return #ended == STEP, #dead == STEP
  end

  -- What is due goes to the tail. Returns how many, and whether there are more.
  function rare.make_due_ready()
    local members, ids = call('ZRANGEBYSCORE', SCHEDULED, '-inf', now, 'LIMIT', 0, STEP), {}
    for i, member in ipairs(members) do
      ids[i] = sub(member, 9)
    end
    if #ids > 0 then
      call('ZREM', SCHEDULED, unpack(members))
      call('HDEL', PLACES, unpack(ids))
      rare.push('RPUSH', ids, rare.plans_of(ids))
    end
    return #ids, #ids == STEP
  end

  -- When the first task falls due.
  function rare.first_due()
    local first = call('ZRANGE', SCHEDULED, 0, 0, 'WITHSCORES')
    return tonumber(first[2] or math.huge)
  end

  function rare.live()
    return count_of('ready') + count_of('leased') + call('ZCARD', SCHEDULED)
  end

  -- Whether nothing is left of what is rare; then nobody needs to look for it.
  function rare.is_over()
    return call('EXISTS', unpack(ALL)) == 0
  end

  -- The task that has a unique key, or false. One that will never be delivered, because its time is over, has none, and goes with
  -- `drop_ended`: its id is the second answer. To be asked once.
  function rare.holder_of(key)
    local id = call('HGET', UNIQUE, key)
    if not id or call('HEXISTS', TASKS, id) == 0 then
      return false
    end
    local ends = call('ZSCORE', ENDS, id)
    if ends and tonumber(ends) <= now then
      ended[#ended + 1] = id
      return false, id
    end
    return id
  end

  function rare.drop_ended()
    rare.drop_waiting(ended, 'expired')
    ended = {}
  end

  -- Ids and records in turn.
  function rare.keep_plans(records)
    if #records > 0 then
      call('HSET', PLANS, unpack(records))
      rare.mark()
    end
  end

  -- Keys and ids in turn.
  function rare.take_keys(keys)
    if #keys > 0 then
      call('HSET', UNIQUE, unpack(keys))
      rare.mark()
    end
  end

  -- Of ids that stand one behind the other.
  function rare.ids_in(packed)
    local ids = {}
    for from = 1, #packed, 16 do
      ids[#ids + 1] = sub(packed, from, from + 15)
    end
    return ids
  end

  add_lines(rare)
  add_sizes(rare)
  return rare
end
