-- Who decides on inserts, where some of the tasks have a plan or fall due later, or where the queue has what is rare. `given` are
-- the ids of all tasks by number, `packed` is what `read_extras` reads, and `size_of` tells the size of an envelope by number.
local function gate_of(given, packed, size_of)
  local rare, call, sub, byte = rarely(), redis.call, string.sub, string.byte

  -- What a task has behind it that is imported, and where what follows it begins.
  local function read_past(at)
    local past, length = {}, 0
    past.inserted_at, past.deliveries, past.failures, past.expiries, past.cause, past.died_at, length, at =
      struct.unpack('>I8I4I4I4BI8I2', packed, at)
    past.error = sub(packed, at, at + length - 1)
    return past, at + length
  end

  -- A record of tries, as heads.lua has it; nothing if there is nothing to tell.
  local function tries_of(past)
    local record = table.concat({ int(past.deliveries), ' ', int(past.failures), ' ', int(past.expiries) })
    if past.cause > 0 or past.error ~= '' then
      return table.concat({ record, ' ', int(past.cause), ' ', int(#past.error), ' ', past.error })
    end
    return past.deliveries + past.failures + past.expiries > 0 and record
  end

  -- What some of the tasks to insert have beside their envelopes, by their number. Of each, packed: its number, 4 bytes; a byte
  -- of bits: 1 due after that time, 2 due at that time, 4 has an end, 8 has a unique key, 16 has a past; due, 8 bytes; priority, a
  -- byte; time to live, 8 bytes; length of the unique key, 2 bytes; that. Of a past: when it was inserted, 8 bytes; deliveries,
  -- failures, expiries, 4 bytes each; why it is dead, a byte, as in its tries, and when it died, 8 bytes; length of its last error, 2
  -- bytes; that.
  local function read_extras()
    local extras, at = {}, 1
    while at <= #packed do
      local task, bits, due, priority, ttl, length
      task, bits, due, priority, ttl, length, at = struct.unpack('>I4BI8BI8I2', packed, at)
      local extra = { priority = priority }
      extra.due = bits % 2 >= 1 and now + due or bits % 4 >= 2 and due or 0
      extra.key = bits % 16 >= 8 and sub(packed, at, at + length - 1)
      at = at + length
      if bits >= 16 then
        extra.past, at = read_past(at)
      end
      extra.ends = bits % 8 >= 4 and (extra.past and extra.past.inserted_at or now) + ttl
      extras[task] = extra
    end
    return extras
  end

  local function write_plan(plan)
    return struct.pack('>BI8I2', plan.priority, plan.ends or 0, plan.key and 1 + #plan.key or 0) .. (plan.key or '')
  end

  -- An id, with a mark: it is of the task that another one would have been a duplicate of.
  local function marked(id)
    return sub(id, 1, 6) .. string.char(byte(id, 7) + 16) .. sub(id, 8)
  end

  -- As the calls of calls.lua, which no insert needs but these.
  local CALL, CALL_TTL = BASE .. 'call:', 60000
  local gate, holders, extras, answers = {}, {}, read_extras(), {}
  local max_tasks, max_bytes = rare.setting('max_tasks'), rare.setting('max_bytes')
  -- A shard has its part.
  local shards = (max_tasks or max_bytes) and rare.count_of('shards') or 0
  local function part(max)
    return max and max > 0 and shards > 1 and math.max(1, math.floor(max / shards)) or max
  end
  local tasks_here, bytes_here = part(max_tasks), part(max_bytes)
  local live, bytes = max_tasks and rare.live(), max_bytes and rare.count_of('bytes')

  -- What is imported may be over when it comes: by id the sizes of those that have a key, and which of them gave it up.
  local over_already, born_ended = {}, {}

  local function holder_of(key)
    if holders[key] == nil then
      local holder, ended = rare.holder_of(key)
      holders[key] = holder
      if ended then
        live, bytes = live and live - 1, bytes and bytes - rare.size_of(ended)
      end
    end
    local over = holders[key] and over_already[holders[key]]
    if over then
      born_ended[#born_ended + 1], holders[key] = holders[key], false
      live, bytes = live and live - 1, bytes and bytes - over
    end
    return holders[key]
  end

  local function is_dead(task)
    local past = extras[task] and extras[task].past
    return past and past.cause > 0
  end

  -- Whether a call imports: its task is never another one than that which is there under its id.
  function gate.is_import(first)
    return extras[first] and extras[first].past
  end

  -- Of the tasks from one number to another: by number the ids of those that have the keys of duplicates, as they are answered;
  -- and what is refused, if anything. `again` are tasks that are there already.
  function gate.enter(first, last, again)
    local duplicates, own, tasks, size, over = {}, {}, 0, 0, false
    for task = first, last do
      local lives = not is_dead(task)
      local key = lives and extras[task] and extras[task].key
      local holder = key and (own[key] or holder_of(key))
      if holder and holder ~= given[task] then
        duplicates[task] = marked(holder)
      elseif lives then
        tasks, size = tasks + 1, size + size_of(task)
        if key then
          own[key] = given[task]
          over = extras[task].ends and extras[task].ends <= now and size_of(task)
        end
      end
    end
    if again or tasks == 0 then
      return duplicates
    elseif max_tasks and live + tasks > tasks_here then
      return duplicates, { 'max_tasks', int(max_tasks) }
    elseif max_bytes and bytes + size > bytes_here then
      return duplicates, { 'max_bytes', int(max_bytes) }
    end
    live, bytes = live and live + tasks, bytes and bytes + size
    for key, id in pairs(own) do
      -- Who imports puts in one task a call, and nobody else what is over.
      holders[key], over_already[id] = id, over
    end
    return duplicates
  end

  -- Whether a call cannot be told from its own second run by its tasks: others may have their unique keys by then.
  function gate.has_keys(first, last)
    for task = first, last do
      if extras[task] and extras[task].key then
        return true
      end
    end
    return false
  end

  -- What such a call was answered, if it ran: 0 as given, or {ids}. Its first id names it.
  function gate.recall(first)
    local ids = call('GET', CALL .. given[first])
    return ids and (ids == '' and 0 or { ids })
  end

  -- To be recalled once it is done: its ids, or nothing if they are as given.
  function gate.remember(first, ids)
    answers[#answers + 1] = { CALL .. given[first], ids or '' }
  end

  -- The ids of these tasks as they are answered.
  function gate.ids(first, last, duplicates)
    local ids = {}
    for task = first, last do
      ids[#ids + 1] = duplicates[task] or given[task]
    end
    return table.concat(ids)
  end

  -- Puts in tasks, given by their numbers; `fields` are ids and envelopes in turn. Returns how many are ready, and
  -- how many were ever inserted.
  function gate.put_in(numbers, fields)
    local ids, ready, later, plans, records, keys, sizes = {}, {}, {}, {}, {}, {}, {}
    local dead, tries = {}, {}
    for i, task in ipairs(numbers) do
      local id, extra = given[task], extras[task]
      local past, is_gone = extra and extra.past, is_dead(task)
      ids[i] = id
      if max_bytes and not is_gone then
        sizes[#sizes + 1], sizes[#sizes + 2] = id, size_of(task)
      end
      if extra and byte(id, 7) >= 128 then
        plans[id] = extra
        records[#records + 1], records[#records + 2] = id, write_plan(extra)
        if extra.key and not is_gone then
          keys[#keys + 1], keys[#keys + 2] = extra.key, id
        end
      end
      if past then
        fields[2 * i] = sub(fields[2 * i], 1, -9) .. struct.pack('<I8', past.inserted_at)
        local record = tries_of(past)
        if record then
          tries[#tries + 1], tries[#tries + 2] = id, record
        end
      end
      if is_gone then
        dead[#dead + 1], dead[#dead + 2] = int(past.died_at), id
      elseif extra and extra.due > now then
        later[#later + 1] = { id, extra.due }
      else
        ready[#ready + 1] = id
      end
    end
    -- A full Redis has to refuse this before anything frees; of duplicates it tells.
    if #ids > 0 then
      call('HSET', TASKS, unpack(fields))
    else
      first_free()
    end
    rare.drop_ended()
    rare.take_gone_off(ids)
    rare.keep_plans(records)
    rare.take_keys(keys)
    rare.push('RPUSH', ready, plans)
    rare.schedule(later, plans)
    if #dead > 0 then
      call('ZADD', BASE .. 'dead', unpack(dead))
    end
    if #tries > 0 then
      call('HSET', BASE .. 'tries', unpack(tries))
    end
    -- Those count at this tail already.
    rare.add('tail:0', -#ids)
    if max_bytes then
      rare.note_sizes(sizes)
    end
    rare.drop_waiting(born_ended, 'expired')
    for _, answer in ipairs(answers) do
      call('SET', answer[1], answer[2], 'PX', CALL_TTL)
    end
    return #ready, #ids > 0 and call('HINCRBY', META, 'inserted', #ids)
  end

  return gate
end
