-- ARGV: the id to begin at, most entries, most bytes; at least one entry is returned, however large
-- it is. Returns the state, the entries packed, and 1 if the stream has more.
local found, count, more = {}, 0, 0
local from, limit, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

-- Entries that turn out not to fit were fetched for nothing, so few are fetched at once.
local STEP = 16
local step, largest = 1, 1

local answer = state()
if answer.err then return answer end

while from and count < limit and room > 0 do
  step = math.min(step, limit - count)
  -- One more than is wanted tells whether there are more.
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
