-- Commits one transaction of a consumer. Redis never rolls back, so all checks come before the
-- first write.
--
-- KEYS: position, windows, state, each key that a native command names, the keys of letters if the
--   commit changes any, and for each outbox its stream and the hash with its numbers.
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

-- Each outbox: its stream, the hash with its numbers, the producer that it gets if it is new, the
-- number of records, and the number of arguments that they take. Each record: the number of its
-- fields and values, the place of its producer among them, and these.
local outboxes = {}
at = sends_first
while at <= sends_last do
  local outbox = {stream = ARGV[at], hash = ARGV[at + 1], producer = ARGV[at + 2], number = 0, is_new = true}
  outbox.first, outbox.last = at + 5, at + 4 + tonumber(ARGV[at + 4])
  local stream, hash = outbox.stream, outbox.hash
  if not redis.acl_check_cmd('XINFO', 'STREAM', stream) or not redis.acl_check_cmd('XADD', stream, '*', 'a', 'b') then
    return {'refused', stream, 'NOPERM the user may not run XADD or XINFO STREAM'}
  end
  if not redis.acl_check_cmd('HMGET', hash, 'a') or not redis.acl_check_cmd('HSET', hash, 'a', 'b') then
    return {'refused', hash, 'NOPERM the user may not run HMGET or HSET'}
  end
  local info = call('XINFO', 'STREAM', stream)
  if info.err and not info.err:find('no such key', 1, true) then
    return {'refused', stream, info.err}
  end
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' and info[i + 1]:find('^18446744073709551615%-') then
      return {'refused', stream, 'ERR the stream has no more ids; rename it'}
    end
  end
  local kept = call('HMGET', hash, 'producer', 'next')
  if kept.err then
    return {'refused', hash, kept.err}
  end
  local producer, number = kept[1], kept[2]
  if producer or number then
    -- Lua counts exactly with 15 digits.
    if not producer or #producer > 200 or not producer:find('^%w[%w._:/@+=-]*$')
      or not number or #number > 15 or not number:find('^%d+$') then
      return {'outbox', hash}
    end
    outbox.producer, outbox.number, outbox.is_new = producer, tonumber(number), false
  end
  outbox.stop = string.format('%.0f', outbox.number + tonumber(ARGV[at + 3]))
  outboxes[#outboxes + 1] = outbox
  at = outbox.last + 1
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

-- Behind the native commands, which may fail, and in front of writes that cannot fail.
for i = 1, #outboxes do
  local outbox = outboxes[i]
  local stream, hash, producer, number = outbox.stream, outbox.hash, outbox.producer, outbox.number
  local reply
  if outbox.is_new then
    reply = call('HSET', hash, 'producer', producer, 'next', outbox.stop)
  else
    reply = call('HSET', hash, 'next', outbox.stop)
  end
  if type(reply) == 'table' then
    return failed('HSET', hash, reply.err)
  end
  done = done + 1
  at = outbox.first
  while at <= outbox.last do
    local first = at + 2
    local place, last = first + tonumber(ARGV[at + 1]), at + 1 + tonumber(ARGV[at])
    ARGV[place], ARGV[place + 2] = producer, string.format('%.0f', number)
    reply = call('XADD', stream, '*', unpack(ARGV, first, last))
    if type(reply) == 'table' then
      return failed('XADD', stream, reply.err)
    end
    done = done + 1
    number = number + 1
    at = last + 1
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
