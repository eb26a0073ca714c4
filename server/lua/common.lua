-- What all scripts share. It stands behind the prelude, which gives `now` and `expire`; behind it stand `leases.lua`, where
-- leases are touched, and the script itself.
--
-- KEYS  1 meta HASH      counters, and where the memories stand; `life`, see sessions.lua. Where it is rare, also: `tail:<priority>`,
--                        of how many tasks were ever put behind others there (for 0, less those inserted); `schedules`, how many
--                        there were ever; `bytes` of tasks that are not dead, while limited; `measuring`, see `measure_some`.
--                        Of a queue that was ever spread over shards, which are queues to the scripts, in each shard:
--                        `generation` of its settings, `shards`, and `spread`, over how many it was at the most; see change.lua
--       The names of the others are built from that of the first: each that is sent costs a script as much as a read does.
--       tasks HASH       id -> envelope
--       ready:0 LIST     of ids, the head first: the tasks of the lowest priority, which is that of most
--       leased ZSET      what leases.lua calls a member -> deadline; of equal deadlines the first delivered is first
--       leases HASH      as leases.lua says
--       tries HASH       id -> 'deliveries failures expiries', the delivery under way not counted; absent when all are 0. Behind
--                        it, once the task failed or died, ' cause length error': see heads.lua
--       waiters ZSET     server -> until when it waits
--       spare            never written, see `first_free`
--       dead ZSET        id -> when it was given up
--       dropped STRING   of a queue that was dropped, for some time: what its next life is called, see sessions.lua
--       and, for some time as well, the keys of calls.lua and sessions.lua, and the producers of produce.lua
-- The following are not there unless somebody uses them. Their names, and all that touches them alone, are in rare.lua, and
-- scripts look there only if `rare` is there: whoever makes one of these keys makes that, and a look that finds none of them takes
-- it away.
--       rare STRING      tells that the following may be there
--       ready:1 … ready:9 LISTs, as ready:0
--       high HASH        priority, but for 0 -> how many tasks of it are ready
--       scheduled ZSET   8 bytes of a counter, id -> when it falls due
--       places HASH      id -> that counter, while it is scheduled
--       plans HASH       id -> priority, end of its time (8 bytes, 0: none), 0 or 1 + length of the unique key (2 bytes), that;
--                        for ids of version 8 and no others, as long as there is the task
--       ends ZSET        id -> end of its time, while it is ready or scheduled
--       unique HASH      unique key -> id, while that is ready, scheduled or leased
--       settings HASH    name -> number; unknown names are kept
--       cancelled SET    of ids of leased tasks that go when they would go back
--       sizes HASH       id -> bytes of the envelope, of tasks that are not dead; while a setting limits them
--       gone SET         of ids in lists whose tasks are gone
--       numbers HASH     priority -> numbers of places in that list that are not told by where they stand, see lines.lua
--       where HASH       id -> token, of leased tasks; while somebody asks for tasks by id, see where.lua
-- ARGV  1 window, 2 half of the entries that a memory keeps, 3 this server, 4 the queue's name, 5 prefix of the channels
--       6 after how many expiries a task is given up, 7 and on: the script's own
-- Returns: nothing; each script states its own.
--
-- A token is a stem of 14 bytes, and its position in 2. Tokens come in runs: a stem, then ranges of positions that follow
-- each other: the first one, and a byte for how many.
-- Fields that a later version appends to a record are kept. Numbers never go through tostring, which rounds. Where a script
-- changes several counters, it reads them and writes them all at once: a write costs Redis an entry in its file as well.
local META = KEYS[1]
local BASE = string.sub(META, 1, -5)
local TASKS, READY, LEASED, LEASES = BASE .. 'tasks', BASE .. 'ready:0', BASE .. 'leased', BASE .. 'leases'
local TRIES, WAITERS, SPARE, DEAD = BASE .. 'tries', BASE .. 'waiters', BASE .. 'spare', BASE .. 'dead'
local RARE = BASE .. 'rare'
local STEM_BYTES, RANGE_BYTES = 14, 3
-- Whether there may be anything that rare.lua knows of. Scripts find out at their beginning.
local is_rare

local function int(number)
  return string.format('%.0f', number)
end

local function args_from(first)
  return { unpack(ARGV, first) }
end

-- A Redis that is full refuses a script's first write unless it is a command that frees, and lets the rest through then.
local function first_free()
  redis.call('DEL', SPARE)
end

-- A memory, 'acked' (stem -> ranges, of each the first and last position, a byte each) or 'requests', has two
-- generations, hashes. One takes entries for the window, or until it has half of all; then the older is dropped and a new one
-- begins. It is seen until twice the window after it began.
local function memory(kind)
  local at = redis.call('HMGET', META, kind .. ':at', kind .. ':0', kind .. ':1', kind .. ':from')
  local began = { [0] = tonumber(at[2] or '0'), [1] = tonumber(at[3] or '0') }
  return { kind = kind, at = tonumber(at[1] or '0'), began = began, from = tonumber(at[4] or '0') }
end

local function generation_key(mem, generation)
  return BASE .. mem.kind .. ':' .. generation
end

-- The keys of the generations that are still seen, the current one first.
local function seen_generations(mem)
  local keys = {}
  for _, generation in ipairs({ mem.at, 1 - mem.at }) do
    if now < mem.began[generation] + 2 * tonumber(ARGV[1]) then
      keys[#keys + 1] = generation_key(mem, generation)
    end
  end
  return keys
end

-- The key of the generation that takes entries, and true if it is a new one, because it is time. `entered` is how many
-- entries there were ever, where a field is not an entry. Whoever puts the first in lets a new one vanish when it is not
-- seen any more, so that a queue that nobody uses keeps none.
local function open_generation(kind, entered)
  local mem = memory(kind)
  local key = generation_key(mem, mem.at)
  local entries = entered and entered - mem.from or redis.call('HLEN', key)
  if now < mem.began[mem.at] + tonumber(ARGV[1]) and entries < tonumber(ARGV[2]) then
    return key, false
  end
  mem.at = 1 - mem.at
  key = generation_key(mem, mem.at)
  redis.call('UNLINK', key)
  redis.call('HSET', META, kind .. ':at', mem.at, kind .. ':' .. mem.at, int(now), kind .. ':from', int(entered or 0))
  return key, true
end

local function recall_request(field)
  for _, key in ipairs(seen_generations(memory('requests'))) do
    local record = redis.call('HGET', key, field)
    if record then
      return record
    end
  end
  return false
end

local function remember_request(field, record)
  local key, is_new = open_generation('requests')
  redis.call('HSET', key, field, record)
  if is_new then
    expire(key, 2 * tonumber(ARGV[1]))
  end
end

-- Tells the other servers that wait here about `count` tasks. A hint: it may be lost, they also look by themselves.
local function wake_others(count)
  for _, server in ipairs(redis.call('ZRANGEBYSCORE', WAITERS, now, '+inf')) do
    if server ~= ARGV[3] then
      redis.call('PUBLISH', ARGV[5] .. server, int(count) .. ' ' .. ARGV[4])
    end
  end
end
