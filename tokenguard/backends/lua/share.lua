-- Lets each node know for a while what numbers the others tell.
--
-- KEYS[1]  what is told: a hash of "node name" to "until number", the time in µs
-- ARGV[1]  the node that asks
-- ARGV[2]  for how many µs its numbers hold
-- ARGV[3…] a name, its number, and so on: each in place of what the node told of it before
-- Returns  the others' names and numbers: name, number, name, number, and so on

local told, fields, now = {}, call('HGETALL', KEYS[1]), clock_us()
for i = 1, #fields, 2 do
    local node, name = match(fields[i], '^(%S+) (.+)$')
    local till, number = match(fields[i + 1], '^(%d+) (%-?%d+)$')
    if not till or tonumber(till) <= now then
        call('HDEL', KEYS[1], fields[i])
    elseif node and node ~= ARGV[1] then
        told[#told + 1] = name
        told[#told + 1] = number
    end
end
for i = 3, #ARGV, 2 do
    local field = format('%s %s', ARGV[1], ARGV[i])
    call('HSET', KEYS[1], field, format('%d %s', now + ARGV[2], ARGV[i + 1]))
end
return told
