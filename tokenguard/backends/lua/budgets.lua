-- Tells the explicit budgets, unless the node knows them already.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the budgets: a hash of bucket names to scales "C D r q tau"
-- ARGV[1]  the epoch that the node knows them under; empty for none
-- Returns  [epoch] if it is that one; else [epoch, name, scale, name, scale …], the epoch empty if there is none

local epoch = redis.call('GET', KEYS[1]) or ''
if epoch ~= '' and epoch == ARGV[1] then return { epoch } end
local told = redis.call('HGETALL', KEYS[2])
table.insert(told, 1, epoch)
return told
