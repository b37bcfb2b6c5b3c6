-- Returns the first letter of a key: its field and its value.
--
-- KEYS: letters, letters by key.
-- ARGV: the first and the last place in the index.
local first = redis.call('ZRANGE', KEYS[2], ARGV[1], ARGV[2], 'BYLEX', 'LIMIT', 0, 1)[1]
if not first then
  return {}
end
local field = first:sub(-41)
return {field, redis.call('HGET', KEYS[1], field)}
