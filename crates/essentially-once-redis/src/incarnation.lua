-- Which creation of the stream this is: the name of our consumer group, without its prefix; false where there is none.
local function incarnation(stream)
  for _, group in ipairs(redis.pcall('XINFO', 'GROUPS', stream)) do
    local found = string.match(group[2], '^essentially%-once:(.+)')
    if found then return found end
  end
  return false
end
