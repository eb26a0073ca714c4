-- How large tasks are, where bytes are limited: a part of what rare.lua makes.

local function add_sizes(rare)
  local call, unpack = redis.call, unpack
  local META, BASE = KEYS[1], string.sub(KEYS[1], 1, -5)
  local TASKS, DEAD, SIZES = rare.TASKS, rare.DEAD, rare.SIZES
  -- What insert.lua puts behind an envelope.
  local INSERTED_AT_BYTES = 9
  -- A step of measuring is over behind so many tasks, or when their envelopes, which are read with them, have so many bytes: that is
  -- 3 ms for the sizes of tasks of 200 B. What is first read, before it is known how large they are, is little.
  local FIRST_READ, MOST_READ, TASKS_READ, BYTES_READ = 1, 500, 1000, 2 ^ 20

  -- They count no more.
  function rare.forget_sizes(ids)
    if not rare.setting('max_bytes') then
      return
    end
    local bytes = 0
    for _, size in ipairs(call('HMGET', SIZES, unpack(ids))) do
      bytes = bytes + (size or 0)
    end
    call('HDEL', SIZES, unpack(ids))
    rare.add('bytes', -bytes)
  end

  -- Sizes and ids in turn count from now on.
  function rare.note_sizes(sizes)
    local bytes = 0
    for at = 2, #sizes, 2 do
      bytes = bytes + sizes[at]
    end
    if #sizes > 0 then
      call('HSET', SIZES, unpack(sizes))
      rare.add('bytes', bytes)
    end
  end

  function rare.size_of(id)
    return tonumber(call('HGET', SIZES, id) or '0')
  end

  -- Of tasks that are there.
  function rare.measure(ids)
    local sizes = {}
    for i, id in ipairs(rare.setting('max_bytes') and ids or {}) do
      sizes[2 * i - 1], sizes[2 * i] = id, call('HSTRLEN', TASKS, id) - INSERTED_AT_BYTES
    end
    rare.note_sizes(sizes)
  end

  -- Ids and envelopes in turn count, unless they do already or are dead. Returns how many there are, and their bytes.
  local function note_read(read)
    local ids, sizes, new, bytes = {}, {}, {}, 0
    for at = 1, #read, 2 do
      local id, size = read[at], #read[at + 1]
      ids[#ids + 1], bytes = id, bytes + size
      sizes[id] = size - INSERTED_AT_BYTES
    end
    if #ids > 0 then
      local known = call('HMGET', SIZES, unpack(ids))
      local died_at = call('EXISTS', DEAD) == 1 and call('ZMSCORE', DEAD, unpack(ids)) or {}
      for i, id in ipairs(ids) do
        -- A scan may come across one twice.
        if not known[i] and not died_at[i] and sizes[id] then
          new[#new + 1], new[#new + 2] = id, sizes[id]
          sizes[id] = nil
        end
      end
    end
    rare.note_sizes(new)
    return #ids, bytes
  end

  -- A step of measuring the tasks that were there before their bytes were limited: the next goes on where this one ends, whoever
  -- takes it. Returns whether there are more.
  function rare.measure_some()
    local cursor = rare.setting('max_bytes') and call('HGET', META, 'measuring')
    if not cursor then
      return false
    end
    call('DEL', BASE .. 'spare')
    local tasks, bytes, most = 0, 0, FIRST_READ
    repeat
      local part = call('HSCAN', TASKS, cursor, 'COUNT', most)
      local read, size = note_read(part[2])
      cursor, tasks, bytes = part[1], tasks + math.max(read, most), bytes + size
      -- As many as there is room for if they are no larger than those so far.
      most = math.min(8 * most, MOST_READ, TASKS_READ - tasks, math.floor((BYTES_READ - bytes) * tasks / math.max(bytes, 1)))
    until cursor == '0' or most < 1
    if cursor == '0' then
      call('HDEL', META, 'measuring')
      return false
    end
    call('HSET', META, 'measuring', cursor)
    return true
  end
end
