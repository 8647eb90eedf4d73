"""Processes on one table that are killed and replaced all the time: what is left adds up."""

import mmap
import os
import random
import select
import signal
import time
from contextlib import ExitStack
from fractions import Fraction
from functools import partial

import pytest

from tests.books import SCOPES, shared_file
from tests.crew import Worker
from tests.region import Region
from tokenguard._bucket import BucketTable, region_bytes
from tokenguard.arithmetic import scale
from tokenguard.errors import StaleHandle

SECONDS = 3
PROCESSES = 4
MOST = 100
"""Tokens of one call."""
CAPACITY = 10**9
CALLS = 10**6
"""More than anybody can make until the end."""
LIMIT_S = 30
SILENCE_S = 10

GRANTS = [(key, scale(CAPACITY, Fraction(0), 0)) for key in SCOPES]
PASSING = scale(1, Fraction(10**6), 0)
"""It is full again after 1 µs, and makes room for others."""
GUESTS = 20
"""Buckets of a plan that come and go, so that an operation takes long."""
PLANS = [[*GRANTS, *((b"guest-%d-%d" % (plan, i), PASSING) for i in range(GUESTS))] for plan in range(8)]
BUCKETS = len(GRANTS) + 3 * GUESTS


def hammer(fd, place, granted, seed, alive):
    """Reserve from all scopes and some buckets that come and go; write down what was granted.

    After some calls each, give a sign of life.
    """
    table, rng = BucketTable(BUCKETS, fd=fd), random.Random(seed)
    handles = [table.prepare(plan) for plan in PLANS]
    for _ in range(CALLS):
        number, cost = rng.randrange(len(PLANS)), rng.randrange(1, MOST + 1)
        try:
            if table.reserve(handles[number], (cost,) * len(GRANTS) + (1,) * GUESTS).allowed:
                granted[place] += cost
        except StaleHandle:  # somebody was killed in the middle of an operation
            handles[number] = table.prepare(PLANS[number])
        if not rng.randrange(100):
            os.write(alive, b"!")


class Storm:
    """Processes that hammer; used as a context.

    Args:
        fd: The file of the table.
        seed: Of all that is random, but for when the processes have their turns.

    Attributes:
        granted: What was granted in all to those who had a place.
        kills: How many were killed.
    """

    def __init__(self, fd, seed):
        self.granted = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self.kills = 0
        self._fd = fd
        self._random = random.Random(seed)
        self._hears, self._tells = os.pipe()
        self._workers = {place: self._worker(place) for place in range(PROCESSES)}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with ExitStack() as stack:
            for worker in self._workers.values():
                stack.push(worker)
        os.close(self._hears)
        os.close(self._tells)

    def rage(self, seconds):
        """At every sign of life, kill one of them and replace it; in the end kill all."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            assert select.select([self._hears], [], [], SILENCE_S)[0], "nobody gets on"
            os.read(self._hears, select.PIPE_BUF)
            place = self._random.randrange(PROCESSES)
            self._kill(place)
            self._workers[place] = self._worker(place)
        for place in list(self._workers):
            self._kill(place)

    def _worker(self, place):
        seed = self._random.random()
        worker = Worker(partial(hammer, self._fd, place, self.granted, seed, self._tells), LIMIT_S)
        worker.go()
        return worker

    def _kill(self, place):
        with self._workers.pop(place) as worker:
            os.kill(worker.pid, signal.SIGKILL)
            assert worker.wait() == -signal.SIGKILL, "it had ended by itself: its error is printed above"
            self.kills += 1


@pytest.mark.parametrize("seed", [1])
def test_storm_of_kills_leaves_every_scope_charged_alike(seed, tmp_path):
    """All scopes are charged the same: what was granted, and at most one call more for each process killed."""
    with shared_file(BUCKETS, tmp_path) as fd:
        table = BucketTable(BUCKETS, fd=fd)
        with Storm(fd, seed) as storm:
            storm.rage(SECONDS)

        table.expire_handles()  # what the last of them had begun is undone by whoever takes the lock
        outcome = table.peek(table.prepare(GRANTS))

        (charged,) = {CAPACITY - outcome.level(i) for i in range(len(GRANTS))}
        recorded = sum(storm.granted)
        assert recorded > storm.kills > PROCESSES
        assert recorded <= charged <= recorded + MOST * storm.kills
        assert Region(mmap.mmap(fd, region_bytes(BUCKETS))).faults() == []
