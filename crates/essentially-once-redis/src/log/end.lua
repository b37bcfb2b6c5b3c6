-- Returns the extent, and the id of the last entry, or false if the stream is empty.
local answer = extent()
if answer.err then return answer end
local entry = redis.pcall('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if entry.err then return entry end
return { answer, entry[1] and entry[1][1] or false }
