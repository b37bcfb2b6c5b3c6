-- Appends all records or none.
--
-- KEYS: stream.
-- ARGV: incarnation or '', 1 if the stream may be created; then for each record the number of its
--   fields and values, and these.
-- Returns the last id; nil if the stream was deleted or created again.
if ARGV[1] ~= '' and incarnation(KEYS[1]) ~= ARGV[1] then return false end
local last
local at, count = 3, #ARGV
while at <= count do
  local stop = at + tonumber(ARGV[at])
  local id
  if last or ARGV[2] == '1' then
    id = redis.pcall('XADD', KEYS[1], '*', unpack(ARGV, at + 1, stop))
  else
    id = redis.pcall('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV, at + 1, stop))
  end
  if not id then return false end
  if type(id) == 'table' then
    -- Every error occurs at the first record, except in a stream that runs out of ids.
    return last and redis.error_reply('PARTIAL ' .. id.err) or id
  end
  last = id
  at = stop + 1
end
return last
