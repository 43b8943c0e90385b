-- The window that replicas share: one call of one replica, which reports what became of its requests and asks for turns.
-- The rules are those of quota.py, on Redis's clock; share.py makes the calls and reads the answers.
--
-- A slot that comes back unsent goes at once to who is first in line, or to another if there are more such than wait.
--
-- What lies in Redis: `state` (the window's name and clock), `seen` (replica -> last call), `flight` (slot -> when it was last
-- said to be in flight), `back` (slot -> when it comes back), `line` (replica -> when its turn is due). Times are Redis's.
--
-- Who would wait for longer than it may is told to come back, not all at one time. While some had to go that used less than
-- their part of the limit, those that used more may stand in the first half of the line only.

local BURIED = 10 -- seconds: a slot in flight of which nobody spoke for so long counts as answered now
local FORGOTTEN = 60 -- a replica that said nothing for so long is gone; before that it may live on its share, which is left alone
local GATHERING = 4 -- so long a new window waits for the replicas that its first one knew; an old one that nobody used is new
local GRACE = 0.5 -- who comes so late has lost its place in the line
local AGAIN = 0.5 -- while somebody is silent, those that wait ask again after so long at least
local CELLS = 128 -- more slots than this are looked at in so many groups
local HOUR = 3610 -- no window is longer, nor closed for longer, margins included
local DAY = 100000 -- so far ahead a turn may be due: METQUAY_MAX_WAIT has no bound, but nobody waits for more than a day

local state, seen, flight, back, line = unpack(KEYS)
local call = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local me = call.replica

local function refuse(generation)
  return cjson.encode({done = false, generation = generation, now = string.format('%.6f', now)})
end

local known = redis.call('HMGET', state, 'generation', 'latest', 'born', 'expected', 'last', 'closed', 'turned', 'starved', 'spare')
local untrue = false
for at, most in ipairs({now + GRACE, now + GRACE, 10000, now + GRACE, now + HOUR, 1e15, now + GRACE, 1e15}) do
  local value = tonumber(known[at + 1] or 0)
  untrue = untrue or not (value and value >= 0 and value <= most) -- nan is neither
  known[at + 1] = value
end
if call.before ~= cjson.null and now > call.before then
  return refuse(call.generation)
end
if untrue then -- the clock was set back, or it was not this script that wrote: nothing in here is true any more
  redis.call('DEL', unpack(KEYS))
  known = {nil, 0, 0, 0, 0, 0, 0, 0, 0}
end
local generation, latest, born, expected, last, closed, turned, starved, spare = unpack(known, 1, 9)
if not generation or now > latest + GATHERING then
  generation, born, expected = call.fresh, now, 0
end
now = math.max(now, latest)
expected = math.max(expected, call.replicas)
redis.call('HSET', state, 'generation', generation, 'latest', now, 'born', born, 'expected', expected)
if call.generation ~= generation then
  return refuse(generation)
end

-- What it reports.
for _, slot in ipairs(call.returned) do
  spare = spare + redis.call('ZREM', flight, me .. ':' .. slot)
end
for _, over in ipairs(call.answered) do
  redis.call('ZREM', flight, me .. ':' .. over[1])
  redis.call('ZADD', back, now - over[2] + call.hold, me .. ':' .. over[1])
end
for _, slot in ipairs(call.in_flight) do
  redis.call('ZREM', back, me .. ':' .. slot)
  redis.call('ZADD', flight, now, me .. ':' .. slot)
end

-- What can't be true: this script writes no later times. Such a slot counts as taken from now on, whoever wrote it.
for key, most in pairs({[flight] = now, [back] = now + call.hold}) do
  for _, slot in ipairs(redis.call('ZRANGEBYSCORE', key, most + GRACE, '+inf')) do
    redis.call('ZADD', key, most, slot)
  end
end
redis.call('ZREMRANGEBYSCORE', seen, now + GRACE, '+inf')
redis.call('ZREMRANGEBYSCORE', line, now + DAY, '+inf')

-- What time has done.
for _, slot in ipairs(redis.call('ZRANGEBYSCORE', flight, '-inf', now - BURIED)) do
  redis.call('ZREM', flight, slot)
  redis.call('ZADD', back, now + call.hold, slot)
end
redis.call('ZREMRANGEBYSCORE', back, '-inf', now)
redis.call('ZREMRANGEBYSCORE', seen, '-inf', now - FORGOTTEN)
redis.call('ZREMRANGEBYSCORE', line, '-inf', now - GRACE)
if call.leaving then
  redis.call('ZREM', seen, me)
else
  redis.call('ZADD', seen, now, me)
end

local replicas = math.max(redis.call('ZCARD', seen), 1)
if now < born + GATHERING then
  replicas = math.max(replicas, expected)
end
local silent = replicas - redis.call('ZCOUNT', seen, now - call.silent, '+inf')
local limit = call.limit - math.ceil(silent * call.limit / replicas)
local burst = math.max(1, math.floor(limit * call.burst))
local in_flight, coming = redis.call('ZCARD', flight), redis.call('ZCARD', back)

