#!lua
-- Appends one step's tokens of all sequences of an engine to their logs and publishes them.
-- Keys: rts:r:<rid> rts:l:<rid> rts:leases:<mv> rts:count:<queue>, and those of finish()
-- ARGV: 1 mv, 2 engine, then 8 for each sequence: rid, epoch, first seq, last seq (first - 1: no tokens),
--       messages.Tokens, progress (rows computed), end reason or '', messages.End or ''
-- Sent every step, even with nothing to say: it renews the lease.
-- Returns {number waiting for this version, code, detail, code, detail, ...}, one pair a sequence:
--   0 done; 1 duplicate (seen before); 2 fenced (another engine owns it); 3 gap (detail: last seq in the log);
--   4 ended (detail: the reason); 5 lost (no such request here).
local mv, engine = ARGV[1], ARGV[2]
local now = now_ms()
local waiting = 0
for class = 1, 3 do
  waiting = waiting + tonumber(redis.call('HGET', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'waiting') or 0)
end
-- XX: an engine that was declared dead does not come back to life by talking.
redis.call('ZADD', 'rts:leases:' .. mv, 'XX', int(now), engine)

local out = {waiting}
local function answer(code, detail)
  out[#out + 1] = code
  out[#out + 1] = detail
end

for i = 3, #ARGV, 8 do
  local rid, first, last = ARGV[i], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local key = 'rts:r:' .. rid
  local v = redis.call('HMGET', key, 'st', 'own', 'seq', 'dl', 'unheard', 'grace', 'pr', 'hw')
  local seq = tonumber(v[3])
  if not v[1] then
    answer(5, 0)
  elseif v[1] == 'e' then
    local same = redis.call('HGET', key, 'own') == ARGV[i + 1] .. ':' .. engine
    if same and ARGV[i + 6] ~= '' and last <= seq and redis.call('HGET', key, 'reason') == ARGV[i + 6] then
      answer(1, 0)
    else
      answer(4, redis.call('HGET', key, 'reason'))
    end
  elseif v[2] ~= ARGV[i + 1] .. ':' .. engine then
    answer(2, 0)
  elseif last > seq and first ~= seq + 1 then
    answer(3, seq)
  else
    local ended, fresh = nil, last >= first and last > seq
    -- A token that nobody had is a row that nobody had, also where an engine cannot count its rows.
    local most = math.max(tonumber(v[8]) + (fresh and 1 or 0), tonumber(ARGV[i + 5]))
    if fresh then
      local log = 'rts:l:' .. rid
      redis.call('XADD', log, last .. '-0', 'd', ARGV[i + 4])
      if seq == 0 then
        redis.call('HSET', key, 'seq', last, 'pr', ARGV[i + 5], 'hw', most, 't2', int(now))
        redis.call('PEXPIREAT', log, int(tonumber(v[4]) + 300000))
      else
        redis.call('HSET', key, 'seq', last, 'pr', ARGV[i + 5], 'hw', most)
      end
      local heard = redis.call('PUBLISH', log, last .. '-0 ' .. ARGV[i + 4])
      if heard > 0 then
        if v[5] then
          redis.call('HDEL', key, 'unheard')
        end
      elseif not v[5] then
        redis.call('HSET', key, 'unheard', int(now))
      elseif now - tonumber(v[5]) > tonumber(v[6]) then
        ended = 'abandoned'
      end
    elseif v[7] ~= ARGV[i + 5] then
      redis.call('HSET', key, 'pr', ARGV[i + 5], 'hw', most)
    end
    if ARGV[i + 6] ~= '' then
      finish(rid, ARGV[i + 6], ARGV[i + 7], now)
      answer(0, 0)
    elseif tonumber(v[4]) <= now then
      finish(rid, 'timeout', end_blob('timeout'), now)
      answer(4, 'timeout')
    elseif ended then
      finish(rid, ended, end_blob(ended), now)
      answer(4, ended)
    elseif fresh or last < first then
      answer(0, 0)
    else
      answer(1, 0)
    end
  end
end
return out
