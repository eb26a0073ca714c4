-- A session, a hash, knows its stream, when that last took a step, and how many tasks each of its pops leased, by stem.
local SESSION_KEPT = 600000
local function session_key(session)
  return BASE .. 'session:' .. session
end

-- Whose it is, and until when it is kept, if it is known. No script has to do with two.
local owner, kept_until
local function read_session(session)
  if not kept_until then
    local seen = redis.call('HMGET', session_key(session), 'stream', 'at')
    owner, kept_until = seen[1], seen[2] and tonumber(seen[2]) + SESSION_KEPT or math.huge
  end
end

-- True if no other stream has it.
local function has_session(session, stream)
  read_session(session)
  return not owner or owner == stream or now >= kept_until
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
  redis.call('HSET', session_key(session), 'stream', stream, 'at', int(now), ...)
  expire(session_key(session), SESSION_KEPT)
end
