-- Returns the data that decides whether an id can be read; {} if the stream does not exist.
--
-- KEYS: stream, hash of its retention, and the hash that earlier versions used, if it had another
--   name.
local function extent()
  local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
  if info.err then
    return string.find(info.err, 'no such key', 1, true) and {} or info
  end
  local field = {}
  for i = 1, #info, 2 do field[info[i]] = info[i + 1] end
  local found = incarnation(KEYS[1])
  local mark, gone = false, false
  for i = 2, #KEYS do
    local retention = redis.call('HMGET', KEYS[i], 'incarnation', 'mark', 'gone')
    local this = found and retention[1] == found and tonumber(retention[3])
    -- Instances of an earlier version may still trim. The number of removed entries only grows, so
    -- the larger one is newer.
    if this and (not gone or this > gone) then
      mark, gone = retention[2], this
    end
  end
  return {
    found,
    field['entries-added'],
    field['length'],
    field['recorded-first-entry-id'],
    field['last-generated-id'],
    mark,
    gone
  }
end
