#!lua
-- Appends one step's tokens of all sequences of an engine to their logs and publishes them.
-- Keys: rts:r:<rid> rts:l:<rid> rts:leases:<mv> rts:owns:<mv> rts:count:<queue> rts:due rts:server, and those of finish()
-- ARGV: 1 mv, 2 engine, 3 a MessagePack array of 8 strings for each sequence: rid, epoch, seq before its first token,
--       seq of its last (the same: no tokens), messages.Tokens, progress (rows computed), end reason or '',
--       messages.End or ''. One argument, because each costs server and engine more than all that is in it.
-- Sent every step, even with nothing to say: it renews the lease.
-- Returns {number waiting for this version or handed back, index, code, detail, index, code, detail, ...}: a triple for each
--   sequence, counted from 0, of which there is more to say than that it is done:
--   1 duplicate (seen before); 2 fenced (another engine owns it); 3 gap (detail: last seq in the log);
--   4 ended (detail: the reason); 5 lost (no such request here).
local mv, engine = ARGV[1], ARGV[2]
local step = cmsgpack.unpack(ARGV[3])
local now = now_ms()
local waiting = tonumber(redis.call('HGET', 'rts:owns:' .. mv, NOBODY) or 0)
for class = 1, 3 do
  waiting = waiting + tonumber(redis.call('HGET', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'waiting') or 0)
end
-- XX: an engine that was declared dead does not come back to life by talking.
redis.call('ZADD', 'rts:leases:' .. mv, 'XX', int(now), engine)

-- Whether any request's deadline has passed, of whatever engine: else none of these needs to be asked for its own.
local late = redis.call('ZRANGEBYSCORE', 'rts:due', '-inf', int(now), 'LIMIT', 0, 1)[1] ~= nil
local out = {waiting}
local at = -1
local function answer(code, detail)
  out[#out + 1] = at
  out[#out + 1] = code
  out[#out + 1] = detail
end

-- Nobody has listened for longer than the grace time. It counts from `unheard` on, but only while no token was
-- heard: `quiet` is the last that was not, and the time begins anew where that is not the one before this.
local function is_abandoned(key, before, last)
  local u = redis.call('HMGET', key, 'unheard', 'quiet', 'grace')
  if not u[1] or u[2] ~= before then
    redis.call('HSET', key, 'unheard', int(now), 'quiet', last)
    return false
  end
  redis.call('HSET', key, 'quiet', last)
  return outlasts(key, tonumber(u[1]), tonumber(u[3]), now)
end

-- Per token this runs once: numbers that only have to be equal stay strings, a token costs one field, and what
-- is seldom needed is asked for where it is.
for i = 1, #step, 8 do
  at = at + 1
  local rid, before, last = step[i], step[i + 2], step[i + 3]
  local key = 'rts:r:' .. rid
  local v = redis.call('HMGET', key, 'own', 'seq', 'st')
  local own, seq, st = v[1], v[2], v[3]
  if not st then
    answer(5, 0)
  elseif st == 'e' then
    local same, why = own == step[i + 1] .. ':' .. engine, redis.call('HGET', key, 'reason')
    if same and step[i + 6] == why and tonumber(last) <= tonumber(seq) then
      answer(1, 0)
    else
      answer(4, why)
    end
  elseif own ~= step[i + 1] .. ':' .. engine then
    answer(2, 0)
  elseif before ~= seq and tonumber(last) > tonumber(seq) then
    answer(3, tonumber(seq))
  else
    local ended, fresh = nil, before == seq and last ~= before
    if fresh then
      local log, id = 'rts:l:' .. rid, last .. '-0'
      redis.call('XADD', log, id, 'd', step[i + 4])
      if seq == '0' then
        redis.call('HSET', key, 'seq', last, 'pr', step[i + 5], 'hw', redis.call('HGET', key, 'pt'), 't2', int(now))
        redis.call('PEXPIREAT', log, int(redis.call('HGET', key, 'dl') + 300000))
      else
        redis.call('HSET', key, 'seq', last)
      end
      if redis.call('PUBLISH', log, id .. ' ' .. step[i + 4]) == 0 and is_abandoned(key, before, last) then
        ended = 'abandoned'
      end
    else
      -- Rows of the prompt that nobody had computed are progress; tokens that are known already are not.
      local p = redis.call('HMGET', key, 'pr', 'hw', 'pt')
      if p[1] ~= step[i + 5] then
        local rows = math.min(tonumber(step[i + 5]), tonumber(p[3]))
        redis.call('HSET', key, 'pr', step[i + 5], 'hw', int(math.max(rows, tonumber(p[2] or 0))))
      end
    end
    if step[i + 6] ~= '' then
      finish(rid, step[i + 6], step[i + 7], now)
    elseif late and tonumber(redis.call('HGET', key, 'dl')) <= now then
      finish(rid, 'timeout', end_blob('timeout'), now)
      answer(4, 'timeout')
    elseif ended then
      finish(rid, ended, end_blob(ended), now)
      answer(4, ended)
    elseif not fresh and last ~= before then
      answer(1, 0)
    end
  end
end
return out
