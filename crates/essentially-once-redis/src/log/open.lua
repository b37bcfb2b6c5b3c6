-- Gives a stream an incarnation if it has none, and returns its incarnation.
--
-- KEYS: stream.
-- ARGV: a new incarnation, 1 if the stream may be created.
local found = incarnation(KEYS[1])
if found then return found end
-- The greatest id, so that monitoring shows no lag.
local last = '18446744073709551615-18446744073709551615'
local group = 'essentially-once:' .. ARGV[1]
if ARGV[2] == '1' then
  redis.call('XGROUP', 'CREATE', KEYS[1], group, last, 'MKSTREAM')
elseif redis.call('XINFO', 'STREAM', KEYS[1]) then
  redis.call('XGROUP', 'CREATE', KEYS[1], group, last)
end
return ARGV[1]
