#!lua
-- Notes that the last listener of a kept request left: its grace time runs from now on, also while it waits.
-- A gateway calls it after it has unsubscribed; take and emit forget it when somebody listens.
-- Keys: rts:r:<rid> rts:l:<rid> (channel, only counted)
-- ARGV: 1 rid, 2 caller
-- Returns 0 unknown, another caller's, or ended; 1 noted; 2 somebody listens.
local key = 'rts:r:' .. ARGV[1]
local v = redis.call('HMGET', key, 'st', 'caller', 'seq')
if not v[1] or v[1] == 'e' or v[2] ~= ARGV[2] then
  return 0
end
if is_heard(ARGV[1]) then
  return 2
end
-- Also where it was noted before: whoever came back in between starts the time anew.
redis.call('HSET', key, 'unheard', int(now_ms()), 'quiet', v[3])
return 1
