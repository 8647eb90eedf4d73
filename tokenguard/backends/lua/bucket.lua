-- The arithmetic of one bucket: what _table.pxi does in C, once more and to the unit.
-- It is put in front of the scripts that touch buckets and takes no KEYS or ARGV of its own.
--
-- A bucket is stored as "L t C D r q tau": its level in units, the tick up to which it has been refilled, and the
-- scale it stands under: capacity and debt in whole tokens, units per tick, units per token, µs per tick.
-- A key that is not there is a bucket that is full.
--
-- SAFETY: Lua counts in doubles, which are exact up to 2^53. arithmetic.scale() keeps every amount below 2^52, and
-- the one product that may be larger, what flows in, is then larger than any room for it, rounded or not.
-- Source: docs/decisions/001-exact-integers.md

local NEVER, STEP_US = 1e15, 1e6
local floor, ceil, format, match = math.floor, math.ceil, string.format, string.match
local call = redis.call

local scales = {}

-- Makes a scale known by its text.
local function know(text, capacity, debt, gain, unit, tick_us)
    local scale = {
        text = text,
        capacity = capacity,
        debt = debt,
        gain = gain,
        unit = unit,
        tick_us = tick_us,
        full = capacity * unit,
    }
    scales[text] = scale
    return scale
end

-- Returns the scale that a text names, always the same table for the same text.
local function scale_of(text)
    if scales[text] then return scales[text] end
    local capacity, debt, gain, unit, tick_us = match(text, '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
    return know(text, tonumber(capacity), tonumber(debt), tonumber(gain), tonumber(unit), tonumber(tick_us))
end

-- Returns a bucket: as it is stored, or full if it is not.
--   there    whether it is, or is to be, found in Redis
--   current  whether it has been refilled up to now
--   dirty    whether it has to be written
local function bucket_of(key, value, scale, now_us)
    local level, tick, text
    if value then
        level, tick, text = match(value, '^(%-?%d+) (%d+) (.+)$')
        level, tick, scale = tonumber(level), tonumber(tick), scales[text] or scale_of(text)
    else
        level, tick = scale.full, floor(now_us / scale.tick_us)
    end
    local there = value and true
    return { key = key, level = level, tick = tick, scale = scale, there = there, current = not there, dirty = false }
end

-- Brings a bucket up to now; returns whether the clock had stepped back so far that it is believed.
local function refill(bucket, now_us)
    local scale = bucket.scale
    local tick = floor(now_us / scale.tick_us)
    if tick > bucket.tick then
        local room = scale.full - bucket.level
        local gain = (tick - bucket.tick) * scale.gain
        bucket.level = gain >= room and scale.full or bucket.level + gain
        bucket.tick = tick
    elseif (bucket.tick - 1) * scale.tick_us - now_us >= STEP_US then
        bucket.tick = tick
        return true
    end
    return false
end

local function clamp(value, low, high)
    return value < low and low or value > high and high or value
end

-- Takes over another scale: what was used stays used. Returns the tokens that fell below the new floor.
local function convert(bucket, scale, now_us)
    local old = bucket.scale
    local tokens = floor(bucket.level / old.unit) + scale.capacity - old.capacity
    local held_us = math.max(now_us, bucket.tick * old.tick_us)
    bucket.level = clamp(tokens, -scale.debt, scale.capacity) * scale.unit
    bucket.tick = ceil(held_us / scale.tick_us)
    bucket.scale = scale
    return math.max(0, -scale.debt - tokens)
end

-- Takes `delta` more tokens, or gives them back, within the bounds; returns how many were forgiven.
local function charge(bucket, delta)
    local scale, before = bucket.scale, bucket.level
    local bound = scale.capacity + scale.debt
    local after = before - clamp(delta, -bound, bound) * scale.unit
    bucket.level = clamp(after, -scale.debt * scale.unit, scale.full)
    return delta > 0 and delta - floor((before - bucket.level) / scale.unit) or 0
end

-- Returns the µs until a bucket is full: 0 if it is, NEVER if it never will be.
local function full_in_us(bucket, now_us)
    local scale = bucket.scale
    local units = scale.full - bucket.level
    if units <= 0 then return 0 end
    if scale.gain == 0 then return NEVER end
    return math.min(NEVER, (bucket.tick + ceil(units / scale.gain)) * scale.tick_us - now_us)
end

-- Writes a bucket. It expires a second after it will be full, for then it cannot be told from a new one.
local function store(bucket, now_us, expires)
    local key, scale = bucket.key, bucket.scale
    -- %d prints whole numbers up to 2^53 and no "-0"; tostring() and .. print 14 digits.
    local value = format('%d %d %s', bucket.level, bucket.tick, scale.text)
    local wait_us = expires and full_in_us(bucket, now_us) or NEVER
    if wait_us >= NEVER then
        call('SET', key, value)
    elseif wait_us == 0 and bucket.tick * scale.tick_us <= now_us then
        call('DEL', key)
    else
        call('SET', key, value, 'PX', format('%d', ceil(wait_us / 1000) + 1000))
    end
end

-- Returns the time in µs, by the clock of Redis. It is asked once a script.
local function clock_us()
    local time = call('TIME')
    return time[1] * 1e6 + time[2]
end
