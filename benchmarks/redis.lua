-- As much of Redis as quota.lua needs, for an interpreter that Python drives: hashes, and sorted sets.
-- `clock()` returns TIME's two numbers.

local keys = {}

local function set(key)
  keys[key] = keys[key] or {score = {}, order = {}}
  return keys[key]
end

-- Where (score, name) stands or would stand.
local function place(order, score, name)
  local low, high = 1, #order + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    local entry = order[middle]
    if entry[1] < score or entry[1] == score and entry[2] < name then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

-- The first and the last place of the scores from `least` to `most`; of these only `most` may be exclusive.
local function range(order, least, most)
  local open = tostring(most):match('^%((.*)')
  local score = tonumber(open or most) or math.huge
  return place(order, tonumber(least) or -math.huge, ''), place(order, score, open and '' or '\255') - 1
end

local function remove(key, first, last)
  local here = set(key)
  local size, number = #here.order, last - first + 1
  for at = first, last do
    here.score[here.order[at][2]] = nil
  end
  for at = first, number > 0 and size or 0 do
    here.order[at] = here.order[at + number]
  end
  return math.max(number, 0)
end

local commands = {
  TIME = function() return {clock()} end,
  EXPIRE = function() end,
  DEL = function(...) for _, key in ipairs({...}) do keys[key] = nil end end,
  HSET = function(key, ...)
    keys[key] = keys[key] or {}
    for at = 1, select('#', ...), 2 do
      local field, value = select(at, ...)
      keys[key][field] = value
    end
  end,
  HMGET = function(key, ...)
    local found = {}
    for at, field in ipairs({...}) do
      found[at] = keys[key] and keys[key][field] or false
    end
    return found
  end,
  ZCARD = function(key) return #set(key).order end,
  ZSCORE = function(key, name) return set(key).score[name] or false end,
  ZREM = function(key, name)
    local score = set(key).score[name]
    local at = score and place(set(key).order, score, name)
    return at and remove(key, at, at) or 0
  end,
  ZCOUNT = function(key, least, most)
    local first, last = range(set(key).order, least, most)
    return last - first + 1
  end,
  ZRANGE = function(key, first, last)
    local order, found = set(key).order, {}
    for at = first + 1, last < 0 and #order or math.min(last + 1, #order) do
      found[#found + 1], found[#found + 2] = order[at][2], order[at][1]
    end
    return found
  end,
  ZRANGEBYSCORE = function(key, least, most)
    local order, found = set(key).order, {}
    local first, last = range(order, least, most)
    for at = first, last do
      found[#found + 1] = order[at][2]
    end
    return found
  end,
  ZREMRANGEBYSCORE = function(key, least, most) return remove(key, range(set(key).order, least, most)) end,
}

function commands.ZADD(key, score, name)
  commands.ZREM(key, name)
  set(key).score[name] = score
  table.insert(set(key).order, place(set(key).order, score, name), {score, name})
end

redis = {call = function(command, ...) return commands[command](...) end}
