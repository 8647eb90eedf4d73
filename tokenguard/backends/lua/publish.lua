-- Puts a node's budgets in place of what is there, for a Redis that came back empty or behind.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the budgets: a hash of bucket names to scales "C D r q tau"
-- KEYS[3]  the last changes: a list of epochs and the name that each changed, "epoch name", the last one first
-- ARGV[1]  the epoch that the node found there, empty for none; under another one nothing is done
-- ARGV[2]  the epoch of the budgets that follow
-- ARGV[3…] name, scale, name, scale …
-- Returns  1, or 0 if nothing was done

if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('RPUSH', KEYS[3], string.format('%s ', ARGV[2]))
for i = 3, #ARGV, 2 do
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
return 1
