"""What the Redis backend does in a second and how long a lone call waits, beside others at the same Redis.

All rows take turns in every round, and their medians are compared. README.md says what the rows mean.

Run: python -m benchmarks.redis_rows [seconds of a turn [rounds]]
"""

import asyncio
import sys
import time
from contextlib import contextmanager
from itertools import cycle
from statistics import median, quantiles
from typing import NamedTuple

import uvloop
from redis.asyncio import Redis

from benchmarks.redis_callers import (
    AMPLE,
    MODEL,
    PLAIN,
    PLAIN_ARGS,
    PROMPT,
    RESERVED,
    USERS,
    alone,
    backend_at,
    by_limits,
    by_redis_py,
    by_throttled,
    crowd,
    people,
    plain_keys,
    plans,
    redis_apart,
    redis_benchmark,
    reserving,
    settling,
    threads,
)
from tokenguard.limiter import Limiter
from tokenguard.model import SCOPE_KINDS, Meter
from tokenguard.plan import Plans

COMMAND = "redis-benchmark: plain.lua"
BACKEND = "RedisBackend: reserve"
SPREAD = "RedisBackend: reserve, 10 teams"
TWENTY = "RedisBackend: reserve, 20 buckets"
LIMITER = "Limiter: reserve"
SETTLED = "Limiter: reserve + settle"
REDIS_PY = "redis-py: plain.lua"
LIMITS = "limits: five hits"
THROTTLED = "throttled-py: five hits"
NOTHING = "redis-py: a script that does nothing"
THREAD, THREADS = "RedisBackend: reserve, 1 thread", "RedisBackend: reserve, 16 threads"
LONE_TURNS = 5
"""In a round, and as much shorter: what a lone call waits for is the machine's mood."""
OURS = (BACKEND, SPREAD, TWENTY, LIMITER, SETTLED, THREAD, THREADS)


class Turn(NamedTuple):
    """What came of a row's turn.

    Attributes:
        per_s: Calls per second.
        client_us: The client's CPU time for a call; None if the client is another process.
        redis_us: Redis's CPU time for a call.
        batch: Calls in a batch; None where there are no batches.
    """

    per_s: float
    client_us: float | None
    redis_us: float
    batch: float | None


class Target(NamedTuple):
    """What is asked of the rows, and what was found. An aim may be missed."""

    what: str
    found: float
    least: float = 0
    most: float = float("inf")
    is_aim: bool = False

    @property
    def is_met(self):
        """Whether it is what was asked."""
        return self.least <= self.found <= self.most

    def __str__(self):
        asked = f"at least {self.least:g}" if self.least else f"at most {self.most:g}"
        missed = "short" if self.is_aim else "MISSED"
        return f"{'met' if self.is_met else missed:<8}{self.what:<62}{self.found:>7.2f}   asked: {asked}"


