#!lua
-- Forgets an engine that is gone. What it still owns stays, to be taken over; only then its consumers go.
-- Keys: rts:engines:<mv> rts:cards:<mv> rts:q:<queue>
-- ARGV: 1 mv, 2 engine
-- Returns 1 when nothing of it is left, 0 while it owns requests.
local mv, engine = ARGV[1], ARGV[2]
redis.call('ZREM', 'rts:engines:' .. mv, engine)
redis.call('HDEL', 'rts:cards:' .. mv, engine)
return forget_consumers(mv, engine) and 1 or 0
