-- What follows the prelude on a cluster. While a slot is on its way to another node, a script could find that a key is not here in
-- the middle of what it does; it does nothing then, for a key that is nowhere is not here either.
do
  local elsewhere = redis.pcall('EXISTS', string.sub(KEYS[1], 1, -5) .. 'nowhere')
  if type(elsewhere) == 'table' and elsewhere.err then
    return redis.error_reply('TRYAGAIN the slot of the queue is on its way to another node')
  end
end
