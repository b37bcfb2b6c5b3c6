-- Returns the number of letters of each key, as key, number, key, number. A key is as in the index,
-- with the byte that ends it. It stops at a megabyte, so that it never holds up the server for
-- long.
--
-- KEYS: letters by key.
-- ARGV: the place in the index to start at, the most keys.
local counts, size, from = {}, 0, ARGV[1]
for _ = 1, tonumber(ARGV[2]) do
  local first = redis.call('ZRANGE', KEYS[1], from, '+', 'BYLEX', 'LIMIT', 0, 1)[1]
  if not first or size > 1000000 then
    return counts
  end
  local key = first:sub(1, -42)
  -- Offsets consist of digits, and this is the character after 9.
  from = '[' .. key .. ':'
  counts[#counts + 1], counts[#counts + 2] = key, redis.call('ZLEXCOUNT', KEYS[1], '[' .. key, '(' .. key .. ':')
  size = size + #key
end
return counts
