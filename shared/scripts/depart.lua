#!lua
-- Signs off an engine that leaves. What it still owns stays, to be taken over; only then its consumers go.
-- Where no engine of its version is left and another version of the model has one, the version is closed and
-- the other one is live: nothing is queued for nobody while somebody could run it.
-- Keys: rts:engines:<mv> rts:cards:<mv> rts:open:<mv> rts:m:<model> rts:q:<queue>
-- ARGV: 1 mv, 2 engine, 3 ttl (ms)
-- Returns {1 when nothing of the engine is left, 0 while it owns requests; 1 when its version is closed, else 0}.
local mv, engine = ARGV[1], ARGV[2]
local since = now_ms() - tonumber(ARGV[3])
redis.call('ZREM', 'rts:engines:' .. mv, engine)
redis.call('HDEL', 'rts:cards:' .. mv, engine)

local function is_served(other)
  return redis.call('ZCOUNT', 'rts:engines:' .. other, int(since), '+inf') > 0
end

-- The other version whose heartbeat was heard last, if any engine of it is left.
local function successor(model, version)
  local found, latest = nil, since
  local fields = redis.call('HGETALL', 'rts:m:' .. model)
  for i = 1, #fields, 2 do
    local other = string.match(fields[i], '^v:(.*)$')
    if other and other ~= version and tonumber(fields[i + 1]) >= latest and is_served(model .. '@' .. other) then
      found, latest = other, tonumber(fields[i + 1])
    end
  end
  return found
end

local closed = 0
if not is_served(mv) then
  local model, version = string.match(mv, '^(.*)@(.*)$')
  local other = successor(model, version)
  if other then
    redis.call('DEL', 'rts:open:' .. mv)
    if redis.call('HGET', 'rts:m:' .. model, 'live') == version then
      redis.call('HSET', 'rts:m:' .. model, 'live', other)
    end
    closed = 1
  end
end
return {forget_consumers(mv, engine) and 1 or 0, closed}
