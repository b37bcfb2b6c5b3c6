-- The incarnation of a stream, which is the name of our consumer group without its prefix; false if
-- the stream has none.
local function incarnation(stream)
  for _, group in ipairs(redis.pcall('XINFO', 'GROUPS', stream)) do
    local found = string.match(group[2], '^essentially%-once:(.+)')
    if found then return found end
  end
  return false
end
