-- The record of one POST with an Idempotency-Key, as idempotency.py writes it: a line of JSON, then the answer's body.
--
-- It returns what was done, seconds, and a record: `claim` returns that which is there, unless it is now the caller's; `keep` and `free` touch only what is still the
-- caller's claim, or is not there. The claim of a replica that died stays: nobody knows whether its request was executed.
-- A new window (see quota.lua) may have lost records, so that claims wait until all replicas had time to tell of theirs.

local record, index, state = unpack(KEYS)
local what, owner, generation, value, lifetime, most, name = unpack(ARGV)
local GATHERING = 4 -- seconds, as in quota.lua
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

if what == 'claim' then
  local known = redis.call('HMGET', state, 'generation', 'born', 'expected')
  if known[1] ~= generation then
    return {'wait', '0.1', ''}
  elseif tonumber(known[3]) > 1 and now < tonumber(known[2]) + GATHERING then
    return {'wait', tostring(known[2] + GATHERING - now), ''}
  end
end

local old = redis.call('GET', record)
local read, open = pcall(cjson.decode, old and old:match('^[^\n]*') or '')
if old and not (read and type(open) == 'table' and open.running == owner) then
  local age = (lifetime - redis.call('PTTL', record)) / 1000
  return {'known', tostring(math.max(0, math.min(age, lifetime / 1000))), old}
end
if what == 'free' then
  redis.call('DEL', record)
  redis.call('ZREM', index, name)
  return {'done', '0', ''}
end
redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
if not old and redis.call('ZCARD', index) >= tonumber(most) then
  return {'full', tostring(math.max(0, redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')[2] - now)), ''}
end
redis.call('SET', record, value, 'PX', lifetime)
redis.call('ZADD', index, now + lifetime / 1000, name)
redis.call('PEXPIRE', index, lifetime)
return {'done', '0', ''}
