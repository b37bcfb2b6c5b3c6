-- Finds the last entries before an id.
--
-- ARGV: the highest id, the most entries.
-- Returns the extent, the id of the first of them, or false if there is none, and their number.
local before, wanted = ARGV[1], tonumber(ARGV[2])
local first, found = false, 0

-- Few entries at once, since all their fields are in memory together.
local STEP = 16

local answer = extent()
if answer.err then return answer end

while found < wanted do
  local entries = redis.pcall('XREVRANGE', KEYS[1], before, '-', 'COUNT', math.min(STEP, wanted - found))
  if entries.err then return entries end
  if #entries == 0 then break end
  found = found + #entries
  first = entries[#entries][1]
  before = '(' .. first
end
return { answer, first, found }
