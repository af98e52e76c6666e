#!lua
-- Hands waiting and orphaned requests to an engine that has room.
-- Keys: rts:q:<queue> rts:r:<rid> rts:lane:* rts:turn:* rts:count:<queue> rts:engines:<mv> rts:leases:<mv>
--       rts:owns:<mv> rts:w:<engine> (channel, only counted) rts:dead rts:server, and those of finish()
-- ARGV: 1 mv, 2 engine, 3 room, 4 lease (ms), 5 aging (ms), 6 most bytes of bodies, 7 engine ttl (ms),
--       8 most deaths without progress, 9 ms without a heartbeat after which the control channel is asked,
--       10 calm: 1 if every sequence of the engine has made progress there, else 0,
--       11 number of ids known to the engine or -1, 12.. these ids
-- With ARGV[11] >= 0 it also returns what the engine owns but does not know (a reply was lost).
-- Order: class, in a class orphans first, then age. Each aging period counts a request one class higher,
--   orphans too, or a busy queue of a better class would keep a broken stream waiting until its deadline.
-- A suspect is a request with a death after which nobody made progress. It is taken by a calm engine only and
--   as the only one of a call, so that its next death is held against nobody else. Until then it holds up what
--   has yet to begin, but not what was under way.
-- What waited unheard for longer than its grace is not taken but ends.
-- Returns {requests, number still waiting, number of other engines (and -) that own some}; a request is
--   {rid, epoch, body, seq, class (0-2), ms waited, deaths, most rows computed by any owner}.
local mv, engine, room = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease, aging, max_bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local max_deaths, doubt, calm = tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10] == '1'
local now = now_ms()
local out, out_bytes, mine = {}, 0, 0
-- One call ends at most so many requests past their deadlines beside those it takes; the rest is the next
-- call's. After a long outage the whole queue may be late.
local SPARE_TURNS = 256
-- Suspects that must wait shall not hide the streams behind them.
local SPARE_ORPHANS = 32
-- Most silent engines that one call looks at, the stalest.
local STALE = 16
local leases, owns = 'rts:leases:' .. mv, 'rts:owns:' .. mv

local function stream(class)
  return 'rts:q:' .. mv .. ':' .. CLASSES[class]
end

local function level_of(class, t)
  return math.max(1, class - math.floor((now - t) / aging))
end

-- Makes the engine the owner. The epoch grows with every owner, so that an older one is fenced.
local function own(rid, v, class)
  local key = 'rts:r:' .. rid
  local epoch = redis.call('HINCRBY', key, 'ep', 1)
  redis.call('HSET', key, 'own', epoch .. ':' .. engine, 'st', 'r', 't1', v.t1 or int(now), 'hw', v.hw,
    'mark', v.done)
  redis.call('HINCRBY', owns, engine, 1)
  mine = mine + 1
  out[#out + 1] = {rid, epoch, v.body, tonumber(v.seq), class - 1, math.max(0, now - v.t0), v.deaths, v.hw}
  out_bytes = out_bytes + #v.body
  -- A suspect stays alone.
  room = v.deaths > 0 and 0 or room - 1
end

local function read(rid)
  local f = redis.call('HMGET', 'rts:r:' .. rid, 'st', 'body', 'seq', 't0', 'dl', 'pr', 'mark', 'deaths',
    'own', 'size', 'caller', 'eid', 't1', 'unheard', 'grace', 'hw', 'pt')
  if not f[1] then
    return nil
  end
  -- An owner of release 0.1 kept pr alone.
  local hw = math.max(tonumber(f[16] or 0), math.min(tonumber(f[6]), tonumber(f[17])))
  return {st = f[1], body = f[2], seq = f[3], t0 = tonumber(f[4]), dl = tonumber(f[5]), hw = hw,
    -- All that was ever done: rows of the prompt, and tokens.
    done = hw + tonumber(f[3]), mark = tonumber(f[7]), deaths = tonumber(f[8]),
    owner = f[9], size = tonumber(f[10]), caller = f[11], eid = f[12], t1 = f[13], unheard = tonumber(f[14]),
    grace = tonumber(f[15])}
end

-- An owned entry whose request's hash expired, or came again and is somewhere else by now.
local function drop(class, id, owner)
  redis.call('XACK', stream(class), GROUP, id)
  redis.call('XDEL', stream(class), id)
  redis.call('HINCRBY', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'running', -1)
  disown(mv, owner)
end

-- 1. What the engine owns and does not know. No death is counted: nobody died.
if tonumber(ARGV[11]) >= 0 then
  local known = {}
  for i = 12, #ARGV do
    known[ARGV[i]] = true
  end
  for class = 1, 3 do
    local pending = redis.pcall('XPENDING', stream(class), GROUP, '-', '+', 256, engine)
    if not pending.err then
      for _, p in ipairs(pending) do
        local entry = redis.call('XRANGE', stream(class), p[1], p[1])[1]
        local rid = entry and entry[2][2]
        if not rid or not known[rid] then
          local v = rid and read(rid)
          if v and v.st == 'r' and v.eid == p[1] then
            redis.call('HINCRBY', owns, engine, -1)
            own(rid, v, class)
          else
            drop(class, p[1], engine)
          end
        end
      end
    end
  end
end

-- Whether an engine's lease has run out.
local function is_late(name)
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now - lease - 1))) do
    if other == name then
      return true
    end
  end
  return false
