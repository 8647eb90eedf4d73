-- Evaluates a batch of calls at one instant and in their order, each as if it had come alone.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the record of the lane that sends: the number of the last batch of its that was kept on record
-- KEYS[3…] buckets, in any order
-- ARGV[1]  msgpack: [number, recorded, epoch, now_us, scales, scale_of, calls]
--          number    of this batch, above those of all before it in its lane; if it is not above the record, the
--                    batch came late or for a second time, and nothing is done
--          recorded  whether to keep the number on record: a batch that may be sent again must be
--          epoch     that the plans were made under; under another one, no reserve is evaluated
--          now_us    the time in µs, for tests: nothing expires then; false asks the clock of Redis
--          scales    texts "C D r q tau": capacity and debt in tokens, units per tick, units per token, µs per tick
--          scale_of  for each bucket the position in `scales` of the one that its budget has
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
local states, wants, dirty = {}, {}, {}
local forgiven, clock_steps = 0, 0

local by_key = {}
for i = 3, #KEYS do
    local key = KEYS[i]
    local want = scale_of(texts[scale_at[i - 2]])
    local state = by_key[key]
    if not state then
        state = values[i] and read(values[i]) or full(want, now_us)
        state.key = key
        by_key[key] = state
    end
    states[i - 2], wants[i - 2] = state, want
end

local function change(state)
    if not state.dirty then
        state.dirty = true
        dirty[#dirty + 1] = state
    end
end

local function catch_up(state)
    if not state.now and state.there then
        if refill(state, now_us) then
            clock_steps = clock_steps + 1
            change(state)
        end
        state.now = true
    end
end

-- Returns a bucket as of now and under the scale wanted. A changed scale is kept, even on a refusal.
local function bring_up(i)
    local state, want = states[i], wants[i]
    catch_up(state)
    if state.scale ~= want then
        if state.there then
            forgiven = forgiven + convert(state, want, now_us)
            change(state)
        else
            local new = full(want, now_us)
            state.level, state.tick, state.scale = new.level, new.tick, want
        end
    end
    return state
end

local results = { 1, now_us, 0, 0 }
local last = 4


local function reserve(at, n)
    local passes = true
    for i = at + 1, at + n do
        local state, cost = bring_up(calls[i]), calls[i + n]
        if cost > 0 and (cost > state.scale.capacity or state.level < cost * state.scale.unit) then
            passes = false
        end
    end
    last = last + 1
    results[last] = passes and 1 or 0
    for i = at + 1, at + n do
        local state, cost = states[calls[i]], calls[i + n]
        if passes and cost > 0 then
            state.level = state.level - cost * state.scale.unit
            state.there = true
            change(state)
        end
        results[last + 1], results[last + 2] = state.level, state.tick
        last = last + 2
    end
end

local function settle(at, n)
    local lost = 0
    for i = at + 1, at + n do
        local state, delta = states[calls[i]], calls[i + n]
        if delta > 0 and not state.there then
            bring_up(calls[i])
            state.there = true
        end
        if delta ~= 0 and state.there then
            catch_up(state)
            lost = lost + charge(state, delta)
            change(state)
        end
    end
    last = last + 1
    results[last] = lost
end

local function peek(at, n)
    for i = at + 1, at + n do
        local state, want = states[calls[i]], wants[calls[i]]
        local copy = full(want, now_us)
        if state.there then
            copy = { level = state.level, tick = state.tick, scale = state.scale }
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

for _, state in ipairs(dirty) do
    store(state.key, state, now_us, not given_us)
end
if recorded then
    call('SET', KEYS[2], format('%.0f', number), 'PX', RECORD_MS)
end
results[3], results[4] = forgiven, clock_steps
return cmsgpack.pack(results)
