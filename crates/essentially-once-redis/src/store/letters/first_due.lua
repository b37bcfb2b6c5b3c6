-- Returns the letter that is due first: its field and its value.
--
-- KEYS: letters, letters due.
-- ARGV: fields to leave out.
local left_out = {}
for i = 1, #ARGV do
  left_out[ARGV[i]] = true
end
local from = 0
while true do
  local fields = redis.call('ZRANGE', KEYS[2], from, from + 99)
  if #fields == 0 then
    return {}
  end
  for i = 1, #fields do
    if not left_out[fields[i]] then
      return {fields[i], redis.call('HGET', KEYS[1], fields[i])}
    end
  end
  from = from + 100
end
