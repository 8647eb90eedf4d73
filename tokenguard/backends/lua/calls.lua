-- Evaluates a batch of calls at one instant and in their order, each as if it had come alone.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the record of the lane that sends: the number of the last batch of its that was kept on record
-- KEYS[3…] buckets, in any order
-- ARGV[1]  msgpack: [number, recorded, epoch, now_us, scales, scale_at, calls]
--          number    of this batch, above those of all before it in its lane; if it is not above the record, the
--                    batch came late or for a second time, and nothing is done
--          recorded  whether to keep the number on record: a batch that may be sent again must be
--          epoch     that the plans were made under; under another one, no reserve is evaluated
--          now_us    the time in µs, for tests: nothing expires then; false asks the clock of Redis
--          scales    one after the other: the text "C D r q tau" as it is stored, then C, D, r, q, tau
--          scale_at  for each bucket the position in `scales` of the text of the one that its budget has
--          calls     one after the other: kind, n, n positions of buckets (the first is 1), n amounts in tokens
--                    kind 1 reserves (amounts are costs), 2 settles (amounts are deltas), 3 peeks (and has none)
-- Returns  msgpack: [done, now_us, forgiven, clock_steps, results …], of which only `done` = 0 if nothing was done;
--          forgiven (tokens) and clock_steps count what conversions and stepped clocks brought about
--          results of a reserve: 1 or 0 for allowed or not, then n times level in units and tick; -1 if it is stale
--          results of a settle: the tokens forgiven
--          results of a peek: n times level in units and tick

local RESERVE, SETTLE = 1, 2
local RECORD_MS = 86400000

local number, recorded, epoch, given_us, texts, scale_at, calls = unpack(cmsgpack.unpack(ARGV[1]), 1, 7)
local values = call('MGET', unpack(KEYS))
if tonumber(values[2] or 0) >= number then return cmsgpack.pack({ 0 }) end

local current = values[1] == epoch
local now_us = given_us or clock_us()
local forgiven, clock_steps = 0, 0

for i = 1, #texts, 6 do
    know(unpack(texts, i, i + 5))
end

-- One bucket may be named twice, under two scales: the one a budget has now, and the one it had.
local buckets, wants, by_key, dirty = {}, {}, {}, {}
for i = 3, #KEYS do
    local key, want = KEYS[i], scales[texts[scale_at[i - 2]]]
    local bucket = by_key[key]
    if not bucket then
        bucket = bucket_of(key, values[i], want, now_us)
        by_key[key] = bucket
    end
    buckets[i - 2], wants[i - 2] = bucket, want
end

local function change(bucket)
    if not bucket.dirty then
        bucket.dirty = true
        dirty[#dirty + 1] = bucket
    end
end

local function catch_up(bucket)
    if refill(bucket, now_us) then
        clock_steps = clock_steps + 1
        change(bucket)
    end
    bucket.current = true
end

-- Returns a bucket as of now and under the scale wanted. A changed scale is kept, even on a refusal.
local function bring_up(i)
    local bucket, want = buckets[i], wants[i]
    if not bucket.current then catch_up(bucket) end
    if bucket.scale ~= want then
        if bucket.there then
            forgiven = forgiven + convert(bucket, want, now_us)
            bucket.current = false -- under shorter ticks, a clock may turn out to have stepped back
            change(bucket)
        else
            bucket.scale, bucket.level, bucket.tick = want, want.full, floor(now_us / want.tick_us)
        end
    end
    return bucket
end

local results = { 1, now_us, 0, 0 }
local last = 4

local function reserve(at, n)
    local passes = true
    for i = at + 1, at + n do
        local bucket, cost = bring_up(calls[i]), calls[i + n]
        local scale = bucket.scale
        if cost > 0 and (cost > scale.capacity or bucket.level < cost * scale.unit) then passes = false end
    end
    last = last + 1
    results[last] = passes and 1 or 0
    for i = at + 1, at + n do
        local bucket, cost = buckets[calls[i]], calls[i + n]
        if passes and cost > 0 then
            bucket.level = bucket.level - cost * bucket.scale.unit
            bucket.there = true
            change(bucket)
        end
        results[last + 1], results[last + 2] = bucket.level, bucket.tick
        last = last + 2
    end
end

local function settle(at, n)
    local lost = 0
    for i = at + 1, at + n do
        local bucket, delta = buckets[calls[i]], calls[i + n]
        if delta > 0 and not bucket.there then
            bring_up(calls[i])
            bucket.there = true
        end
        if delta ~= 0 and bucket.there then
            if not bucket.current then catch_up(bucket) end
            lost = lost + charge(bucket, delta)
            change(bucket)
        end
    end
    last = last + 1
    results[last] = lost
end

local function peek(at, n)
    for i = at + 1, at + n do
        local bucket, want = buckets[calls[i]], wants[calls[i]]
        local copy = bucket_of(nil, nil, want, now_us)
        if bucket.there then
            copy.level, copy.tick, copy.scale = bucket.level, bucket.tick, bucket.scale
            refill(copy, now_us)
            if copy.scale ~= want then convert(copy, want, now_us) end
        end
        results[last + 1], results[last + 2] = copy.level, copy.tick
        last = last + 2
    end
end

local at = 1
while calls[at] do
    local kind, n = calls[at], calls[at + 1]
    at = at + 1
    if kind == RESERVE then
        if current then
            reserve(at, n)
        else
            last = last + 1
            results[last] = -1
        end
        at = at + 2 * n + 1
    elseif kind == SETTLE then
        settle(at, n)
        at = at + 2 * n + 1
    else
        peek(at, n)
        at = at + n + 1
    end
end

for i = 1, #dirty do
    store(dirty[i], now_us, not given_us)
end
if recorded then
    call('SET', KEYS[2], format('%d', number), 'PX', RECORD_MS)
end
results[3], results[4] = forgiven, clock_steps
return cmsgpack.pack(results)
