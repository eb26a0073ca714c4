-- Withdraws a pop whose answer was lost. If it has run, what it leased goes back to the head, uncounted, unless another try
-- was answered with it; if it has not run, it will lease nothing when it does.
--
-- KEYS     as in common.lua
-- ARGV     7 stem of its tokens, 8 the most tasks, 9 request id or '', 10 attempt or '-'
-- Returns  how many tasks went back
local stem, attempt = ARGV[7], ARGV[10]
local tokens = tokens_of_stem(stem, tonumber(ARGV[8]))
if ARGV[9] ~= '' then
  -- It may have been answered with what an earlier try had leased.
  for _, token in ipairs(tokens_of_record(recall_request('p' .. ARGV[9]))) do
    tokens[#tokens + 1] = token
  end
end
local held = held_of(tokens)
first_free()
redis.call('SET', call_key(stem), '', 'PX', CALL_TTL)
local ownerless = disown(held, attempt)
to_head(ownerless, 0, 0)
if #ownerless > 0 then
  wake_others(#ownerless)
end
return #ownerless
