-- The records of POSTs with an Idempotency-Key, as idempotency.py writes and bounds them: the digest of a body (32 bytes), then `R` and who executes it, or the
-- answer's text, or nothing. A name begins with that of its client key.
--
-- It returns what was done, seconds, and a record: `claim` returns that which is there, unless it is now the caller's; `keep` and `free` touch only what is still the
-- caller's claim, or is not there. The claim of a replica that died stays: nobody knows whether its request was executed.
-- A new window (see quota.lua) may have lost records, so that claims wait until all replicas had time to tell of theirs.
-- A call that was held up on its way is not carried out, or a claim might come after the word that frees it.
--
-- What lies in Redis: `records` (name -> record; `held` -> bytes of answers; `of` and a client key -> how many it has), `ends` (name -> when it is forgotten), and
-- `answers`, the same for those whose answers are kept.

local records, ends, answers, state = unpack(KEYS)
local what, owner, generation, before, value, lifetime, most, greed, room, name = unpack(ARGV)
local GATHERING = 4 -- seconds, as in quota.lua
local DAY = 24 * 3600
local CUT = 44 -- bytes: digest and status
local AT_ONCE = 100 -- so many are forgotten in a call, or all replicas would wait for one
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

if now > tonumber(before) then
  return {'wait', '0.1', ''}
end
if what == 'claim' then
  local known = redis.call('HMGET', state, 'generation', 'born', 'expected')
  if known[1] ~= generation then
    return {'wait', '0.1', ''}
  elseif tonumber(known[3]) > 1 and now < tonumber(known[2]) + GATHERING then
    return {'wait', tostring(known[2] + GATHERING - now), ''}
  end
end

local function held(record)
  return record:sub(33, 33) == 'H' and #record > CUT and #record or 0
end

local function count(whose, number, bytes)
  redis.call('HINCRBY', records, 'of' .. whose:sub(1, 8), number)
  return redis.call('HINCRBY', records, 'held', bytes)
end

local function forget(whose)
  count(whose, -1, 0 - held(redis.call('HGET', records, whose) or ''))
  redis.call('HDEL', records, whose)
  redis.call('ZREM', ends, whose)
  redis.call('ZREM', answers, whose)
end

for _, whose in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now, 'LIMIT', 0, AT_ONCE)) do
  forget(whose)
end
local till = tonumber(redis.call('ZSCORE', ends, name) or nil)
if till and till <= now then
  forget(name)
  till = nil
end

local old = till and redis.call('HGET', records, name)
if old and old:sub(33) ~= 'R' .. owner then
  return {'known', tostring(math.max(0, math.min(lifetime - (till - now), lifetime))), old}
elseif old then
  forget(name)
elseif what ~= 'free' then
  local free = most - redis.call('ZCARD', ends)
  if tonumber(redis.call('HGET', records, 'of' .. name:sub(1, 8)) or 0) >= greed * free then
    local first = redis.call('ZRANGE', ends, 0, 0, 'WITHSCORES')[2]
    return {'full', tostring(math.max(0, first - now)), ''}
  end
end
if what == 'free' then
  return {'done', '0', ''}
end

till = now + lifetime
redis.call('HSET', records, name, value)
redis.call('ZADD', ends, till, name)
if held(value) > 0 then
  redis.call('ZADD', answers, till, name)
end
local all = count(name, 1, held(value))
while all > tonumber(room) do
  local oldest = redis.call('ZRANGE', answers, 0, 0)[1]
  local record = redis.call('HGET', records, oldest)
  redis.call('HSET', records, oldest, record:sub(1, CUT))
  redis.call('ZREM', answers, oldest)
  all = redis.call('HINCRBY', records, 'held', -#record)
end
for _, key in ipairs({records, ends, answers}) do
  redis.call('EXPIRE', key, DAY)
end
return {'done', '0', ''}
