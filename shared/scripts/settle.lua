-- Gives back what a request was charged but did not use. Once for each request, however often it is called.
-- Keys: rts:b:<caller> rts:settled:<rid>
-- ARGV: 1 caller, 2 rid, 3 requests to give back, 4 tokens to give back
-- Returns 1 given back, 0 had been settled before, or the bucket is full anyway.
if not redis.call('SET', 'rts:settled:' .. ARGV[2], '1', 'NX', 'EX', 3600) then
  return 0
end
local key = 'rts:b:' .. ARGV[1]
local v = redis.call('HMGET', key, 'r', 't', 'rs', 'ts')
if not v[1] then
  return 0
end
redis.call('HSET', key, 'r', string.format('%.3f', tonumber(v[1]) - tonumber(ARGV[3]) * tonumber(v[3])),
  't', string.format('%.3f', tonumber(v[2]) - tonumber(ARGV[4]) * tonumber(v[4])))
return 1
