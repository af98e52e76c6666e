#!lua
-- Charges one request and its tokens to a caller's two buckets, both or neither.
-- The generic cell rate algorithm: a bucket is one time (TAT), the exact form of a token bucket that
-- holds one minute's worth. Source: ITU-T I.371, virtual scheduling. A TAT is in microseconds since
-- 1,700,000,000 s of Unix time with three decimals: what a double holds of them. Whole ones would allow
-- one call too many at more than some 10,000 a minute.
-- Keys: rts:b:<caller> rts:charge:<attempt>
-- ARGV: 1 caller, 2 requests a minute (0: no limit), 3 tokens a minute (0: no limit), 4 tokens to charge,
--       5 attempt: what enqueue or refund find the charge by, for a minute; or '' for one that stays
-- Returns {code, requests left, tokens left, retry after (ms), requests full in (ms), tokens full in (ms)}:
--   code 0 charged; 1 too many requests; 2 too many tokens; 3 more tokens than a full bucket holds.
local key = 'rts:b:' .. ARGV[1]
local rpm, tpm, cost = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local WINDOW = 60000000
local t = redis.call('TIME')
local now = (t[1] - 1700000000) * 1000000 + t[2]
local v = redis.call('HMGET', key, 'r', 't')

local function look(tat, limit, n)
  if limit == 0 then
    return {tat = now, next = now, left = 0, wait = 0, step = 0}
  end
  local step = WINDOW / limit
  tat = math.max(tonumber(tat or 0), now)
  local next = tat + n * step
  return {tat = tat, next = next, wait = math.max(0, next - WINDOW - now), step = step, limit = limit}
end

local function left(b, tat)
  return b.step == 0 and 0 or math.floor((now + WINDOW - tat) / b.step + 0.000001)
end

local function reply(code, r, t2, rtat, ttat, wait)
  return {code, left(r, rtat), left(t2, ttat), math.ceil(wait / 1000),
    math.ceil((rtat - now) / 1000), math.ceil((ttat - now) / 1000)}
end

local r, k = look(v[1], rpm, 1), look(v[2], tpm, cost)
if tpm > 0 and cost > tpm then
  return reply(3, r, k, r.tat, k.tat, 0)
end
if r.wait > 0 then
  return reply(1, r, k, r.tat, k.tat, math.max(r.wait, k.wait))
end
if k.wait > 0 then
  return reply(2, r, k, r.tat, k.tat, k.wait)
end
if rpm > 0 or tpm > 0 then
  redis.call('HSET', key, 'r', string.format('%.3f', r.next), 't', string.format('%.3f', k.next),
    'rs', tostring(r.step), 'ts', tostring(k.step))
  redis.call('PEXPIRE', key, math.ceil((math.max(r.next, k.next) - now) / 1000) + 1)
  if ARGV[5] ~= '' then
    -- After a minute there is nothing to give back: the bucket has refilled.
    redis.call('SET', 'rts:charge:' .. ARGV[5], int(cost), 'PX', WINDOW / 1000)
  end
end
return reply(0, r, k, r.next, k.next, 0)
