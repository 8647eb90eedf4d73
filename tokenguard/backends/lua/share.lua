-- Lets each node know for a while what the others say of something.
--
-- KEYS[1]  what they say: a hash of nodes to "until text", the time in µs
-- ARGV[1]  the node that asks
-- ARGV[2]  for how many µs its text holds
-- ARGV[3]  its text, in place of the one before; empty for none
-- Returns  the others' texts

local texts, said, now = {}, call('HGETALL', KEYS[1]), clock_us()
for i = 1, #said, 2 do
    local till, text = match(said[i + 1], '^(%d+) (.*)$')
    if till and tonumber(till) > now and said[i] ~= ARGV[1] then
        texts[#texts + 1] = text
    elseif said[i] ~= ARGV[1] or ARGV[3] == '' then
        call('HDEL', KEYS[1], said[i])
    end
end
if ARGV[3] ~= '' then
    call('HSET', KEYS[1], ARGV[1], format('%d %s', now + ARGV[2], ARGV[3]))
end
return texts
