-- KEYS: stream, hash of its retention. Returns what is needed to tell whether an id can be read; {} without a stream.
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then
  return string.find(info.err, 'no such key', 1, true) and {} or info
end
local field = {}
for i = 1, #info, 2 do field[info[i]] = info[i + 1] end
local found = incarnation(KEYS[1])
local retention = redis.call('HMGET', KEYS[2], 'incarnation', 'mark', 'gone')
local ours = found and retention[1] == found
return {
  found,
  field['entries-added'],
  field['length'],
  field['recorded-first-entry-id'],
  field['last-generated-id'],
  ours and retention[2],
  ours and tonumber(retention[3])
}
