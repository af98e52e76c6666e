-- Puts a request on its queue, or refuses it.
-- Keys: rts:r:<rid> rts:q:<queue> rts:lane:<queue>:<caller> rts:turn:<queue> rts:count:<queue>
--       rts:open:<mv> rts:due rts:wake:<mv> rts:l:<rid>
-- ARGV: 1 rid, 2 mv, 3 class, 4 caller, 5 digest of the body, 6 body, 7 deadline (ms from now),
--       8 grace (ms unheard before it is cancelled), 9 keep (ms the log lives after the end),
--       10 prompt tokens, 11 tokens charged, 12 most waiting, 13 most waiting bytes,
--       14 messages.View, readable as long as the hash is
-- Returns {code, a, b}: {0, ticket, position} accepted; {1, seq, 0} the same request is there already;
--   {2, 0, 0} the id is taken by another; {3, 0, 0} the version takes no requests; {4, waiting, bytes} full.
local rid, mv, cls, caller = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = 'rts:r:' .. rid
local v = redis.call('HMGET', key, 'caller', 'dig', 'seq')
if v[1] then
  if v[1] == caller and v[2] == ARGV[5] then
    return {1, tonumber(v[3]), 0}
  end
  return {2, 0, 0}
end
if redis.call('EXISTS', 'rts:open:' .. mv) == 0 then
  return {3, 0, 0}
end
local queue = mv .. ':' .. cls
local count = 'rts:count:' .. queue
local size = #ARGV[6]
local c = redis.call('HMGET', count, 'waiting', 'bytes')
local waiting, bytes = tonumber(c[1] or 0), tonumber(c[2] or 0)
if waiting >= tonumber(ARGV[12]) or bytes + size > tonumber(ARGV[13]) then
  return {4, waiting, bytes}
end

local now = now_ms()
local deadline = now + tonumber(ARGV[7])
local eid = ''
if redis.call('HSETNX', 'rts:turn:' .. queue, caller, rid) == 1 then
  eid = redis.call('XADD', 'rts:q:' .. queue, '*', 'rid', rid, 'caller', caller, 't', int(now))
else
  redis.call('RPUSH', 'rts:lane:' .. queue .. ':' .. caller, rid)
end
redis.call('HINCRBY', count, 'waiting', 1)
redis.call('HINCRBY', count, 'bytes', size)
local ticket = redis.call('HINCRBY', count, 'ticket', 1)
redis.call('HSET', key, 'st', 'w', 'mv', mv, 'cls', cls, 'eid', eid, 'caller', caller, 'dig', ARGV[5],
  'body', ARGV[6], 'size', size, 'own', '0:', 'ep', 0, 'seq', 0, 'pr', 0, 'mark', 0, 'deaths', 0,
  'dl', int(deadline), 'grace', ARGV[8], 'keep', ARGV[9], 't0', int(now), 'pt', ARGV[10],
  'charge', ARGV[11], 'tk', ticket, 'view', ARGV[14])
-- A log that somehow outlived an earlier request of this id would refuse every new token.
redis.call('DEL', 'rts:l:' .. rid)
-- Long enough for whoever ends it at its deadline, and for a reader who comes late.
redis.call('PEXPIREAT', key, int(deadline + 300000))
redis.call('ZADD', 'rts:due', int(deadline), rid)
local wake = 'rts:wake:' .. mv
redis.call('LPUSH', wake, '1')
-- A token is a hint, workers also look once a second: a few more than there are workers are enough.
redis.call('LTRIM', wake, 0, 255)
return {0, ticket, waiting + 1}
