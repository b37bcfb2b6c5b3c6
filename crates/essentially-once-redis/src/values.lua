-- KEYS: position, windows, state. ARGV: keys of the state. Returns the hashes of the first two, and
-- the values.
local values = {}
-- In pieces, since Lua passes 8,000 arguments at most.
for first = 1, #ARGV, 6000 do
  local some = redis.call('HMGET', KEYS[3], unpack(ARGV, first, math.min(first + 5999, #ARGV)))
  for i = 1, #some do values[#values + 1] = some[i] end
end
return { redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]), values }
