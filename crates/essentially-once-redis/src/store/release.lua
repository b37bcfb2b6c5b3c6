-- Gives up the position if it belongs to this owner. It frees memory, so it also runs while the
-- server is out of memory.
--
-- KEYS: position. ARGV: owner.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('HSET', KEYS[1], 'owner', '') end
return 1