class Rows:
    """What takes turns, and what came of it.

    Args:
        server: The Redis.
        backend: The backend, started.
        seconds: How long a turn lasts.

    Attributes:
        turns: By row.
        waits_us: How long each call of a lone caller took, by row and turn.
    """

    def __init__(self, server, backend, seconds):
        self._server = server
        self._backend = backend
        self._seconds = seconds
        self._redis = server.client()
        self._client = Redis(port=server.port)
        self._plain, self._nothing = (self._redis.script_load(script) for script in (PLAIN, "return 1"))
        self.turns = {}
        self.waits_us = {}

    async def close(self):
        """Disconnect."""
        self._redis.close()
        await self._client.aclose()

    # --- turns -------------------------------------------------------------------------------------------------

    async def take_turns(self, rounds):
        """Let redis-benchmark, the crowds and the lone callers take turns."""
        crowds, loners = self._crowds(), self._loners()
        for call, whom in crowds.values():
            await crowd(call, whom, calls=USERS)  # makes connections and plans
        requests = int(self._seconds * redis_benchmark(self._server, self._plain, 20_000))
        for _ in range(rounds):
            with self._turn(COMMAND) as calls:
                per_s = redis_benchmark(self._server, self._plain, requests)
                calls.append(requests)
            self.turns[COMMAND][-1] = self.turns[COMMAND][-1]._replace(per_s=per_s, client_us=None)
            for name, (call, whom) in crowds.items():
                with self._turn(name) as calls:
                    calls.append(await crowd(call, whom, self._seconds))
            for _ in range(LONE_TURNS):
                for name, (call, whom) in loners.items():
                    took_us = await alone(call, whom, self._seconds / LONE_TURNS)
                    self.waits_us.setdefault(name, []).append(took_us)

    def take_turns_of_threads(self, rounds):
        """Let one thread and sixteen take turns."""
        whom = cycle(plans(self._backend, people()))

        def call(handle):
            assert self._backend.reserve(handle, (RESERVED,) * len(handle)).allowed

        threads(call, whom, 0.1, 16)
        for _ in range(rounds):
            for name, count in ((THREAD, 1), (THREADS, 16)):
                with self._turn(name) as calls:
                    calls.append(threads(call, whom, self._seconds, count))

    def _crowds(self):
        backend, keys = self._backend, cycle([plain_keys(user) for user in range(USERS)])
        limiter = Limiter(backend, Plans(backend, dict.fromkeys(SCOPE_KINDS, AMPLE)))
        return {
            BACKEND: (reserving(backend), cycle(plans(backend, people()))),
            SPREAD: (reserving(backend), cycle(plans(backend, people(10, 3, 20)))),
            TWENTY: (reserving(backend), cycle(self._of_twenty())),
            LIMITER: (lambda who: limiter.reserve_soon(who, MODEL, PROMPT, RESERVED), cycle(people())),
            SETTLED: (settling(limiter), cycle(people())),
            REDIS_PY: (by_redis_py(self._client, self._plain, *PLAIN_ARGS), keys),
            LIMITS: (by_limits(self._client.connection_pool), keys),
            THROTTLED: (by_throttled(self._server.url), keys),
        }

    def _loners(self):
        backend, keys = self._backend, cycle([plain_keys(user) for user in range(USERS)])
        return {
            NOTHING: (by_redis_py(self._client, self._nothing), keys),
            REDIS_PY: (by_redis_py(self._client, self._plain, *PLAIN_ARGS), keys),
            BACKEND: (reserving(backend), cycle(plans(backend, people()))),
            TWENTY: (reserving(backend), cycle(self._of_twenty())),
        }

    def _of_twenty(self):
        """Return plans of 20 buckets: tokens and requests, of all models and of one, on five scopes."""
        return plans(self._backend, people(), Meter, (None, MODEL))

    @contextmanager
    def _turn(self, name):
        """Measure what is done meanwhile; the number of calls is to be put into the list."""
        calls = []
        stats, redis_s = self._backend.stats(), self._redis_cpu_s()
        began, client_s = time.perf_counter(), time.process_time()
        yield calls
        took_s, client_s = time.perf_counter() - began, time.process_time() - client_s
        redis_s, after = self._redis_cpu_s() - redis_s, self._backend.stats()
        (done,) = calls
        batch = (
            (after["batched"] - stats["batched"]) / (after["batches"] - stats["batches"]) if name in OURS else None
        )
        turn = Turn(done / took_s, client_s / done * 1e6, redis_s / done * 1e6, batch)
        self.turns.setdefault(name, []).append(turn)

    def _redis_cpu_s(self):
        cpu = self._redis.info("cpu")
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"]

    # --- what came of them -------------------------------------------------------------------------------------

    def middle(self, name, what="per_s"):
        """Return the median over a row's turns."""
        return median(getattr(turn, what) for turn in self.turns[name])

    def wait_us(self, name, percent=50):
        """Return how long so many percent of a lone caller's calls took at most: the median over the turns."""
        return median(quantiles(took_us, n=100)[percent - 1] for took_us in self.waits_us[name])

    async def commands(self, name, calls=100):
        """Return how often Redis ran each command for a lone call: for the client, and for the script."""
        call, whom = self._loners()[name]
        self._redis.config_resetstat()
        for _ in range(calls):
            await call(next(whom))
        stats = self._redis.info("commandstats")
        counts = {command.removeprefix("cmdstat_"): stat["calls"] / calls for command, stat in stats.items()}
        return {command: count for command, count in counts.items() if command not in ("info", "config|resetstat")}


