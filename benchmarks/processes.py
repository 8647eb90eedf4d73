"""Processes that hammer five scopes of one table: what they do in a second, what a call takes, what sharing costs.

README.md says what the rows mean. It exits with 1 if a token was lost or found, or if sharing costs too much.

Run: python -m benchmarks.processes [seconds]
"""

import random
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import cycle, islice
from statistics import median, quantiles
from typing import NamedTuple

from benchmarks.test_bench_bucket import AMPLE, CALLS, SCOPES, path
from tests.books import MEMORY, open_books, shared_file
from tests.books import SCOPES as KEYS
from tests.crew import crew
from tokenguard._bucket import BucketTable

BUCKETS = 1_100
ROUNDS = 101
MOST = 1.3
"""How many times as long as on memory of its own a call may take on a file in memory."""
PLACES = {"memory of its own": None, "a file in memory": MEMORY, "a file on the disk": tempfile.gettempdir()}


class Hammered(NamedTuple):
    """What a process did: operations, the tokens that it had in the end, how long each reserve took, sorted."""

    operations: int
    spent: int
    reserve_ns: list[int]


def hammer(table, seed, seconds):
    """Reserve, settle to less or to more, again and again."""
    rng = random.Random(seed)
    handle = table.prepare((key, AMPLE) for key in KEYS)
    calls = [(cost, rng.randrange(-cost, 100)) for cost in (rng.randrange(1, 1_000) for _ in range(1_000))]
    calls = cycle([((cost,) * SCOPES, (delta,) * SCOPES) for cost, delta in calls])
    spent, took_ns, until_s = 0, [], time.monotonic() + seconds
    while time.monotonic() < until_s:
        for costs, deltas in islice(calls, 50):
            began_ns = time.perf_counter_ns()
            outcome = table.reserve(handle, costs)
            took_ns.append(time.perf_counter_ns() - began_ns)
            assert outcome.allowed
            table.settle(handle, deltas)
            spent += costs[0] + deltas[0]
    return Hammered(2 * len(took_ns), spent, sorted(took_ns))


def crowd(processes, seconds):
    """Let processes hammer the same five buckets, print a row; return by how many units the books are wrong."""
    with shared_file(BUCKETS) as fd:
        table = BucketTable(BUCKETS, fd=fd)
        books = open_books(table, [(key, AMPLE) for key in KEYS])
        told = crew(lambda seed: hammer(BucketTable(BUCKETS, fd=fd), seed, seconds), processes, seconds + 60)
        error = max(abs(book.error(table, sum(one.spent for one in told))) for book in books)
    per_s = sum(one.operations for one in told) / seconds
    shares = [told[0].reserve_ns[int(len(told[0].reserve_ns) * share)] / 1e3 for share in (0.5, 0.99, 0.999)]
    waits = "".join(f"{us:>10,.2f}" for us in shares)
    print(f"{processes:>9}{per_s:>14,.0f}{waits}   {f'{error} units WRONG' if error else 'to the unit'}")
    return error


def cost_of_sharing():
    """Let the places take turns, print what a call takes in each, and return how many times as long at most."""
    costs, deltas = (900,) * SCOPES, (-400,) * SCOPES
    took_s = {place: [] for place in PLACES}
    with ExitStack() as stack:
        places = []
        for place, folder in PLACES.items():
            fd = None if folder is None else stack.enter_context(shared_file(BUCKETS, folder))
            table = BucketTable(BUCKETS, fd=fd)
            handles = [table.prepare((key, AMPLE) for key in path(user)) for user in range(CALLS)]
            random.Random(0).shuffle(handles)
            places.append((place, table, handles))
        for number in range(ROUNDS):
            for place, table, handles in random.Random(number).sample(places, len(places)):
                began_s = time.perf_counter()
                for handle in handles:
                    table.reserve(handle, costs)
                    table.settle(handle, deltas)
                took_s[place].append(time.perf_counter() - began_s)
    own_s, *shared_s = (median(rounds) for rounds in took_s.values())
    for (place, rounds), ratio in zip(took_s.items(), [1, *(s / own_s for s in shared_s)], strict=True):
        low, middle, high = (s / CALLS * 1e9 for s in quantiles(rounds, n=4))
        print(f"{place:<20}{middle:>8,.0f} ns, half of the rounds {low:,.0f} to {high:,.0f}; x {ratio:.2f}")
    return shared_s[0] / own_s


def main(seconds):
    """Print both tables."""
    print(f"{'':>9}{'reserves and':>14}{'a reserve of one of them, µs':>30}")
    print(f"{'processes':>9}{'settles/s':>14}{'median':>10}{'p99':>10}{'p99.9':>10}   the levels are right")
    errors = [crowd(processes, seconds) for processes in (1, 2, 4)]
    print(f"\nreserve + settle of one process, median of {ROUNDS} rounds")
    ratio = cost_of_sharing()
    print(
        f"{'met' if ratio <= MOST else 'MISSED'}: a file in memory takes {ratio:.2f} times as long, asked: {MOST}"
    )
    sys.exit(any(errors) or ratio > MOST)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
