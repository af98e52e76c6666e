#!lua
-- Gives back what a request was charged but did not use. Once for each fact, however often it is called.
-- Keys: rts:b:<caller> rts:settled:<fact>
-- ARGV: 1 caller, 2 id of the ended fact, 3 tokens to give back
-- Returns 1 given back, 0 had been settled before, or the bucket is full anyway.
if not redis.call('SET', 'rts:settled:' .. ARGV[2], '1', 'NX', 'EX', 3600) then
  return 0
end
return give_back(ARGV[1], 0, tonumber(ARGV[3]))
