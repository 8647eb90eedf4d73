"""Many processes and threads at once on one table: nothing is lost, and no bucket gives more than it has."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import cycle
from typing import NamedTuple

import pytest

from tests.books import SCOPES, open_books, shared_file
from tests.crew import crew
from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale

SECONDS = 0.5
BUCKETS = 64
PACED = [(key, scale(10**7, Fraction(10**6, 3 + i), 10**7)) for i, key in enumerate(SCOPES)]
GRANTS = [(key, scale(10**7, Fraction(0), 10**7)) for key in SCOPES]

pytestmark = pytest.mark.parametrize("plan", [PACED, GRANTS], ids=["paced", "grants"])


class Deed(NamedTuple):
    """A call that was admitted: when, after its reserve and before its settlement, and what these took."""

    now_us: int
    cost: int
    delta: int


def hammer(table, plan, seed):
    """Reserve, then settle to less or to more, for a while; return what was admitted."""
    rng = random.Random(seed)
    handle, deeds = table.prepare(plan), []
    calls = [(cost, rng.randrange(-cost, 20)) for cost in (rng.randrange(1, 300) for _ in range(1_000))]
    until_s = time.monotonic() + SECONDS
    for cost, delta in cycle(calls):
        if time.monotonic() > until_s:
            break
        if table.reserve(handle, (cost,) * len(plan)).allowed:
            deeds.append(Deed(time.time_ns() // 1000, cost, delta))
            table.settle(handle, (delta,) * len(plan))
    return deeds


def hammer_by_threads(table, plan, seed, threads):
    with ThreadPoolExecutor(threads) as pool:
        told = pool.map(lambda number: hammer(table, plan, seed * threads + number), range(threads))
        return [deed for deeds in told for deed in deeds]


def check(table, books, deeds):
    """Assert that the levels are what is left, and that at no instant more was had than there was: to the unit."""
    assert len(deeds) > 1_000
    assert table.stats()["forgiven"] == table.stats()["clock_steps"] == 0
    spent = sum(deed.cost + deed.delta for deed in deeds)
    assert [book.error(table, spent) for book in books] == [0] * len(books)
    had = 0
    for deed in sorted(deeds):
        had += deed.cost
        for book in books:
            assert had * book.unit <= book.granted(deed.now_us)
        had += min(deed.delta, 0)  # what is used beyond a reservation is debt, which any bucket may have


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_file_and_lose_nothing(plan, processes, tmp_path):
    """Each maps the file for itself; what all took and gave back is what the levels say."""
    with shared_file(BUCKETS, tmp_path) as fd:
        table = BucketTable(BUCKETS, fd=fd)
        books = open_books(table, plan)

        deeds = crew(lambda number: hammer(BucketTable(BUCKETS, fd=fd), plan, number), processes)

        check(table, books, [deed for told in deeds for deed in told])


@pytest.mark.parametrize("processes", [2, 4])
def test_forks_share_what_they_inherit_and_lose_nothing(plan, processes):
    """A table without a file belongs to all who were forked off."""
    table = BucketTable(BUCKETS)
    books = open_books(table, plan)

    deeds = crew(lambda number: hammer(table, plan, number), processes)

    check(table, books, [deed for told in deeds for deed in told])


@pytest.mark.parametrize(("processes", "threads"), [(1, 4), (2, 2)])
def test_threads_of_processes_lose_nothing(plan, processes, threads):
    """Threads beside each other in a process, and beside those of another."""
    table = BucketTable(BUCKETS)
    books = open_books(table, plan)

    deeds = crew(lambda number: hammer_by_threads(table, plan, number, threads), processes)

    check(table, books, [deed for told in deeds for deed in told])
