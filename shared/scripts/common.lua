-- Stands in every script below its first line, by which a server that is full, read-only or cannot write to
-- its disk refuses the script as a whole. A full one would else let take hand over requests and refuse their
-- tokens. Helpers that touch keys:
--   rts:r:<rid> rts:l:<rid> rts:q:<queue> rts:lane:<queue>:<caller> rts:turn:<queue> rts:count:<queue>
--   rts:due rts:owns:<mv> rts:leases:<mv> rts:ended rts:b:<caller> rts:server
-- <mv> is model@version, <queue> is <mv>:<class>. All times are milliseconds of Redis' own clock.

local CLASSES = {'high', 'normal', 'low'}
local GROUP = 'workers'
-- The consumer that holds what a draining engine handed back: it is always dead.
local NOBODY = '-'
-- ~ keeps the trim cheap; control reads far behind this many facts only if it was away for long.
local ENDED_CAP = 100000

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Lua prints large numbers with %.14g, which is not an integer any more.
local function int(x)
  return string.format('%.0f', x)
end

-- When this server started, or took the place of another. A promoted replica has been up for long, so a
-- server is known by its run.
local function server_since(now)
  local info = redis.call('INFO', 'server')
  local run = string.match(info, 'run_id:(%w+)')
  local known = redis.call('HMGET', 'rts:server', 'run', 'since')
  local since = tonumber(known[2])
  -- A time to come is one before the server's clock was set back.
  if known[1] ~= run or since > now then
    -- Where no server was noted the data are new, and nobody was connected to another one.
    since = known[1] and now or now - tonumber(string.match(info, 'uptime_in_seconds:(%d+)')) * 1000
    redis.call('HSET', 'rts:server', 'run', run, 'since', int(since))
  end
  return since
end

-- Whether a silence that began at `unheard` has outlasted the grace time. Nobody can have listened to a server
-- that was not there: one that came since begins it anew.
local function outlasts(key, unheard, grace, now)
  if now - unheard <= grace then
    return false
  end
  if server_since(now) > unheard then
    redis.call('HSET', key, 'unheard', int(now))
    return false
  end
  return true
end

local function is_heard(rid)
  return redis.call('PUBSUB', 'NUMSUB', 'rts:l:' .. rid)[2] > 0
end

