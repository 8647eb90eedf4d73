"""Callers of several processes, with threads each, who do anything on one table and write down what they did.

Run, with a core that tells turns: python -m tests.variants CORE tests.integration.callers HISTORY file|fork SEED
HISTORY is where the events go, pickled.
"""

import ctypes
import pickle
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from tests.books import shared_file
from tests.crew import crew, pause_soon
from tests.engines import OracleHandle
from tests.history import STALE, Event
from tests.oracle import Terms
from tests.strategies import prepared, scale_of, seen
from tokenguard import _bucket
from tokenguard._bucket import BucketTable
from tokenguard.errors import StaleHandle

PROCESSES, THREADS, CALLS = 3, 2, 3_000
BUCKETS = 16
BUDGETS = {
    b"fast": (Terms(60, Fraction(10**6, 3), 20), Terms(90, Fraction(10**6), 0)),
    b"slow": (Terms(50, Fraction(7, 11), 500), Terms(50, Fraction(1000, 60), 500)),
    b"grant": (Terms(1000, Fraction(0)), Terms(70, Fraction(0), 70)),
    b"large": (Terms(10**9, Fraction(166667, 10000), 10**10), Terms(10**8, Fraction(10), 10**9)),
    b"user": (Terms(40, Fraction(3000), 400), Terms(30, Fraction(2000), 10), Terms(45, Fraction(0), 400)),
}
"""By key; the first of each is the usual one."""

core = ctypes.PyDLL(_bucket.__file__)
core.tg_witness_turn.restype = core.tg_witness_now_us.restype = ctypes.c_int64


class Caller:
    """One thread.

    Args:
        table: The table.
        name: Process and thread.
        seed: Of what it does.
    """

    def __init__(self, table, name, seed):
        self._table = table
        self._name = name
        self._random = random.Random(repr((name, seed)))
        self._events = []
        self._handles = []

    def call(self):
        """Do something, again and again; return what was done."""
        deeds = (
            self._reserve,
            self._settle,
            self._peek,
            self._prepare,
            self._configure,
            self._remove,
            self._expire,
        )
        weights = (40, 25, 20, 4, 6, 4, 1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        self._prepare()
        for number, deed in enumerate(self._random.choices(deeds, weights, k=CALLS)):
            if number % 3 == 0:
                pause_soon()
            deed()
        return self._events

    def _prepare(self):
        keys = self._random.sample(list(BUDGETS), self._random.randint(1, len(BUDGETS)))
        plan = tuple((key, self._terms(key)) for key in keys)
        handle = prepared(self._table, plan)
        self._handles.append((handle, OracleHandle(plan, handle.epoch)))

    def _terms(self, key):
        return BUDGETS[key][0] if self._random.random() < 0.9 else self._random.choice(BUDGETS[key])

    def _reserve(self):
        handle, known = self._handles[-1]
        costs = tuple(self._random.randint(0, 12) for _ in known.plan)

        def reserve():
            try:
                return seen(self._table.reserve(handle, costs))
            except StaleHandle:
                return STALE

        self._do("reserve", (known, costs), reserve)
        if self._events[-1].result == STALE:
            self._prepare()

    def _settle(self):
        handle, known = self._random.choice(self._handles[-5:])
        deltas = tuple(self._random.randint(-12, 10) for _ in known.plan)
        self._do("settle", (known, deltas), lambda: self._table.settle(handle, deltas))

    def _peek(self):
        handle, known = self._random.choice(self._handles[-5:])
        now_us = time.time_ns() // 1000
        self._do("peek", (known,), lambda: seen(self._table.peek(handle, now_us)), now_us)

    def _configure(self):
        key = self._random.choice(list(BUDGETS))
        terms = self._terms(key)
        level = self._random.choice([None, None, terms.capacity, self._random.randint(-terms.max_debt, 40)])
        if level is not None:
            level = min(level, terms.capacity)
        scale = scale_of(terms)
        self._do("configure", (key, scale, level), lambda: self._table.configure(key, scale, level))

    def _remove(self):
        key = self._random.choice(list(BUDGETS))
        self._do("remove", (key,), lambda: self._table.remove(key))

    def _expire(self):
        self._do("expire_handles", (), self._table.expire_handles)

    def _do(self, kind, arguments, work, peeked_us=None):
        """Do it, and write it down; a peek's time is given, for it tells nobody which it went by."""
        invoked_ns = time.monotonic_ns()
        result = work()
        returned_ns = time.monotonic_ns()
        if peeked_us is None:
            turn, now_us = core.tg_witness_turn(), core.tg_witness_now_us()
        else:
            turn, now_us = None, peeked_us
        self._events.append(Event(self._name, invoked_ns, returned_ns, turn, now_us, kind, arguments, result))


def callers(table, process, seed):
    """Let the threads of a process call; return what all did."""
    sys.setswitchinterval(1e-5)
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGALRM}
    )  # it is the callers who are to pause, not this thread
    with ThreadPoolExecutor(THREADS) as pool:
        told = pool.map(lambda thread: Caller(table, (process, thread), seed).call(), range(THREADS))
        return [event for events in told for event in events]


def main(history, place, seed):
    """Let all call, on a file that each process maps for itself or on memory that all were forked off with."""
    history = Path(history)
    with shared_file(BUCKETS, history.parent) as fd:
        table = BucketTable(BUCKETS, fd=fd if place == "file" else None)

        def work(process):
            mine = BucketTable(BUCKETS, fd=fd) if place == "file" else table
            return callers(mine, process, seed)

        told = crew(work, PROCESSES, limit_s=20)
    history.write_bytes(pickle.dumps([event for events in told for event in events]))


if __name__ == "__main__":
    main(*sys.argv[1:])
