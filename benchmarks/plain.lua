-- Five buckets, one call, one decision: the script that is written when every call travels by itself.
-- Its arithmetic is that of tokenguard/backends/lua/bucket.lua; it knows no batches, no changed budgets, no clock that
-- steps back, and it does not tell what remains. Rows of redis_rows.py and test_bench_redis.py; nothing else loads it.
--
-- KEYS[1…5]  buckets "L t C D r q tau"; one that is not there is full
-- ARGV[1…5]  what the call asks of each, in tokens
-- ARGV[6]    the scale "C D r q tau" of those that are not there
-- Returns    1 if every bucket passed and was charged, 0 if none was

local floor, ceil, format, match = math.floor, math.ceil, string.format, string.match

local time = redis.call('TIME')
local now_us = time[1] * 1e6 + time[2]
local values = redis.call('MGET', unpack(KEYS))

local buckets = {}
for i, key in ipairs(KEYS) do
    local level, tick, scale
    if values[i] then
        level, tick, scale = match(values[i], '^(%-?%d+) (%d+) (.+)$')
        level, tick = tonumber(level), tonumber(tick)
    else
        scale = ARGV[6]
    end
    local capacity, _, gain, unit, tick_us = match(scale, '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
    gain, tick_us = tonumber(gain), tonumber(tick_us)
    local full, now = capacity * unit, floor(now_us / tick_us)
    if not level then
        level, tick = full, now
    elseif now > tick then
        level, tick = math.min(full, level + (now - tick) * gain), now
    end
    level = level - ARGV[i] * unit
    if level < 0 then return 0 end
    buckets[i] = { level = level, tick = tick, scale = scale, full = full, gain = gain, tick_us = tick_us }
end

for i, key in ipairs(KEYS) do
    local b = buckets[i]
    local value = format('%d %d %s', b.level, b.tick, b.scale)
    local wait_us = (b.tick + ceil((b.full - b.level) / b.gain)) * b.tick_us - now_us
    redis.call('SET', key, value, 'PX', format('%d', ceil(wait_us / 1000) + 1000))
end
return 1
