-- KEYS: position. ARGV: owner. Counts a beat if the position is the owner's. It takes a few bytes
-- at most, so also where memory is full.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then
  local beats = tonumber(redis.call('HGET', KEYS[1], 'beats')) or 0
  -- Lua counts exactly up to 2^53.
  redis.call('HSET', KEYS[1], 'beats', string.format('%.0f', (beats + 1) % 2^53))
end
return 1