end

-- 2. Whose requests are orphans: the lease ran out, or nobody listens to the control channel.
local dead, silent = {}, {}
if room > 0 then
  -- All that are silent, or the suspects of some that are dead would hide the streams of others.
  local stale = redis.call('ZRANGEBYSCORE', leases, '-inf', int(now - doubt - 1), 'WITHSCORES', 'LIMIT', 0, STALE)
  for i = 1, #stale, 2 do
    if stale[i] == NOBODY then
      dead[1] = NOBODY
    elseif stale[i] ~= engine then
      silent[#silent + 1] = {engine = stale[i], ms = now - tonumber(stale[i + 1])}
    end
  end
  -- Whose own lease ran out was kept from talking, and so perhaps were the others. And just after a restart or a
  -- failover every lease is old and nobody has reconnected yet: everybody gets the time of two leases to come back.
  if #silent > 0 and not is_late(engine) and now - server_since(now) >= 2 * lease then
    local channels = {}
    for i, other in ipairs(silent) do
      channels[i] = 'rts:w:' .. other.engine
    end
    local listeners = redis.call('PUBSUB', 'NUMSUB', unpack(channels))
    for i, other in ipairs(silent) do
      if other.ms > lease or listeners[2 * i] == 0 then
        dead[#dead + 1] = other.engine
      end
    end
  end
end
local orphans = {{}, {}, {}}
-- Together not much more than there is room for.
local each = math.ceil(room / math.max(1, #dead)) + SPARE_ORPHANS
for _, other in ipairs(dead) do
  local found = 0
  for class = 1, 3 do
    local pending = redis.pcall('XPENDING', stream(class), GROUP, '-', '+', each, other)
    if not pending.err then
      for _, p in ipairs(pending) do
        local ms, n = string.match(p[1], '(%d+)-(%d+)')
        orphans[class][#orphans[class] + 1] = {id = p[1], other = other, ms = tonumber(ms), n = tonumber(n)}
        found = found + 1
      end
    end
  end
  if found == 0 then
    redis.call('ZREM', leases, other)
    redis.call('HDEL', owns, other)
  end
end

-- The oldest orphan of each class, with its request's id and time.
local first = {}
local function peek_orphan(class)
  local o = table.remove(orphans[class], 1)
  first[class] = o
  if o then
    local entry = redis.call('XRANGE', stream(class), o.id, o.id)[1]
    o.rid = entry and entry[2][2]
    o.t = entry and tonumber(entry[2][6]) or now
    o.level = level_of(class, o.t)
  end
end
for class = 1, 3 do
  table.sort(orphans[class], function(a, b)
    return a.ms < b.ms or (a.ms == b.ms and a.n < b.n)
  end)
  peek_orphan(class)
end

-- 3. The first undelivered entry of each class.
local heads, last = {}, {}
local function last_delivered(class)
  local groups = redis.pcall('XINFO', 'GROUPS', stream(class))
  for _, group in ipairs(groups) do
    local field = {}
    for i = 1, #group, 2 do
      field[group[i]] = group[i + 1]
    end
    if field['name'] == GROUP then
      return field['last-delivered-id']
    end
  end
  redis.call('XGROUP', 'CREATE', stream(class), GROUP, '0', 'MKSTREAM')
  return '0-0'
end

local function peek(class)
  local start = last[class] or last_delivered(class)
  last[class] = start
  local entry = redis.call('XRANGE', stream(class), '(' .. start, '+', 'COUNT', 1)[1]
  if not entry then
    heads[class] = nil
    return
  end
  local t = tonumber(entry[2][6])
  heads[class] = {id = entry[1], rid = entry[2][2], caller = entry[2][4], t = t,
    level = level_of(class, t)}
end

local function count_waiting()
  local n = 0
  for class = 1, 3 do
    n = n + tonumber(redis.call('HGET', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'waiting') or 0)
  end
  return n
end

local waiting = count_waiting()
local share = 0
if waiting > 0 and room > 0 then
  for class = 1, 3 do
    peek(class)
  end
  -- A burst is spread over the engines that live, instead of filling the first one that asks.
  local live = redis.call('ZCOUNT', 'rts:engines:' .. mv, int(now - tonumber(ARGV[7])), '+inf')
  share = math.min(room, math.ceil(waiting / math.max(1, live)))
end

-- 4. Take, best first.
-- Returns false when it is a suspect that cannot be alone here: then nothing has changed.
local function take_orphan(class)
  local id, other, rid = first[class].id, first[class].other, first[class].rid
  local v = rid and read(rid)
  if not v or v.st ~= 'r' or v.eid ~= id then
    drop(class, id, other)
  elseif v.dl <= now then
    finish(rid, 'timeout', end_blob('timeout'), now)
  else
    -- Only deaths without progress tell a poisonous request from an unlucky one.
    local deaths = v.done <= v.mark and v.deaths + (other == NOBODY and 0 or 1) or 0
    if deaths >= max_deaths then
      redis.call('HINCRBY', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'dead', 1)
      redis.call('XADD', 'rts:dead', '*', 'rid', rid, 'caller', v.caller, 'mv', mv, 'class', CLASSES[class],
        'why', 'engines died without progress', 'engine', other, 'deaths', deaths, 'body', v.body)
      finish(rid, 'engine_failed', end_blob('engine_failed'), now)
    elseif deaths > 0 and not (calm and mine == 0) then
      return false
    else
      if deaths ~= v.deaths then
        v.deaths = deaths
        redis.call('HSET', 'rts:r:' .. rid, 'deaths', deaths)
      end
      redis.call('XCLAIM', stream(class), GROUP, engine, 0, id, 'JUSTID')
      redis.call('HINCRBY', 'rts:count:' .. mv .. ':' .. CLASSES[class], 'redelivered', 1)
      disown(mv, other)
      own(rid, v, class)
    end
  end
  peek_orphan(class)
  return true
end

-- Whether nobody has listened for longer than the grace time, which begins here at the latest: emit has had
-- nothing to publish.
local function is_abandoned(rid, v)
  if is_heard(rid) then
    if v.unheard then
      redis.call('HDEL', 'rts:r:' .. rid, 'unheard')
    end
    return false
  end
  if not v.unheard then
    redis.call('HSET', 'rts:r:' .. rid, 'unheard', int(now), 'quiet', v.seq)
    return false
  end
  return outlasts('rts:r:' .. rid, v.unheard, v.grace, now)
end

local function take_waiting(class)
  local head = heads[class]
  local queue = mv .. ':' .. CLASSES[class]
  redis.call('XREADGROUP', 'GROUP', GROUP, engine, 'COUNT', 1, 'STREAMS', stream(class), '>')
  last[class] = head.id
  local v = read(head.rid)
  if not v or v.st ~= 'w' or v.eid ~= head.id then
    -- Its hash expired (and may have come again): nobody was left to end it at its deadline.
    redis.call('XACK', stream(class), GROUP, head.id)
    redis.call('XDEL', stream(class), head.id)
    leave_waiting(queue, 0)
    promote(queue, head.caller)
  elseif v.dl <= now then
    finish(head.rid, 'queue_timeout', end_blob('queue_timeout'), now)
  elseif is_abandoned(head.rid, v) then
    finish(head.rid, 'abandoned', end_blob('abandoned'), now)
  else
    leave_waiting(queue, v.size)
    redis.call('HINCRBY', 'rts:count:' .. queue, 'running', 1)
    own(head.rid, v, class)
    share = share - 1
    promote(queue, v.caller)
  end
  peek(class)
end

local turns = room + SPARE_TURNS
while room > 0 and out_bytes < max_bytes and turns > 0 do
  turns = turns - 1
  local best, level, orphan = nil, 4, false
  for class = 1, 3 do
    local o = first[class]
    if o and (o.level < level or (o.level == level and o.t < first[best].t)) then
      best, level, orphan = class, o.level, true
    end
  end
  if share > 0 then
    for class = 1, 3 do
      local h = heads[class]
      if h and (h.level < level or (h.level == level and not orphan and h.t < heads[best].t)) then
        best, level, orphan = class, h.level, false
      end
    end
  end
  if not best then
    break
  end
  if not orphan then
    take_waiting(best)
  elseif not take_orphan(best) then
    -- Other streams that were under way need not wait for it.
    share = 0
    peek_orphan(best)
  end
end
if mine > 0 then
  redis.call('ZADD', leases, int(now), engine)
end
for _, other in ipairs(dead) do
  if other ~= NOBODY and redis.call('HEXISTS', owns, other) == 0 then
    forget_consumers(mv, other)
  end
end

local others = redis.call('HLEN', owns) - redis.call('HEXISTS', owns, engine)
return {out, count_waiting(), others}