local listed
local function comes_back(rank)
  if coming > CELLS then
    return tonumber(redis.call('ZRANGE', back, rank, rank, 'WITHSCORES')[2])
  end
  listed = listed or redis.call('ZRANGE', back, 0, -1, 'WITHSCORES')
  return tonumber(listed[2 * rank + 2])
end

for _, seconds in ipairs(call.closing) do
  if seconds < 0 then
    seconds = coming > 0 and comes_back(0) - now or call.hold
  end
  closed = math.max(closed, now + seconds)
end

-- When the first, second, ... `count`-th of those that wait are due, at `base` or later: the path of quota.py.
local function turns(count, base, limit)
  local due, number, points, earliest = {}, limit - in_flight - coming, {}, math.max(base, closed)
  local free = number
  local step = math.max(1, math.ceil(coming / CELLS))
  for rank = 0, coming - 1, step do
    local group = math.min(step, coming - rank)
    local at = comes_back(rank + group - 1)
    points[#points + 1] = {number + 1, at}
    if free < 1 and number < 1 then
      earliest = math.max(earliest, at)
    end
    number = number + group
  end
  if in_flight > 0 then
    local at = math.max(last + call.latency, now) + call.hold
    points[#points + 1] = {number + 1, at}
    if free < 1 and number < 1 then
      earliest = math.max(earliest, at)
    end
  end
  local steady, at, done = (call.hold + call.latency) / limit, last, 0
  while done < count do
    local pace, till = steady, math.huge
    for _, point in ipairs(points) do
      if point[1] > done and point[2] - at > pace * (point[1] - done) then
        pace, till = (point[2] - at) / (point[1] - done), point[1]
      end
    end
    while done < till and done < count do
      local straight = at + pace
      at, done = math.max(straight, earliest), done + 1
      due[done] = at
      if straight < at then
        break
      end
    end
  end
  return due
end

-- What it asks for.
local mine = tonumber(redis.call('ZSCORE', line, me) or nil)
redis.call('ZREM', line, me)
local base = mine and math.max(math.min(mine, now), now - call.catch_up) or now
local ahead = mine and redis.call('ZCOUNT', line, '-inf', '(' .. string.format('%.17g', mine)) or redis.call('ZCARD', line)
local granted, wanted = 0, #call.slots
while granted < wanted and ahead < math.max(spare, 1) do
  local release = now
  if mine or redis.call('ZCARD', line) > 0 or in_flight + coming >= burst or closed > now then
    if spare > 0 and in_flight + coming < limit and closed <= now then
      spare = spare - 1
    else
      release = ahead == 0 and limit > 0 and turns(1, base, limit)[1] or math.huge
    end
    if release > now then
      break
    end
    base = release
  end
  last = mine and release or now
  in_flight = in_flight + 1
  redis.call('ZADD', flight, now, me .. ':' .. call.slots[granted + 1])
  granted = granted + 1
  ahead = redis.call('ZCARD', line) -- the next of this replica stands behind all that wait
end

local waits = redis.call('ZCARD', line)
local answer = {done = true, generation = generation, replicas = replicas, used = in_flight + coming, granted = granted, in_line = false, due = 0, round = 0}
if granted < wanted then
  local place, again = ahead + 1, silent > 0 and AGAIN or 0
  local greedy = call.own * replicas > call.limit
  local patience = greedy and now < starved + call.patience and call.patience / 2 or call.patience
  local due = turns(waits + 2, now, call.limit)
  answer.in_line = due[place] <= now + patience
  if answer.in_line then
    redis.call('ZADD', line, math.max(due[place], now + again), me)
  else
    turned = turned + 1
    place = waits + 1 + turned % math.min(replicas, call.limit)
    due = turns(math.max(place, waits + 2), now, call.limit)
    due[place] = math.max(due[place], now + call.patience + 0.001)
    starved = greedy and starved or now
  end
  answer.round = math.max(0, due[waits + 2] - due[1])
  answer.due = math.max(again, due[place] - now)
end
if redis.call('ZCARD', line) == 0 then
  spare = 0
end
redis.call('HSET', state, 'last', last, 'closed', closed, 'turned', turned, 'starved', starved, 'spare', spare)

if call.beat then
  local used = in_flight + coming
  answer.returns, answer.each = {}, math.max(1, math.ceil(used / replicas / CELLS))
  for rank = replicas * answer.each, used + replicas * answer.each - 1, replicas * answer.each do
    rank = math.min(rank, used) - 1
    answer.returns[#answer.returns + 1] = rank < coming and comes_back(rank) - now or call.hold
  end
  for _, key in ipairs(KEYS) do
    redis.call('EXPIRE', key, math.ceil(call.hold) + FORGOTTEN)
  end
end
if answer.returns and #answer.returns == 0 then
  answer.returns = nil -- as JSON, an empty table is no list
end
answer.closed = math.max(0, closed - now)
answer.now = string.format('%.6f', now)
return cjson.encode(answer)
