#!lua
-- Ends a request at once, waiting or running; its engine learns it from its next emit.
-- Keys: those of finish()
-- ARGV: 1 rid, 2 caller or '' for anyone, 3 reason, 4 run or '' for any
-- Returns 0 unknown, or another caller's; 1 ended now; 2 had ended before.
local v = redis.call('HMGET', 'rts:r:' .. ARGV[1], 'st', 'caller', 'run')
if not v[1] or (ARGV[2] ~= '' and v[2] ~= ARGV[2]) then
  return 0
end
if ARGV[4] ~= '' and ARGV[4] ~= v[3] then
  return 2
end
if finish(ARGV[1], ARGV[3], end_blob(ARGV[3]), now_ms()) then
  return 1
end
return 2
