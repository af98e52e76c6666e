#!lua
-- Announces a live engine, once a second, and makes its version the live one where there is no other.
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
redis.call('HSET', 'rts:m:' .. model, 'v:' .. version, int(now))
redis.call('SET', 'rts:open:' .. mv, '1')
local live = redis.call('HGET', 'rts:m:' .. model, 'live')
if live ~= version then
  local others = live and redis.call('ZCOUNT', 'rts:engines:' .. model .. '@' .. live, int(now - ttl), '+inf') or 0
  if others == 0 then
    redis.call('HSET', 'rts:m:' .. model, 'live', version)
    live = version
  end
end
return live