-- msgpack of messages.End(reason), as [version, reason, code, message, timings]. reason < 32 bytes.
local function end_blob(reason)
  return '\149\1' .. string.char(160 + #reason) .. reason .. '\160\160\128'
end

-- Books a request out of the waiting ones of its queue. Size 0 is one whose hash expired: its bytes
-- stay counted until the queue is empty.
local function leave_waiting(queue, size)
  local count = 'rts:count:' .. queue
  local waiting = redis.call('HINCRBY', count, 'waiting', -1)
  redis.call('HINCRBY', count, 'head', 1)
  if waiting <= 0 then
    redis.call('HSET', count, 'bytes', 0)
  elseif size > 0 then
    -- Lua would send -0 as an argument that is no integer.
    redis.call('HINCRBY', count, 'bytes', -size)
  end
end

-- Gives the caller's place in the queue to its next waiting request, at the tail: round-robin.
local function promote(queue, caller)
  local lane = 'rts:lane:' .. queue .. ':' .. caller
  while true do
    local rid = redis.call('LPOP', lane)
    if not rid then
      redis.call('HDEL', 'rts:turn:' .. queue, caller)
      return
    end
    local v = redis.call('HMGET', 'rts:r:' .. rid, 'st', 't0', 'eid')
    if v[1] == 'w' and v[3] == '' then
      local eid = redis.call('XADD', 'rts:q:' .. queue, '*', 'rid', rid, 'caller', caller, 't', v[2])
      redis.call('HSET', 'rts:r:' .. rid, 'eid', eid)
      redis.call('HSET', 'rts:turn:' .. queue, caller, rid)
      return
    end
    -- Its hash expired (and may have come again): nobody was left to end it at its deadline.
    leave_waiting(queue, 0)
  end
end

-- One request fewer for an engine; a lease exists only while the engine owns something.
local function disown(mv, engine)
  if redis.call('HINCRBY', 'rts:owns:' .. mv, engine, -1) <= 0 then
    redis.call('HDEL', 'rts:owns:' .. mv, engine)
    redis.call('ZREM', 'rts:leases:' .. mv, engine)
  end
end

-- Removes a gone engine's consumers, but none with pending entries: DELCONSUMER would lose those.
-- Returns whether nothing of it is left.
local function forget_consumers(mv, engine)
  local gone = true
  for class = 1, 3 do
    local q = 'rts:q:' .. mv .. ':' .. CLASSES[class]
    local pending = redis.pcall('XPENDING', q, GROUP, '-', '+', 1, engine)
    if not pending.err then
      if #pending == 0 then
        redis.call('XGROUP', 'DELCONSUMER', q, GROUP, engine)
      else
        gone = false
      end
    end
  end
  return gone
end

local function engine_of(owner)
  return string.sub(owner, string.find(owner, ':', 1, true) + 1)
end

-- Whether a request that is there may run anew: it failed, or its tokens are gone.
local function runs_anew(rid, st, reason)
  return st == 'e' and ((reason ~= 'stop' and reason ~= 'length') or redis.call('EXISTS', 'rts:l:' .. rid) == 0)
end

-- What a repeated Idempotency-Key finds under its id: nil nothing, so that it may run; or the reply of
-- enqueue and attach. Whoever attaches makes it its own: the attempt that queued it may have been given up, and be
-- taken back late. Whoever asks for the longest grace time gets it.
local function present(rid, caller, digest, grace)
  local key = 'rts:r:' .. rid
  local v = redis.call('HMGET', key, 'caller', 'dig', 'st', 'reason', 'view', 'grace', 'run')
  if not v[1] then
    return nil
  end
  if v[1] ~= caller or v[2] ~= digest then
    return {2, 0}
  end
  if runs_anew(rid, v[3], v[4]) then
    return nil
  end
  redis.call('HSET', key, 'att', '', 'grace', int(math.max(tonumber(v[6]), tonumber(grace))))
  return {1, v[5], v[7] or ''}
end

-- Takes a charge, or a part of it, out of a caller's buckets. Returns 0 if they are full anyway.
local function give_back(caller, requests, tokens)
  local key = 'rts:b:' .. caller
  local v = redis.call('HMGET', key, 'r', 't', 'rs', 'ts')
  if not v[1] then
    return 0
  end
  redis.call('HSET', key, 'r', string.format('%.3f', tonumber(v[1]) - requests * tonumber(v[3])),
    't', string.format('%.3f', tonumber(v[2]) - tokens * tonumber(v[4])))
  return 1
end

-- Ends a request, exactly once: the end entry in its log, the live message, the counters, the
-- caller's next request, the fact for control. Returns false when it had ended or does not exist.
local function finish(rid, reason, blob, now)
  local key = 'rts:r:' .. rid
  local v = redis.call('HMGET', key, 'st', 'mv', 'cls', 'eid', 'caller', 'seq', 'own', 'size', 'keep',
    't0', 't1', 't2', 'pt', 'charge')
  local st = v[1]
  if not st or st == 'e' then
    return false
  end
  local mv, caller, seq, keep = v[2], v[5], v[6], tonumber(v[9])
  local queue = mv .. ':' .. v[3]
  local log = 'rts:l:' .. rid
  local id = seq .. '-1'
  redis.call('XADD', log, id, 'd', blob)
  redis.call('PEXPIRE', log, keep)
  redis.call('HSET', key, 'st', 'e', 'reason', reason, 't3', int(now))
  -- The body is not needed any more; the state stays readable a little longer than the log.
  redis.call('HDEL', key, 'body', 'eid')
  redis.call('PEXPIRE', key, keep + 5000)
  redis.call('ZREM', 'rts:due', rid)
  if v[4] ~= '' then
    redis.call('XACK', 'rts:q:' .. queue, GROUP, v[4])
    redis.call('XDEL', 'rts:q:' .. queue, v[4])
  end
  if st == 'w' then
    leave_waiting(queue, tonumber(v[8]))
    if v[4] ~= '' then
      promote(queue, caller)
    else
      redis.call('LREM', 'rts:lane:' .. queue .. ':' .. caller, -1, rid)
    end
  else
    redis.call('HINCRBY', 'rts:count:' .. queue, 'running', -1)
    disown(mv, engine_of(v[7]))
  end
  redis.call('XADD', 'rts:ended', 'MAXLEN', '~', ENDED_CAP, '*', 'rid', rid, 'caller', caller, 'mv', mv,
    'cls', v[3], 'reason', reason, 'prompt', v[13], 'tokens', seq, 'charge', v[14],
    't0', v[10], 't1', v[11] or '', 't2', v[12] or '', 't3', int(now))
  redis.call('PUBLISH', log, id .. ' ' .. blob)
  return true
end
