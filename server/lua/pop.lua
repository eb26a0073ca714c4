-- Acks, takes back what ran out, then leases from the head, for some calls that differ in little.
--
-- KEYS     as in common.lua
-- ARGV     7 envelope bytes after which a call leases no further task, 8 lease in ms, or '?' and the one that holds unless the
--          queue has a setting, 9 for how many ms to say that this
--          server waits if a call finds nothing, or 0, 10 1: pop even if more leases ran out than one step takes back,
--          11 how many calls; a call with one of the following is alone: 12 request id or '', 13 fingerprint, 14 attempt
--          or '-', 15 session or '', 16 stream, 17 how many spent stems follow; those; of each call its stem and a byte,
--          the most tasks; then runs of tokens to ack
-- Returns  {0, ready, reclaimed, due in or -1, outcomes, deadline of what is leased now, now, 1 if the request is known, the generation
--          of the settings, of each call {ids, one behind the other, or {ids, tries, tokens, deadlines}; then envelopes…}}, or with this alone:
--          {1, reclaimed, outcomes}: there is more to be done before a pop, and nothing was popped for that;
--          {2}: request id reused; {3, ready, reclaimed, outcomes}: another stream has the session
--          Tries are 4 bytes for deliveries, for failures and for expiries of each, or '' if all are 0; tokens a stem and
--          positions of 2 bytes, and deadlines of 8 bytes, or '' where they are those of new leases.
local max_bytes, calls = tonumber(ARGV[7]), tonumber(ARGV[11])
local request, holder = ARGV[12] ~= '' and 'p' .. ARGV[12], ARGV[14]
local session, stream, spent = ARGV[15] ~= '' and ARGV[15], ARGV[16], tonumber(ARGV[17])
local first_call = 18 + spent
-- What insert.lua put behind each envelope.
local INSERTED_AT_BYTES = 9
local MAX_HOLDERS = 8

-- Adds a try to those that were answered with a lease. They may be answered in another order than they were made, so
-- each of them counts. So many tries at once are not kept apart: the lease is then given back by nobody, and runs out.
local function with_holder(holders, one)
  local count = 0
  for other in string.gmatch(holders, '[^,]+') do
    if other == one or other == '*' then
      return holders
    end
    count = count + 1
  end
  return holders .. ',' .. (count < MAX_HOLDERS and one or '*')
end

-- The tries of tasks. The delivery under way counts, though it is in the lease and not yet in there.
local function tries_of(ids)
  if #ids == 0 or not is_odd then
    return ''
  end
  local tries, all = redis.call('HMGET', TRIES, unpack(ids)), {}
  for i = 1, #ids do
    local deliveries, failures, expiries = read_tries(tries[i])
    all[i] = struct.pack('>I4I4I4', deliveries, failures, expiries)
  end
  return table.concat(all)
end

-- Redis keeps what is small as a list, which it searches from its front, until it has many more entries than is fast. A long
-- entry makes a table of it, and that it stays as long as it is there, also when the entry has gone. Where pops of one task are
-- many, and more than so many tasks are leased, that is seen to every so many deliveries.
local LISTED, LISTED_AGAIN = 32, 512
local LONG = string.rep('-', 65)

