-- Returns the letters that are due first: the place behind them, and field, value, field, value. It
-- stops at a megabyte, so that it never holds up the server for long.
--
-- KEYS: letters, letters due.
-- ARGV: the place to start at, the most letters, fields to leave out.
local from, left, size, found, left_out = tonumber(ARGV[1]), tonumber(ARGV[2]), 0, {}, {}
for i = 3, #ARGV do
  left_out[ARGV[i]] = true
end
while true do
  local fields = redis.call('ZRANGE', KEYS[2], from, from + 99)
  for i = 1, #fields do
    if left == 0 or size > 1000000 then
      return {from, found}
    end
    from = from + 1
    if not left_out[fields[i]] then
      local value = redis.call('HGET', KEYS[1], fields[i])
      found[#found + 1], found[#found + 2] = fields[i], value
      left, size = left - 1, size + (value and #value or 0)
    end
  end
  if #fields < 100 then
    return {from, found}
  end
end
