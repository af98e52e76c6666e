#!lua
-- Looks for a request that a repeated Idempotency-Key may attach to, and attaches.
-- Keys: rts:r:<rid> rts:l:<rid>
-- ARGV: 1 rid, 2 caller, 3 digest of the body, 4 grace (ms unheard before it is cancelled)
-- Returns {0, 0} there is none to attach to; {1, messages.View, run} there is; {2, 0} the id is taken by another.
return present(ARGV[1], ARGV[2], ARGV[3], ARGV[4]) or {0, 0}
