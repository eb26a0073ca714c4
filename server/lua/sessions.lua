-- A session, a hash, knows its stream, when that last took a step, and how many tasks each of its pops leased, by stem.
local SESSION_KEPT = 600000
local function session_key(session)
  return BASE .. 'session:' .. session
end

-- True if no other stream has it.
local function has_session(session, stream)
  local seen = redis.call('HMGET', session_key(session), 'stream', 'at')
  return not seen[1] or seen[1] == stream or now >= tonumber(seen[2]) + SESSION_KEPT
end

local function forget_old_session(session)
  local at = redis.call('HGET', session_key(session), 'at')
  if at and now >= tonumber(at) + SESSION_KEPT then
    redis.call('UNLINK', session_key(session))
  end
end

-- The stream has the session from now on; further fields may follow.
local function use_session(session, stream, ...)
  forget_old_session(session)
  redis.call('HSET', session_key(session), 'stream', stream, 'at', int(now), ...)
  expire(session_key(session), SESSION_KEPT)
end
