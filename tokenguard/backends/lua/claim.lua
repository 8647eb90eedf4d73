-- Lets one of many do something that all would do.
--
-- KEYS[1]  what is to be done
-- ARGV[1]  for how many ms nobody else is to do it
-- Returns  1 if it is for whoever asks, 0 if somebody else has claimed it

return redis.call('SET', KEYS[1], '1', 'NX', 'PX', ARGV[1]) and 1 or 0