def show(rows):
    """Print what came of the rows."""
    print(f"{'64 callers':<40}{'calls/s':>10}{'x plain.lua':>13}{'client µs':>11}{'Redis µs':>10}{'a batch':>9}")
    for name, turns in rows.turns.items():
        client, batch = (
            "" if getattr(turns[0], what) is None else f"{rows.middle(name, what):.1f}"
            for what in ("client_us", "batch")
        )
        per_s, redis_us = rows.middle(name), rows.middle(name, "redis_us")
        ratio = per_s / rows.middle(COMMAND)
        print(f"{name:<40}{per_s:>10,.0f}{ratio:>13.2f}{client:>11}{redis_us:>10.1f}{batch:>9}")
    print(f"\n{'one caller':<40}{'p50 µs':>10}{'x nothing':>13}{'p99 µs':>11}")
    for name in rows.waits_us:
        p50, p99 = rows.wait_us(name), rows.wait_us(name, 99)
        print(f"{name:<40}{p50:>10.1f}{p50 / rows.wait_us(NOTHING):>13.2f}{p99:>11.1f}")
    reserves, wait_us = (of(TWENTY) / of(BACKEND) for of in (rows.middle, rows.wait_us))
    print(f"\n20 buckets to 5: {reserves:.2f} times the reserves, {wait_us:.2f} times a lone call's p50")
    print(f"16 threads to one: {rows.middle(THREADS) / rows.middle(THREAD):.2f} times the reserves")


def targets(rows, commands):
    """Return what is asked."""
    found = []
    for name in (BACKEND, LIMITER):
        ratio = rows.middle(name) / rows.middle(COMMAND)
        found.append(Target(f"{name}, times redis-benchmark's plain.lua", ratio, least=0.7))
        found.append(Target(f"{name}, the aim", ratio, least=1.2, is_aim=True))
        found.append(Target(f"{name}, client's CPU in µs", rows.middle(name, "client_us"), most=25))
    wait = rows.wait_us(BACKEND) / rows.wait_us(NOTHING)
    found.append(Target(f"{BACKEND}, alone, p50 to that of doing nothing", wait, most=1.5))
    trips = sum(count for command, count in commands.items() if command not in ("time", "mget", "set"))
    found += [
        Target(f"{BACKEND}, times {name}", rows.middle(BACKEND) / rows.middle(name), least=8)
        for name in (LIMITS, THROTTLED)
    ]
    return [*found, Target(f"{TWENTY}, alone, round trips", trips, most=1)]


async def measure(server, seconds, rounds):
    """Let all rows take turns, print what came of it and return what is asked."""
    backend = backend_at(server)
    await backend.start()
    rows = Rows(server, backend, seconds)
    try:
        await rows.take_turns(rounds)
        await asyncio.to_thread(rows.take_turns_of_threads, rounds)
        commands = {name: await rows.commands(name) for name in (BACKEND, TWENTY)}
    finally:
        await rows.close()
        await backend.stop()
    show(rows)
    for name, counts in commands.items():
        print(f"{name}, alone: Redis ran", ", ".join(f"{count:g} {command}" for command, count in counts.items()))
    return targets(rows, commands[TWENTY])


def main(seconds=0.5, rounds=7):
    """Measure; return whether a target was missed."""
    with redis_apart() as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(server, seconds, rounds))
    print("\ntargets, by medians of this run", *found, sep="\n")
    return not all(target.is_met or target.is_aim for target in found)


if __name__ == "__main__":
    sys.exit(main(*(float(text) for text in sys.argv[1:2]), *(int(text) for text in sys.argv[2:3])))
