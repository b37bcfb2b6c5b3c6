-- KEYS: stream. ARGV: incarnation or '', 1 if the stream may be created, then for each record how
-- many arguments follow, and its fields and values. Returns the last id; nil if the stream is gone,
-- or another one by now. All records are appended, or none.
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
    -- What fails, fails at the first record; only a stream that runs out of ids fails later.
    return last and redis.error_reply('PARTIAL ' .. id.err) or id
  end
  last = id
  at = stop + 1
end
return last
