-- What wrk sends: the requests of a file, which take turns. And what it tells at the end, as JSON.
--
-- Arguments  the file; how many bytes each of its requests has

local requests, turn = {}, 0

init = function(args)
    local file, size = assert(io.open(args[1], 'rb')), tonumber(args[2])
    for block in function() return file:read(size) end do
        requests[#requests + 1] = block
    end
    file:close()
end

request = function()
    turn = turn % #requests + 1
    return requests[turn]
end

done = function(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '\n{"requests": %d, "took_us": %d, "p50_us": %d, "p99_us": %d, "statuses": %d, "broken": %d}\n',
        summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
        errors.connect + errors.read + errors.write + errors.timeout))
end
