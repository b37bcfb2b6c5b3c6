-- Counts a beat if the position belongs to this owner. It needs a few bytes at most, so it also
-- runs while the server is out of memory.
--
-- KEYS: position. ARGV: owner.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then
  local beats = tonumber(redis.call('HGET', KEYS[1], 'beats')) or 0
  -- Lua counts exactly up to 2^53.
  redis.call('HSET', KEYS[1], 'beats', string.format('%.0f', (beats + 1) % 2^53))
end
return 1
