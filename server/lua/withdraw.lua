-- Withdraws a pop whose answer was lost. If it has run, what it leased goes back to the head, uncounted, unless another try
-- was answered with it; if it has not run, it will lease nothing when it does.
--
-- KEYS     as in common.lua
-- ARGV     6 stem of its tokens, 7 the most tasks, 8 request id or '', 9 attempt or '-'
-- Returns  how many tasks went back
local stem, attempt = ARGV[6], ARGV[9]
local tokens = tokens_of_stem(stem, tonumber(ARGV[7]))
if ARGV[8] ~= '' then
  -- It may have been answered with what an earlier try had leased.
  for _, token in ipairs(tokens_of_record(recall_request('p' .. ARGV[8]))) do
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
