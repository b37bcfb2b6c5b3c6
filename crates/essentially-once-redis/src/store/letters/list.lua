-- Returns letters in the order of their offsets, as field, value, field, value. It stops at a
-- megabyte, so that it never holds up the server for long.
--
-- KEYS: letters, letters by offset.
-- ARGV: the place in the index to start at, the most letters.
local found, size, from, left = {}, 0, ARGV[1], tonumber(ARGV[2])
while left > 0 do
  local members = redis.call('ZRANGE', KEYS[2], from, '+', 'BYLEX', 'LIMIT', 0, math.min(left, 100))
  for i = 1, #members do
    local field = members[i]:sub(1, 41)
    local value = redis.call('HGET', KEYS[1], field)
    found[#found + 1], found[#found + 2] = field, value
    size = size + #members[i] + (value and #value or 0)
    if size > 1000000 then
      return found
    end
  end
  if #members < 100 then
    return found
  end
  left, from = left - #members, '(' .. members[#members]
end
return found
