-- A session, a hash, knows its stream, when that last took a step, how many tasks each of its pops leased, by stem, and in which
-- life of the queue that was. Each drop of a queue ends one, and the next has another number, META's `life`: a session of the one
-- before is none.
local SESSION_KEPT = 600000
local function session_key(session)
  return BASE .. 'session:' .. session
end

-- Whose it is, and until when it is kept, if it is known. No script has to do with two.
local owner, kept_until, life
local function read_session(session)
  if not kept_until then
    life = redis.call('HGET', META, 'life') or '0'
    local seen = redis.call('HMGET', session_key(session), 'stream', 'at', 'life')
    owner, kept_until = seen[1], seen[2] and tonumber(seen[2]) + SESSION_KEPT or math.huge
    if owner and (seen[3] or '0') ~= life then
      kept_until = 0
    end
  end
end

-- True if no other stream has it.
local function has_session(session, stream)
  read_session(session)
  return not owner or owner == stream or now >= kept_until or redis.call('EXISTS', META) == 0
end

local function forget_old_session(session)
  read_session(session)
  if now >= kept_until then
    redis.call('UNLINK', session_key(session))
  end
end

-- The stream has the session from now on; further fields may follow.
local function use_session(session, stream, ...)
  forget_old_session(session)
  redis.call('HSET', session_key(session), 'stream', stream, 'at', int(now), 'life', life, ...)
  expire(session_key(session), SESSION_KEPT)
end
