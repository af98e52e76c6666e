-- Forgets an engine that is gone. What it still owns stays, to be taken over; only then its consumers go.
-- Keys: rts:engines:<mv> rts:cards:<mv> rts:q:<queue>
-- ARGV: 1 mv, 2 engine
-- Returns 1 when nothing of it is left, 0 while it owns requests.
local mv, engine = ARGV[1], ARGV[2]
redis.call('ZREM', 'rts:engines:' .. mv, engine)
redis.call('HDEL', 'rts:cards:' .. mv, engine)
local left = 1
for class = 1, 3 do
  local q = 'rts:q:' .. mv .. ':' .. CLASSES[class]
  local pending = redis.pcall('XPENDING', q, GROUP, '-', '+', 1, engine)
  if not pending.err then
    -- DELCONSUMER would lose what is pending.
    if #pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', q, GROUP, engine)
    else
      left = 0
    end
  end
end
return left
