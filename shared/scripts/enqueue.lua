#!lua
-- Puts a request on its queue, or refuses it.
-- Keys: rts:r:<rid> rts:q:<queue> rts:lane:<queue>:<caller> rts:turn:<queue> rts:count:<queue>
--       rts:open:<mv> rts:due rts:wake:<mv> rts:l:<rid> rts:charge:<attempt>
-- ARGV: 1 rid, 2 mv, 3 class, 4 caller, 5 digest of the body, 6 body, 7 deadline (ms from now),
--       8 grace (ms unheard before it is cancelled), 9 keep (ms the log lives after the end),
--       10 prompt tokens, 11 attempt: what limit charged, if anything, is the request's from now on,
--       12 most waiting, 13 most waiting bytes, 14 messages.View, readable as long as the hash is;
--       15 of a request that was accepted and that Redis has lost: number of the last token its reader has,
--       16 when it was accepted (t0), 17.. these tokens, in pairs: number of the last one, messages.Tokens
-- What was accepted is queued again whatever the limits are, and whether the version is closed; not where
-- another run of it is there, unless that one failed before: Redis has gone back to that time then.
-- Beyond the limits a caller with nothing waiting here still gets in, up to twice as many: one caller alone
-- locks nobody out.
-- Returns {0, t0} accepted, also when this attempt had been before; {1, messages.View, run} the same request is
--   there already; {2, 0} the id is taken by another; {3, 0} the version takes no requests; {4, waiting} full.
local rid, mv, cls, caller = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = 'rts:r:' .. rid
local last = ARGV[15]
local earlier = redis.call('HMGET', key, 'run', 'ep', 'st', 'reason', 't0')
if earlier[1] == ARGV[11] then
  return {0, tonumber(earlier[5])}
end
if not last then
  local there = present(rid, caller, ARGV[5], ARGV[8])
  if there then
    return there
  end
elseif earlier[3] and (not runs_anew(rid, earlier[3], earlier[4]) or tonumber(earlier[5]) >= tonumber(ARGV[16])) then
  return {2, 0}
end
if not last and redis.call('EXISTS', 'rts:open:' .. mv) == 0 then
  return {3, 0}
end
local queue = mv .. ':' .. cls
local count = 'rts:count:' .. queue
local size = #ARGV[6]
local c = redis.call('HMGET', count, 'waiting', 'bytes')
local waiting, bytes = tonumber(c[1] or 0), tonumber(c[2] or 0)
local times = redis.call('HEXISTS', 'rts:turn:' .. queue, caller) == 1 and 1 or 2
if not last and (waiting >= times * tonumber(ARGV[12]) or bytes + size > times * tonumber(ARGV[13])) then
  return {4, waiting}
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
local charge = redis.call('GETDEL', 'rts:charge:' .. ARGV[11]) or 0
-- An earlier run of this id leaves nothing but its epoch: who owned it then must not own this one.
redis.call('DEL', key, 'rts:l:' .. rid)
redis.call('HSET', key, 'st', 'w', 'mv', mv, 'cls', cls, 'eid', eid, 'caller', caller, 'dig', ARGV[5],
  'body', ARGV[6], 'size', size, 'own', '0:', 'ep', earlier[2] or 0, 'seq', last or 0, 'pr', 0, 'hw', 0, 'mark', 0,
  'deaths', 0, 'dl', int(deadline), 'grace', ARGV[8], 'keep', ARGV[9], 't0', int(now), 'pt', ARGV[10],
  'charge', charge, 'att', ARGV[11], 'run', ARGV[11], 'tk', ticket, 'view', ARGV[14])
-- Long enough for whoever ends it at its deadline, and for a reader who comes late.
redis.call('PEXPIREAT', key, int(deadline + 300000))
if #ARGV > 16 then
  local log = 'rts:l:' .. rid
  for i = 17, #ARGV, 2 do
    redis.call('XADD', log, ARGV[i] .. '-0', 'd', ARGV[i + 1])
  end
  redis.call('PEXPIREAT', log, int(deadline + 300000))
end
redis.call('ZADD', 'rts:due', int(deadline), rid)
local wake = 'rts:wake:' .. mv
redis.call('LPUSH', wake, '1')
-- A token is a hint, workers also look once a second: a few more than there are workers are enough.
redis.call('LTRIM', wake, 0, 255)
return {0, now}
