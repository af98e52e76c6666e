#!lua
-- Removes what is left of an engine that sends no heartbeat. What it still owns stays, to be taken over; only then
-- its consumers go. Its version stays open, and live: after an outage nobody has been heard, and all come back.
-- Keys: rts:engines:<mv> rts:cards:<mv> rts:q:<queue>
-- ARGV: 1 mv, 2 engine, 3 ttl (ms)
-- Returns 1 when nothing of it is left, 0 while it owns requests, or if it has been heard after all.
local mv, engine = ARGV[1], ARGV[2]
local heard = redis.call('ZSCORE', 'rts:engines:' .. mv, engine)
if heard and tonumber(heard) >= now_ms() - tonumber(ARGV[3]) then
  return 0
end
redis.call('ZREM', 'rts:engines:' .. mv, engine)
redis.call('HDEL', 'rts:cards:' .. mv, engine)
return forget_consumers(mv, engine) and 1 or 0
