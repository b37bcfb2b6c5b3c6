-- KEYS: position. ARGV: owner. Gives the position up if it is the owner's. It frees memory, so also
-- where memory is full.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('HSET', KEYS[1], 'owner', '') end
return 1
