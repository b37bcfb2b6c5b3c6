-- Commits one transaction of a consumer. Redis never rolls back, so all checks come before the
-- first write.
--
-- KEYS  position, windows, state, and each key that a native command names
-- ARGV  1 expected revision  2 next revision  3 log  4 incarnation or ''  5 offset
--       6 owner or ''  7 passed record or ''  8 the revision after a commit that was applied in part
--       9..15 the last index of each list; the lists follow from 16 on:
--         puts (key, value)  deletes (key)  windows (producer, window)  forgotten (producer)
--         types (command that works on this type only, key)
--         numbers (length, command that reads them, its arguments)
--         permissions (first and last index of a native command)
--       then the native commands in runs of equal length: length, how many, the commands

local call, type, unpack, tonumber = redis.pcall, type, unpack, tonumber
local ARGV, POSITION, WINDOWS, STATE = ARGV, KEYS[1], KEYS[2], KEYS[3]
local puts, deletes, windows, forgotten = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local types, numbers, permissions = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])

-- Checks -------------------------------------------------------------------------------------------------------------

local position = call('HMGET', POSITION, 'partial', 'revision', 'log', 'incarnation')
if position.err then
  return {'position', position.err}
end
local revision, log, incarnation = position[2], position[3], position[4]
if position[1] then
  return {'partial', position[1]}
end
if (revision or '0') ~= ARGV[1] then
  return {'fenced'}
end
if log and (log ~= ARGV[3] or (incarnation and ARGV[4] ~= '' and incarnation ~= ARGV[4])) then
  return {'log', log, incarnation or ''}
end

local function wrong_type(reply)
  return type(reply) == 'table' and reply.err and reply.err:find('^WRONGTYPE')
end

for i = forgotten + 1, types, 2 do
  local reply = call(ARGV[i], ARGV[i + 1])
  if wrong_type(reply) then
    return {'refused', ARGV[i + 1], reply.err}
  end
end

local at = types + 1
while at <= numbers do
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
for i = numbers + 1, permissions, 2 do
  local first = tonumber(ARGV[i])
  if not redis.acl_check_cmd(unpack(ARGV, first, tonumber(ARGV[i + 1]))) then
    return {'refused', ARGV[first], 'NOPERM the user may not run this command'}
  end
end
if not redis.acl_check_cmd('HSET', POSITION, 'a', 'b') then
  return {'refused', POSITION, 'NOPERM the user may not run HSET'}
end
if (puts < deletes or windows < forgotten) and not redis.acl_check_cmd('HDEL', STATE, 'a') then
  return {'refused', STATE, 'NOPERM the user may not run HDEL'}
end

-- Writes -------------------------------------------------------------------------------------------------------------

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
    call('HSET', POSITION, 'revision', ARGV[8])
  end
  return {'partial', text}
end

at = permissions + 1
while at <= #ARGV do
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

if forgotten > 15 then
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

  local failure = write('HSET', STATE, 16, puts)
    or write('HDEL', STATE, puts + 1, deletes)
    or write('HSET', WINDOWS, deletes + 1, windows)
    or write('HDEL', WINDOWS, windows + 1, forgotten)
  if failure then
    return failure
  end
end

local reply
if log and (incarnation or ARGV[4] == '') then
  reply = call('HSET', POSITION, 'next', ARGV[5], 'revision', ARGV[2], 'owner', ARGV[6], 'passed', ARGV[7])
elseif ARGV[4] == '' then
  reply = call('HSET', POSITION, 'next', ARGV[5], 'revision', ARGV[2], 'owner', ARGV[6], 'passed', ARGV[7],
    'log', ARGV[3])
else
  reply = call('HSET', POSITION, 'next', ARGV[5], 'revision', ARGV[2], 'owner', ARGV[6], 'passed', ARGV[7],
    'log', ARGV[3], 'incarnation', ARGV[4])
end
if type(reply) == 'table' then
  return failed('HSET', POSITION, reply.err)
end
return 1
