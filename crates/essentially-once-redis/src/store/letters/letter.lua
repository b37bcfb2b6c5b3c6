-- Returns the letter at an offset: its value, and its place in the index by offset.
--
-- KEYS: letters, letters by offset.
-- ARGV: the letter's field, the first and the last place in the index.
local place = redis.call('ZRANGE', KEYS[2], ARGV[2], ARGV[3], 'BYLEX', 'LIMIT', 0, 1)[1]
return {redis.call('HGET', KEYS[1], ARGV[1]), place or false}
