-- Removes the entries that retention no longer keeps, or those before an id.
--
-- KEYS: stream, hash of its retention.
-- ARGV: incarnation, records to keep or '', milliseconds to keep or '', the first id to keep or ''.
-- Returns the number of entries removed, and 1 if there are more; nil if the stream was deleted or
-- created again.
local stream = KEYS[1]
if incarnation(stream) ~= ARGV[1] then return false end
local limit = 100000
local removed, more, mark = 0, 0, false

-- Removes the entries up to the threshold and one more. That entry is removed last and alone, so
-- that its id is known.
local function cut(strategy, threshold)
  local cheap = redis.call('XTRIM', stream, strategy, '~', threshold, 'LIMIT', limit)
  removed = removed + cheap
  if cheap > 0.9 * limit then
    more = 1
  else
    removed = removed + redis.call('XTRIM', stream, strategy, threshold)
  end
  mark = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1][1]
  removed = removed + redis.call('XTRIM', stream, 'MAXLEN', redis.call('XLEN', stream) - 1)
end

local records = tonumber(ARGV[2])
if records and redis.call('XLEN', stream) > records then cut('MAXLEN', records + 1) end

local function cut_before(id)
  local last = redis.call('XREVRANGE', stream, '(' .. id, '-', 'COUNT', 1)[1]
  if last then cut('MINID', last[1]) end
end

local age = tonumber(ARGV[3])
if age then
  local time = redis.call('TIME')
  local first_kept = time[1] * 1000 + math.floor(time[2] / 1000) - age
  if first_kept > 0 then cut_before(string.format('%.0f-0', first_kept)) end
end

if ARGV[4] ~= '' then cut_before(ARGV[4]) end

if mark then
  local info = redis.call('XINFO', 'STREAM', stream)
  local field = {}
  for i = 1, #info, 2 do field[info[i]] = info[i + 1] end
  -- The server refuses this when it is out of memory. Readers then do not know what our retention
  -- removed, and report a truncation rather than miss one.
  redis.pcall('HSET', KEYS[2], 'incarnation', ARGV[1], 'mark', mark, 'gone', field['entries-added'] - field['length'])
end
return { removed, more }
