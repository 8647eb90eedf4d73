"""What a call through five scopes costs when the buckets are in Redis, beside what else the same Redis is asked.

The short form of redis_rows.py, for the guard; README.md says what the rows mean.
"""

import asyncio
from itertools import cycle

import pytest
import uvloop
from redis.asyncio import Redis

from benchmarks.redis_callers import (
    AMPLE,
    PLAIN,
    PLAIN_ARGS,
    USERS,
    backend_at,
    by_limits,
    by_redis_py,
    crowd,
    people,
    plain_keys,
    plans,
    redis_apart,
    reserving,
    settling,
)
from tokenguard.limiter import Limiter
from tokenguard.model import SCOPE_KINDS
from tokenguard.plan import Plans

CALLS = 1_000
LONE_CALLS = 100


class Place:
    """An event loop, and what is at hand on it: a backend that has started, and a client of redis-py."""

    def __init__(self, server, runner):
        self.run = runner.run
        self.backend = backend_at(server)
        self.client = Redis(port=server.port)
        self.sha_of = {script: self.run(self.client.script_load(script)) for script in (PLAIN, "return 1")}
        self.run(self.backend.start())
        self.handles = cycle(plans(self.backend, people()))
        self.keys = cycle([plain_keys(user) for user in range(USERS)])

    async def close(self):
        """Disconnect."""
        await self.client.aclose()
        await self.backend.stop()


@pytest.fixture(scope="module")
def place():
    """Start a Redis, and be on an event loop near it."""
    with redis_apart() as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        place = Place(server, runner)
        yield place
        runner.run(place.close())


def measure_crowd(benchmark, place, name, call, whom):
    """Time a thousand calls of 64 callers."""
    benchmark.group = "five scopes, Redis, 64 callers"
    benchmark.name = f"{name}, 64 callers"
    benchmark.extra_info["calls"] = CALLS
    place.run(crowd(call, whom, calls=USERS))
    benchmark(lambda: place.run(crowd(call, whom, calls=CALLS)))


def measure_alone(benchmark, place, name, call, whom):
    """Time a hundred calls of one caller."""

    async def alone():
        for _ in range(LONE_CALLS):
            await call(next(whom))

    benchmark.group = "five scopes, Redis, one caller"
    benchmark.name = f"{name}, one caller"
    benchmark.extra_info["calls"] = LONE_CALLS
    place.run(alone())
    benchmark(lambda: place.run(alone()))


def test_reserve(benchmark, place):
    measure_crowd(benchmark, place, "RedisBackend reserve", reserving(place.backend), place.handles)


def test_limiter(benchmark, place):
    limiter = Limiter(place.backend, Plans(place.backend, dict.fromkeys(SCOPE_KINDS, AMPLE)))
    measure_crowd(benchmark, place, "Limiter reserve + settle on Redis", settling(limiter), cycle(people()))


def test_plain_script(benchmark, place):
    call = by_redis_py(place.client, place.sha_of[PLAIN], *PLAIN_ARGS)
    measure_crowd(benchmark, place, "redis-py: plain.lua", call, place.keys)


def test_limits(benchmark, place):
    call = by_limits(place.client.connection_pool)
    measure_crowd(benchmark, place, "limits: five hits on Redis", call, place.keys)


def test_one_caller(benchmark, place):
    measure_alone(benchmark, place, "RedisBackend reserve", reserving(place.backend), place.handles)


def test_one_caller_of_nothing(benchmark, place):
    call = by_redis_py(place.client, place.sha_of["return 1"])
    measure_alone(benchmark, place, "baseline: redis-py, a script that does nothing", call, place.keys)
