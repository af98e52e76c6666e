#!lua
-- Ends requests whose deadline has passed, whoever owns them. Any gateway or janitor may call it.
-- Keys: rts:due, and those of finish()
-- ARGV: 1 most requests to end
-- Returns the ids that were ended.
local now = now_ms()
local out = {}
for _, rid in ipairs(redis.call('ZRANGEBYSCORE', 'rts:due', '-inf', int(now), 'LIMIT', 0, ARGV[1])) do
  local st = redis.call('HGET', 'rts:r:' .. rid, 'st')
  local reason = st == 'w' and 'queue_timeout' or 'timeout'
  if finish(rid, reason, end_blob(reason), now) then
    out[#out + 1] = rid
  else
    redis.call('ZREM', 'rts:due', rid)
  end
end
return out
