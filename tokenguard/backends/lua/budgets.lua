-- Tells the explicit budgets: what changed since the node last asked, or all of them if that is not known any more.
--
-- KEYS[1]  the epoch of the budgets
-- KEYS[2]  the budgets: a hash of bucket names to scales "C D r q tau"
-- KEYS[3]  the last changes: a list of epochs and the name that each changed, "epoch name", the last one first
-- ARGV[1]  the epoch that the node knows them under; empty for none
-- Returns  [epoch, whole, name, scale, name, scale …]: the epoch is empty if there is none; whole is 1 if these are all
--          budgets, 0 if they are those that changed, and then the scale of one that was removed is empty

local epoch, known = redis.call('GET', KEYS[1]) or '', ARGV[1]
if epoch ~= '' and known == epoch then return { epoch, 0 } end

local names, since = {}, nil
if epoch ~= '' and known ~= '' then
    for _, change in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
        local at, name = string.match(change, '^(%S+) (.*)$')
        if at == known then
            since = names
            break
        end
        names[#names + 1] = name
    end
end

local told = { epoch, since and 0 or 1 }
if not since then
    for _, part in ipairs(redis.call('HGETALL', KEYS[2])) do
        told[#told + 1] = part
    end
elseif #names > 0 then
    local scales = redis.call('HMGET', KEYS[2], unpack(names))
    for i, name in ipairs(names) do
        told[#told + 1] = name
        told[#told + 1] = scales[i] or ''
    end
end
return told
