-- KEYS: stream. ARGV: a new incarnation. Returns the stream's own, or the new one, given to a stream that has none.
local found = incarnation(KEYS[1])
if found then return found end
-- Behind every entry and without a count of what was read, so that monitoring finds no lag.
local last = '18446744073709551615-18446744073709551615'
redis.call('XGROUP', 'CREATE', KEYS[1], 'essentially-once:' .. ARGV[1], last, 'MKSTREAM')
return ARGV[1]
