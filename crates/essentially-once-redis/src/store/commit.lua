-- Commits one transaction of a consumer. Redis never rolls back, so all checks come before the
-- first write.
--
-- KEYS: position, windows, state, each key that a native command names, and the keys of letters if
--   the commit changes any.
-- ARGV: `layout.rs` writes it, and generates the code above, which names its fields and
--   the bounds of its lists. A missing log incarnation, owner or note is ''. So is a journal that
--   the commit does not change; any other follows a byte. The `partial_revision` is that of a
--   position whose commit was partially applied.

local call, type, unpack, tonumber = redis.pcall, type, unpack, tonumber
local POSITION, WINDOWS, STATE = KEYS[1], KEYS[2], KEYS[3]

-- Checks

local position = call('HMGET', POSITION, 'partial', 'revision', 'log', 'incarnation')
if position.err then
  return {'position', position.err}
end
local revision, log, incarnation = position[2], position[3], position[4]
if position[1] then
  return {'partial', position[1]}
end
if (revision or '0') ~= expected then
  return {'fenced'}
end
if log and (log ~= log_name or (incarnation and log_incarnation ~= '' and incarnation ~= log_incarnation)) then
  return {'log', log, incarnation or ''}
end

local function wrong_type(reply)
  return type(reply) == 'table' and reply.err and reply.err:find('^WRONGTYPE')
end

for i = types_first, types_last, 2 do
  local reply = call(ARGV[i], ARGV[i + 1])
  if wrong_type(reply) then
    return {'refused', ARGV[i + 1], reply.err}
  end
end

local at = numbers_first
while at <= numbers_last do
  local last = at + tonumber(ARGV[at])
  local values = call(unpack(ARGV, at + 1, last))
  if wrong_type(values) then
    return {'refused', ARGV[at + 2], values.err}
  end
  for i = 1, #values do
    local value = values[i]
    if value and value ~= '0' and (#value > 20 or not value:find('^-?[1-9]%d*$')) then
      return {'number', ARGV[last - #values + i], ARGV[at + 2]}
    end
  end
  at = last + 1
end

-- A missing permission would otherwise fail the commit halfway.
for i = permissions_first, permissions_last, 2 do
  local first = tonumber(ARGV[i])
  if not redis.acl_check_cmd(unpack(ARGV, first, tonumber(ARGV[i + 1]))) then
    return {'refused', ARGV[first], 'NOPERM the user may not run this command'}
  end
end
if not redis.acl_check_cmd('HSET', POSITION, 'a', 'b') then
  return {'refused', POSITION, 'NOPERM the user may not run HSET'}
end
if (deletes_first <= deletes_last or forgotten_first <= forgotten_last) and not redis.acl_check_cmd('HDEL', STATE, 'a') then
  return {'refused', STATE, 'NOPERM the user may not run HDEL'}
end

-- Writes

local done = 0

-- If the first write fails, nothing was written. If a later one fails, the consumer is blocked and
-- other instances are fenced.
local function failed(command, key, why)
  local what = command .. ' ' .. key:sub(1, 300)
  if done == 0 then
    return {'refused', what, why}
  end
  local text = done .. ' commands were applied, then ' .. what .. ' failed (' .. why:sub(1, 300) .. ')'
  call('HSET', POSITION, 'partial', text)
  -- If a first commit fails, the position holds this flag alone, and resolving it deletes the
  -- position.
  if revision then
    call('HSET', POSITION, 'revision', partial_revision)
  end
  return {'partial', text}
end

at = commands_first
while at <= commands_last do
  local length, first = tonumber(ARGV[at]), at + 2
  at = first + length * tonumber(ARGV[at + 1])
  for i = first, at - 1, length do
    local reply
    -- These lengths are common, and `unpack` is slow.
    if length == 4 then
      reply = call(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
    elseif length == 3 then
      reply = call(ARGV[i], ARGV[i + 1], ARGV[i + 2])
    else
      reply = call(unpack(ARGV, i, i + length - 1))
    end
    if type(reply) == 'table' and reply.err then
      return failed(ARGV[i], ARGV[i + 1], reply.err)
    end
    done = done + 1
  end
end

-- In pieces, since Lua passes at most 8,000 arguments.
local function write(command, key, first, last)
  for from = first, last, 6000 do
    local reply = call(command, key, unpack(ARGV, from, math.min(from + 5999, last)))
    if type(reply) == 'table' then
      return failed(command, key, reply.err)
    end
    done = done + 1
  end
end

local failure = write('HSET', STATE, puts_first, puts_last)
  or write('HDEL', STATE, deletes_first, deletes_last)
  or write('HSET', WINDOWS, windows_first, windows_last)
  or write('HDEL', WINDOWS, forgotten_first, forgotten_last)
if failure then
  return failure
end

local reply
if journal ~= '' then
  -- Few commits have a journal. Its log, if it is known, is written as it is.
  local fields = {'next', offset, 'revision', next_revision, 'owner', owner, 'passed', note,
    'journal', journal:sub(2), 'log', log_name}
  if log_incarnation ~= '' then
    fields[#fields + 1] = 'incarnation'
    fields[#fields + 1] = log_incarnation
  end
  reply = call('HSET', POSITION, unpack(fields))
elseif log and (incarnation or log_incarnation == '') then
  reply = call('HSET', POSITION, 'next', offset, 'revision', next_revision, 'owner', owner, 'passed', note)
elseif log_incarnation == '' then
  reply = call('HSET', POSITION, 'next', offset, 'revision', next_revision, 'owner', owner, 'passed', note,
    'log', log_name)
else
  reply = call('HSET', POSITION, 'next', offset, 'revision', next_revision, 'owner', owner, 'passed', note,
    'log', log_name, 'incarnation', log_incarnation)
end
if type(reply) == 'table' then
  return failed('HSET', POSITION, reply.err)
end
return 1
