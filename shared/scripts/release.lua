#!lua
-- A draining engine hands requests back, to be taken at once by another one. No death is counted.
-- Keys: rts:r:<rid> rts:q:<queue> rts:owns:<mv> rts:leases:<mv> rts:wake:<mv>
-- ARGV: 1 mv, 2 engine, then pairs: rid, epoch
-- Returns how many were handed back.
local mv, engine, n = ARGV[1], ARGV[2], 0
for i = 3, #ARGV, 2 do
  local key = 'rts:r:' .. ARGV[i]
  local v = redis.call('HMGET', key, 'st', 'own', 'cls', 'eid')
  if v[1] == 'r' and v[2] == ARGV[i + 1] .. ':' .. engine then
    redis.call('XCLAIM', 'rts:q:' .. mv .. ':' .. v[3], GROUP, NOBODY, 0, v[4], 'JUSTID')
    redis.call('HSET', key, 'own', redis.call('HINCRBY', key, 'ep', 1) .. ':' .. NOBODY)
    disown(mv, engine)
    redis.call('HINCRBY', 'rts:owns:' .. mv, NOBODY, 1)
    redis.call('ZADD', 'rts:leases:' .. mv, 0, NOBODY)
    redis.call('LPUSH', 'rts:wake:' .. mv, '1')
    n = n + 1
  end
end
redis.call('LTRIM', 'rts:wake:' .. mv, 0, 255)
return n