-- Answers with what is held already.
local function answer_again(batches)
  if request then
    local records = {}
    for i, batch in ipairs(batches) do
      batch.holders = with_holder(batch.holders, holder)
      records[2 * i - 1] = batch.key
      records[2 * i] = write_batch(batch)
    end
    first_free()
    redis.call('HSET', LEASES, unpack(records))
  end
  local ids, run, deadlines = {}, { string.sub(batches[1].key, 1, STEM_BYTES) }, {}
  for _, batch in ipairs(batches) do
    local deadline = struct.pack('>I8', tonumber(redis.call('ZSCORE', LEASED, member(batch))))
    for _, place in ipairs(held_places(batch)) do
      ids[#ids + 1] = id_at(batch, place)
      run[#run + 1] = string.sub(token_at(batch, place), -2)
      deadlines[#deadlines + 1] = deadline
    end
  end
  local envelopes = redis.call('HMGET', TASKS, unpack(ids))
  return { { table.concat(ids), tries_of(ids), table.concat(run), table.concat(deadlines) }, unpack(envelopes) }
end

local record = request and recall_request(request)
if record and string.sub(record, 1, 16) ~= ARGV[13] then
  return { 2 }
end
is_odd = redis.call('EXISTS', TRIES, WITHDRAWN, RARE) > 0
is_rare = is_odd and redis.call('EXISTS', RARE) == 1
local rare = is_rare and rarely()
local lease_ms = tonumber(ARGV[8]) or rare and rare.setting('lease') or tonumber(string.sub(ARGV[8], 2))
local outcomes = ack(args_from(first_call + calls))
local reclaimed, more, has_ended = reclaim()
-- What has ended is never delivered, however much of it there is.
if has_ended or more and ARGV[10] ~= '1' then
  return { 1, reclaimed, outcomes }
end
if session and not has_session(session, stream) then
  return { 3, ready_count(), reclaimed, outcomes }
end
if spent > 0 then
  redis.call('HDEL', session_key(session), unpack(ARGV, 18, 17 + spent))
end

-- Whoever made a call may have given it up, and withdrawn it, before it arrived; and it may be its second run.
local stems, most, total, answers = {}, {}, 0, {}
for i = 1, calls do
  local call = ARGV[first_call + i - 1]
  stems[i], most[i] = string.sub(call, 1, STEM_BYTES), string.byte(call, STEM_BYTES + 1)
end
if is_odd then
  for i, untill in ipairs(redis.call('ZMSCORE', WITHDRAWN, unpack(stems))) do
    answers[i] = untill and now < tonumber(untill) and { '' } or nil
  end
end
local earlier = record and not answers[1] and held_under(string.sub(record, 17, 16 + STEM_BYTES))
if earlier and #earlier > 0 then
  answers[1] = answer_again(earlier)
else
  for i, known in ipairs(redis.call('HMGET', LEASES, unpack(stems))) do
    answers[i] = answers[i] or known and answer_again(held_under(stems[i])) or nil
  end
end
for i = 1, calls do
  total = total + (answers[i] and 0 or most[i])
end

-- Envelopes are read one for each call at first, then as many more as there may be room for if they are no smaller than
-- those so far, and at most eight times as many each time, so that of large ones few are read in vain.
local ids, envelopes, taken, read, before, step, size = {}, nil, 0, 0, 0, calls, 0
local function read_more()
  if read > 0 then
    step = math.max(1, math.min(8 * step, math.ceil(calls * max_bytes * read / math.max(size, 1)) - read))
  end
  before, read = read, math.min(read + step, #ids)
  envelopes = redis.call('HMGET', TASKS, unpack(ids, before + 1, read))
end

-- The next task from the head. The id of a task that is gone may still be in the list; it is not counted as ready any more.
local function next_task()
  while taken < #ids do
    if taken == read then
      read_more()
    end
    taken = taken + 1
    local envelope = envelopes[taken - before]
    if envelope then
      size = size + #envelope
      return ids[taken], envelope
    end
  end
end

local leased, new, sizes, has_skipped = {}, {}, {}, false
if total > 0 and rare then
  ids, has_skipped = rare.first_ids(total)
elseif total > 0 then
  ids = redis.call('LRANGE', READY, 0, total - 1)
end
if has_skipped and #ids == 0 and ARGV[10] ~= '1' then
  return { 1, reclaimed, outcomes }
end
for i = 1, calls do
  if not answers[i] then
    local answer, count, bytes = { '' }, 0, 0
    local first = #leased + 1
    while count < most[i] and (bytes < max_bytes or count == 0) do
      local id, envelope = next_task()
      if not id then
        break
      end
      count = count + 1
      leased[#leased + 1] = id
      answer[1 + count] = envelope
      bytes = bytes + #envelope - INSERTED_AT_BYTES
    end
    answers[i] = answer
    if count > 0 then
      answer[1] = count == 1 and leased[first] or table.concat(leased, '', first)
      new[#new + 1] = i
      sizes[i] = count
    end
  end
end
local held, delivered
local counted = redis.call('HMGET', META, 'ready', 'generation', 'leased', 'delivered')
local ready, generation = tonumber(counted[1] or '0'), counted[2] or '0'
if #leased > 0 then
  ready, held, delivered = ready - #leased, (counted[3] or 0) + #leased, (counted[4] or 0) + #leased
end
if taken > 0 and rare then
  rare.take_off(taken)
elseif taken > 0 then
  redis.call('LTRIM', READY, taken, -1)
end
if #leased > 0 then
  redis.call('HSET', META, 'ready', int(ready), 'leased', int(held), 'delivered', int(delivered))
  local order = delivered - #leased + 1
  local is_time = #new > 1 and held > LISTED and (delivered - 1) % LISTED_AGAIN < #leased
  if is_time then
    redis.call('HSET', LEASES, LONG, '')
    redis.call('ZADD', LEASED, '+inf', LONG)
  end
  local records, scores, deadline, at = {}, {}, int(now + lease_ms), 0
  local tries, behind_order = tries_of(leased), {}
  for n, i in ipairs(new) do
    local count = sizes[i]
    local first = struct.pack('>I8', order)
    -- Of many records, all that differs but the order and the ids is the count.
    behind_order[count] = behind_order[count]
      or string.sub(struct.pack(HEADER, 0, lease_ms, now, count, 0, #holder, holder), 9)
    records[2 * n - 1] = stems[i]
    records[2 * n] = first .. behind_order[count] .. answers[i][1]
    scores[2 * n - 1] = deadline
    scores[2 * n] = first .. stems[i]
    if tries ~= '' then
      answers[i][1] = { answers[i][1], string.sub(tries, 12 * at + 1, 12 * (at + count)), '', '' }
    end
    order, at = order + count, at + count
  end
  redis.call('HSET', LEASES, unpack(records))
  redis.call('ZADD', LEASED, unpack(scores))
  if is_time then
    redis.call('HDEL', LEASES, LONG)
    redis.call('ZREM', LEASED, LONG)
  end
  if rare then
    local tokens = {}
    for _, i in ipairs(new) do
      for position = 0, sizes[i] - 1 do
        tokens[#tokens + 1] = stems[i] .. string.char(0, position)
      end
    end
    rare.lease(leased, tokens)
  end
  if request then
    remember_request(request, ARGV[13] .. stems[1] .. string.char(#leased))
  end
  if session then
    use_session(session, stream, stems[1], #leased)
  end
end

ready = rare and rare.is_paused() and 0 or ready
local is_empty = false
if reclaimed > 0 and ready > 0 then
  wake_others(ready)
end
for i = 1, calls do
  is_empty = is_empty or answers[i][1] == ''
end
if is_empty and ARGV[9] ~= '0' then
  announce(tonumber(ARGV[9]))
end
return {
  0, ready, reclaimed, is_empty and due_in() or -1, outcomes, int(now + lease_ms), int(now), record and 1 or 0, generation,
  unpack(answers, 1, calls),
}
