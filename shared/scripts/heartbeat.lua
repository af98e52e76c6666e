#!lua
-- Announces a live engine, once a second, and makes its version the live one where that has no engine: then the
-- other one is closed, until an engine of it is heard again.
-- Keys: rts:engines:<mv> rts:cards:<mv> rts:open:<mv> rts:m:<model> rts:models
--       rts:q:<queue> (consumers of engines that are gone)
-- ARGV: 1 model, 2 version, 3 engine, 4 card (messages.EngineCard), 5 ttl (ms)
-- Returns the live version of the model.
local model, version = ARGV[1], ARGV[2]
local mv = model .. '@' .. version
local now, ttl = now_ms(), tonumber(ARGV[5])
local engines, cards = 'rts:engines:' .. mv, 'rts:cards:' .. mv
redis.call('ZADD', engines, int(now), ARGV[3])
redis.call('HSET', cards, ARGV[3], ARGV[4])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', engines, '-inf', '(' .. int(now - ttl), 'LIMIT', 0, 16)) do
  redis.call('ZREM', engines, gone)
  redis.call('HDEL', cards, gone)
  forget_consumers(mv, gone)
end
redis.call('SADD', 'rts:models', model)
local before = redis.call('HGET', 'rts:m:' .. model, 'v:' .. version)
redis.call('HSET', 'rts:m:' .. model, 'v:' .. version, int(now))
redis.call('SET', 'rts:open:' .. mv, '1')
local live = redis.call('HGET', 'rts:m:' .. model, 'live')
if not live then
  live = version
  redis.call('HSET', 'rts:m:' .. model, 'live', live)
elseif live ~= version and before and tonumber(before) >= now - ttl then
  -- Just after an outage nobody has been heard: who waited for its own second heartbeat has given others time.
  if redis.call('ZCOUNT', 'rts:engines:' .. model .. '@' .. live, int(now - ttl), '+inf') == 0 then
    redis.call('DEL', 'rts:open:' .. model .. '@' .. live)
    live = version
    redis.call('HSET', 'rts:m:' .. model, 'live', live)
  end
end
return live
