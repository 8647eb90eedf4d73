-- Sets or removes one explicit budget and converts its bucket at once.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the budgets: a hash of bucket names to scales "C D r q tau"
-- KEYS[3]  the last changes: a list of epochs and the name that each changed, "epoch name", the last one first
-- KEYS[4]  the bucket
-- ARGV[1]  the name of the bucket
-- ARGV[2]  the scale of its explicit budget; empty to remove it
-- ARGV[3]  the scale that it stands under from now on; empty if it is unlimited
-- ARGV[4]  its level in whole tokens; empty to leave what was used used
-- ARGV[5]  16 random digits for the new epoch
-- ARGV[6]  the time in µs, for tests: nothing expires then; empty asks the clock of Redis
-- ARGV[7]  1 to set it only if there is none yet
-- Returns  [outcome, forgiven, clock_steps]: outcome 1 if it is done, 0 if there was nothing to remove, -1 if there is
--          no epoch, which means that the budgets are not there, 2 if there was one already; forgiven in tokens

local KEPT_CHANGES = 255

local epoch = redis.call('GET', KEYS[1])
if not epoch then return { -1, 0, 0 } end
if ARGV[7] == '1' and redis.call('HMGET', KEYS[2], ARGV[1])[1] then return { 2, 0, 0 } end
if ARGV[2] ~= '' then
    redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
elseif redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then
    return { 0, 0, 0 }
end
epoch = format('%d:%s', match(epoch, '^(%d+):') + 1, ARGV[5])
redis.call('SET', KEYS[1], epoch)
redis.call('LPUSH', KEYS[3], format('%s %s', epoch, ARGV[1]))
redis.call('LTRIM', KEYS[3], 0, KEPT_CHANGES)

if ARGV[3] == '' then
    redis.call('DEL', KEYS[4])
    return { 1, 0, 0 }
end

local expires = ARGV[6] == ''
local now_us = expires and clock_us() or tonumber(ARGV[6])
local want, level = scale_of(ARGV[3]), tonumber(ARGV[4])
local value = redis.call('GET', KEYS[4])
local bucket = bucket_of(KEYS[4], value, want, now_us)
local forgiven, clock_steps = 0, 0
if value then
    if refill(bucket, now_us) then clock_steps = 1 end
    if bucket.scale ~= want then forgiven = convert(bucket, want, now_us) end
end
if level and (value or level < want.capacity) then
    bucket.level = level * want.unit
    bucket.there = true
end
if bucket.there then store(bucket, now_us, expires) end
return { 1, forgiven, clock_steps }
