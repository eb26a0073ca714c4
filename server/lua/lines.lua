-- The lists in which tasks are ready, where ids of tasks that are gone stand in them: a part of what rare.lua makes.

local function add_lines(rare)
  local call, unpack, pack = redis.call, unpack, struct.pack
  local TASKS, GONE, NUMBERS = rare.TASKS, rare.GONE, rare.NUMBERS
  -- So many ids of tasks that are gone are read in vain, or taken off a head, at once.
  local MAX_SKIPPED = 1000
  -- Where most ids of a list are of tasks that are gone, so many are looked through at once, or twice as many as live if that is more.
  -- Where more tasks live than the second number, they are not looked through before there are four times as many ids of others; where
  -- more than the third live, not at all.
  local CUT, LIVE_FEW, LIVE_MAX = 4000, 5000, 20000
  -- So many values a call of Redis takes from Lua without trouble.
  local AT_ONCE = 1000
  -- Tasks that were put back may stand before the first that was ever put in.
  local FIRST = 2 ^ 50
  local heads = {}
  rare.MAX_SKIPPED = MAX_SKIPPED

  -- The ids of the first tasks that are ready, at most so many, and none while nothing is delivered; and whether those of too many
  -- that are gone stand before the others.
  function rare.first_ids(most)
    local ids, skipped, has_gone = {}, 0, call('EXISTS', GONE) == 1
    for _, list in ipairs(rare.is_paused() and {} or rare.lists()) do
      local part, read, head = nil, 0, { key = list.key, priority = list.priority, up_to = {}, gone = {} }
      heads[#heads + 1] = head
      repeat
        part = call('LRANGE', list.key, read, read + most - 1)
        local is_gone = has_gone and #part > 0 and call('SMISMEMBER', GONE, unpack(part)) or {}
        for i, id in ipairs(part) do
          if is_gone[i] == 1 then
            skipped = skipped + 1
            head.gone[#head.gone + 1] = { id, read + i }
          elseif #ids < most then
            ids[#ids + 1] = id
            head.up_to[#head.up_to + 1] = read + i
          end
        end
        read = read + #part
      until #part < most or #ids == most or skipped >= MAX_SKIPPED
      if #ids == most or skipped >= MAX_SKIPPED then
        break
      end
    end
    return ids, skipped >= MAX_SKIPPED
  end

  -- So many of these are taken off their lists, with what is gone before them. The caller counts them.
  function rare.take_off(count)
    for _, head in ipairs(heads) do
      local from_here = math.min(count, #head.up_to)
      if from_here > 0 then
        local up_to, gone = head.up_to[from_here], {}
        call('LTRIM', head.key, up_to, -1)
        for _, skipped in ipairs(head.gone) do
          gone[#gone + 1] = skipped[2] < up_to and skipped[1] or nil
        end
        if #gone > 0 then
          call('SREM', GONE, unpack(gone))
        end
        rare.leave(head.priority, from_here)
      end
      count = count - from_here
    end
  end

  -- Places in a list have numbers that stay: how many tasks were ever put behind others before that one there. Cutting ids out would
  -- change those of the places before, so these are kept then, in one record for each priority: the number that the first of them
  -- would have, and of each what it has, 8 bytes each. Returns how those of a list are told, whose first place is 0.
  function rare.numbers_of(list)
    local tail = rare.count_of('tail:' .. list.priority) + (list.priority == 0 and rare.count_of('inserted') or 0)
    local length, kept = call('LLEN', list.key), call('HGET', NUMBERS, list.priority)
    local head, from, first = FIRST + tail - length, nil, nil
    if kept then
      from, first = struct.unpack('>I8I8', kept)
    end
    local numbers = { count_kept = kept and math.max(0, from + #kept / 8 - 1 - head) or 0 }

    function numbers.at(place)
      if place >= numbers.count_kept then
        return head + place
      end
      local nth = head + place - from
      return nth < 0 and first + nth or (struct.unpack('>I8', kept, 9 + 8 * nth))
    end

    -- The first place that has a higher one.
    function numbers.place_behind(number)
      local low, high = 0, length
      while low < high do
        local middle = math.floor((low + high) / 2)
        if numbers.at(middle) <= number then
          low = middle + 1
        else
          high = middle
        end
      end
      return low
    end

    -- So many ids are cut out of the places before this one, of which these are the numbers of the others.
    function numbers.keep(before, others, cut_out)
      for place = before, numbers.count_kept - 1 do
        others[#others + 1] = pack('>I8', numbers.at(place))
      end
      if #others > 0 then
        call('HSET', NUMBERS, list.priority, pack('>I8', head + cut_out) .. table.concat(others))
      end
    end

    return numbers
  end

  -- Numbers need not be kept of places that are not there any more.
  local function forget_numbers()
    for _, priority in ipairs(call('EXISTS', NUMBERS) == 1 and call('HKEYS', NUMBERS) or {}) do
      priority = tonumber(priority)
      if rare.numbers_of({ key = rare.list_of(priority), priority = priority }).count_kept == 0 then
        call('HDEL', NUMBERS, priority)
      end
    end
  end

  local function in_parts(command, key, values)
    for from = 1, #values, AT_ONCE do
      call(command, key, unpack(values, from, math.min(from + AT_ONCE - 1, #values)))
    end
  end

  -- Cuts ids of tasks that are gone out of the front of a list. Returns how many.
  local function cut(list, length)
    local numbers, others, live, gone = rare.numbers_of(list), {}, {}, {}
    -- Numbers that are kept are written again with each cut, so where many are, all of those places are looked through.
    local count = math.min(length, math.max(CUT, 2 * list.ready, math.min(numbers.count_kept, 2 * LIVE_MAX)))
    for from = 0, count - 1, AT_ONCE do
      local ids = call('LRANGE', list.key, from, math.min(from + AT_ONCE, count) - 1)
      for i, is_gone in ipairs(call('SMISMEMBER', GONE, unpack(ids))) do
        if is_gone == 1 then
          gone[#gone + 1] = ids[i]
        else
          live[#live + 1], others[#others + 1] = ids[i], pack('>I8', numbers.at(from + i - 1))
        end
      end
    end
    local from_last = {}
    for i = #live, 1, -1 do
      from_last[#from_last + 1] = live[i]
    end
    call('LTRIM', list.key, count, -1)
    in_parts('SREM', GONE, gone)
    in_parts('LPUSH', list.key, from_last)
    numbers.keep(count, others, #gone)
    return #gone
  end

  -- Takes ids of tasks that are gone off the heads of lists, and where most are gone, behind some that live, out of the front: of what
  -- is looked through there at least half is gone, then. Returns whether there may be more.
  local function trim()
    if call('EXISTS', GONE) == 0 then
      return false
    end
    local budget = MAX_SKIPPED
    for priority = 0, 9 do
      local list, gone = rare.list_of(priority), {}
      local ids = call('LRANGE', list, 0, budget - 1)
      while #gone < #ids and call('HEXISTS', TASKS, ids[#gone + 1]) == 0 do
        gone[#gone + 1] = ids[#gone + 1]
      end
      if #gone > 0 then
        call('LTRIM', list, #gone, -1)
        call('SREM', GONE, unpack(gone))
      end
      budget = budget - #gone
      if budget == 0 then
        return true
      end
    end
    for _, list in ipairs(rare.lists()) do
      local length, live = call('LLEN', list.key), list.ready
      if live <= LIVE_MAX and length - live > (live > LIVE_FEW and 4 * live or live + MAX_SKIPPED) then
        return cut(list, length) > 0
      end
    end
    return false
  end

  function rare.trim()
    local more = trim()
    forget_numbers()
    return more
  end

  -- Of tasks that are to be put in, takes the ids off lists that are still there: a call that deleted tasks came between two runs
  -- of the one that puts them in. Who pages through such a list then may see a task of it twice.
  function rare.take_gone_off(ids)
    if #ids == 0 or call('EXISTS', GONE) == 0 then
      return
    end
    for i, is_gone in ipairs(call('SMISMEMBER', GONE, unpack(ids))) do
      for priority = 0, is_gone == 1 and 9 or -1 do
        call('LREM', rare.list_of(priority), 1, ids[i])
      end
    end
    call('SREM', GONE, unpack(ids))
  end
end
