#!lua
-- Takes back an attempt to enqueue: ends the request that it put there, or gives back what it was charged.
-- Keys: rts:charge:<attempt> rts:b:<caller>, and those of finish()
-- ARGV: 1 rid, 2 caller, 3 attempt
-- Returns 0 there was nothing; 1 given back; 2 it is the attempt's request, which settles itself by its end.
if redis.call('HGET', 'rts:r:' .. ARGV[1], 'att') == ARGV[3] then
  finish(ARGV[1], 'cancelled', end_blob('cancelled'), now_ms())
  return 2
end
local charged = redis.call('GETDEL', 'rts:charge:' .. ARGV[3])
return charged and give_back(ARGV[2], 1, tonumber(charged)) or 0
