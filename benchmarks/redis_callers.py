"""Who calls, what and how: what the benchmarks of the Redis backend have in common."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import throttled.asyncio
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from tests.redis_servers import RedisServer, command_of
from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale
from tokenguard.backends.batch import scale_text
from tokenguard.backends.outage import Closed
from tokenguard.backends.redis import RedisBackend
from tokenguard.backends.redis_url import read_redis_url
from tokenguard.model import BucketName, Budget, Identity, Meter

CALLERS = 64
USERS = 1_000
MODEL = "gpt-4o-mini"
PROMPT, RESERVED, USED = 300, 900, 500
"""Tokens of a call."""
TIMEOUT_S = 10
"""A busy machine may hold up a batch for long, and that is no outage."""
AMPLE = scale(10**12, Fraction(1000, 3), 10**13)
"""Never short, and never full while it is used: every call refills and writes every bucket."""
PLAIN = Path(__file__).with_name("plain.lua").read_text()
PLAIN_ARGS = [str(RESERVED)] * 5 + [scale_text(AMPLE)]

# --- who calls, and where --------------------------------------------------------------------------------------


@contextmanager
def redis_apart():
    """Start a Redis on a core of its own, if there are two, and stay on another one meanwhile."""
    pins = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pins else []

    def stay_on(some):
        if pins:
            os.sched_setaffinity(0, some)

    stay_on(cores[1:2] or cores)  # as a process does that is started from here
    try:
        with RedisServer() as server:
            stay_on(cores[:1])
            yield server
    finally:
        stay_on(cores)


def backend_at(server):
    """Return a backend, which is still to be started."""
    return RedisBackend(read_redis_url(server.url), "bench", Closed(), BucketTable(USERS), TIMEOUT_S)


def people(teams=1, rolegroups=1, roles=1):
    """Return a thousand users, in a random order."""
    users = list(range(USERS))
    random.Random(0).shuffle(users)
    return [
        Identity(f"user-{i}", f"team-{i % teams}", f"role-{i % roles}", f"rolegroup-{i % rolegroups}")
        for i in users
    ]


def plans(backend, callers, meters=(Meter.TOKENS,), models=(None,)):
    """Return what limits each of some callers: a budget for each scope, meter and model."""
    return [
        backend.prepare(
            [
                Budget(BucketName(scope, meter, model), AMPLE)
                for scope in caller.scopes()
                for meter in meters
                for model in models
            ]
        )
        for caller in callers
    ]


def plain_keys(user):
    """Return the five keys that a user's call names elsewhere."""
    return [f"{{bench}}:{name}" for name in ("global:*", "team:0", "rolegroup:0", "role:0", f"user:{user}")]


# --- what they call --------------------------------------------------------------------------------------------


def reserving(backend):
    """Return a call for a plan."""

    async def call(handle):
        assert (await backend.reserve_soon(handle, (RESERVED,) * len(handle))).allowed

    return call


def settling(limiter):
    """Return a call for somebody, which is settled once it has been admitted."""

    async def call(caller):
        await limiter.settle_soon(await limiter.reserve_soon(caller, MODEL, PROMPT, RESERVED), USED)

    return call


def by_redis_py(client, sha, *args):
    """Return a call of a script that Redis knows, with five keys."""

    async def call(keys):
        assert await client.evalsha(sha, len(keys), *keys, *args) == 1

    return call


def by_limits(pool):
    """Return five hits of the algorithm of limits that asks least of Redis.

    They come one after the other, as each may be the one that refuses. (At once, they take longer.)
    """
    storage = RedisStorage("async+redis://", implementation="redispy", connection_pool=pool)
    limiter = FixedWindowRateLimiter(storage)
    ample = RateLimitItemPerMinute(10**12)

    async def call(keys):
        for key in keys:
            assert await limiter.hit(ample, key)

    return call


def by_throttled(url):
    """Return the like of throttled-py."""
    store = throttled.asyncio.RedisStore(server=url)
    quota = throttled.asyncio.per_min(10**12)
    throttle = throttled.asyncio.Throttled(using="fixed_window", quota=quota, store=store)

    async def call(keys):
        for key in keys:
            assert not (await throttle.limit(key)).limited

    return call


# --- how they call ---------------------------------------------------------------------------------------------


async def crowd(call, whom, seconds=float("inf"), calls=sys.maxsize):
    """Let 64 callers call, for some seconds or so many times; return how often they did."""
    until = time.perf_counter() + seconds
    done = 0

    async def caller():
        nonlocal done
        while done < calls and time.perf_counter() < until:
            done += 1
            await call(next(whom))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done


async def alone(call, whom, seconds):
    """Let one caller call; return how many µs each call took."""
    took_us = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        await call(next(whom))
        took_us.append((time.perf_counter() - began) * 1e6)
    return took_us


def threads(call, whom, seconds, count):
    """Let threads call; return how often they did."""
    until = time.perf_counter() + seconds
    done = [0] * count

    def caller(i):
        while time.perf_counter() < until:
            call(next(whom))
            done[i] += 1

    started = [threading.Thread(target=caller, args=(i,)) for i in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return sum(done)


def redis_benchmark(server, sha, requests):
    """Let redis-benchmark call ``plain.lua``; return how often in a second it was answered, as it says."""
    how = ["-p", str(server.port), "-c", str(CALLERS), "-P", "32", "-r", str(USERS), "-n", str(requests), "--csv"]
    what = ["EVALSHA", sha, "5", *plain_keys("__rand_int__"), *PLAIN_ARGS]
    told = subprocess.run([command_of("redis-benchmark"), *how, *what], capture_output=True, text=True, check=True)
    header, row = (line.strip('"').split('","') for line in told.stdout.splitlines()[-2:])
    return float(row[header.index("rps")])
