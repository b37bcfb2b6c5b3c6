-- Returns the position, the windows, and some values of the state.
--
-- KEYS: position, windows, state.
-- ARGV: keys of the state.
local values = {}
-- In pieces, since Lua passes at most 8,000 arguments.
for first = 1, #ARGV, 6000 do
  local some = redis.call('HMGET', KEYS[3], unpack(ARGV, first, math.min(first + 5999, #ARGV)))
  for i = 1, #some do values[#values + 1] = some[i] end
end
return { redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]), values }
