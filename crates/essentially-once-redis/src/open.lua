-- KEYS: stream. ARGV: a new incarnation, 1 if the stream may be created. Returns the stream's own,
-- or the new one, given to a stream that has none; nil if there is no stream and none may be
-- created.
local found = incarnation(KEYS[1])
if found then return found end
-- Behind every entry and without a count of what was read, so that monitoring finds no lag.
local last = '18446744073709551615-18446744073709551615'
local group = 'essentially-once:' .. ARGV[1]
if ARGV[2] == '1' then
  redis.call('XGROUP', 'CREATE', KEYS[1], group, last, 'MKSTREAM')
elseif redis.call('XINFO', 'STREAM', KEYS[1]) then
  redis.call('XGROUP', 'CREATE', KEYS[1], group, last)
end
return ARGV[1]
