-- Reads entries, at least one of them however large it is.
--
-- ARGV: the first id, the most entries, the most bytes.
-- Returns the extent, the packed entries, and 1 if more follow.
local found, count, more = {}, 0, 0
local from, limit, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

-- Fetch few entries at once, since those that do not fit are fetched in vain.
local STEP = 16
local step, largest = 1, 1

local answer = extent()
if answer.err then return answer end

while from and count < limit and room > 0 do
  step = math.min(step, limit - count)
  -- One more entry than needed shows whether more follow.
  local entries = redis.pcall('XRANGE', KEYS[1], from, '+', 'COUNT', step + 1)
  if entries.err then return entries end
  from = entries[step + 1] and entries[step + 1][1]
  for i = 1, math.min(#entries, step) do
    local fields, bytes = entries[i][2], 0
    for j = 1, #fields do bytes = bytes + #fields[j] end
    if count > 0 and bytes > room then return { answer, cmsgpack.pack(found), 1 } end
    room = room - bytes
    count = count + 1
    found[count] = entries[i]
    if bytes > largest then largest = bytes end
  end
  step = math.max(1, math.min(STEP, math.floor(room / largest)))
end
if from then more = 1 end
return { answer, cmsgpack.pack(found), more }
