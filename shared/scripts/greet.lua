#!lua
-- Notes which server this is, if it is a new one. An engine calls it once its control channel is subscribed, so
-- that after a restart or a failover the time to come back counts from the first who did.
-- Keys: rts:server
-- ARGV: none
-- Returns 1.
server_since(now_ms())
return 1
