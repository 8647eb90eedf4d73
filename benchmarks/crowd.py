"""A million live buckets: their memory, what a call takes among them, and what newcomers take if there is no room.

A bucket is live if it is not full: it cannot be dropped. README.md says what the rows mean.

Run: python -m benchmarks.crowd
"""

import gc
import random
import re
import time
from fractions import Fraction
from pathlib import Path

from benchmarks.test_bench_bucket import AMPLE, SCOPES, path
from tests.crew import crew
from tokenguard._bucket import MAX_PLAN, BucketTable, region_bytes
from tokenguard.arithmetic import scale
from tokenguard.errors import TableFull

SIZES = (1_000, 100_000, 1_000_000)
LIVE = scale(10**9, Fraction(1, 1000), 10**9)
BATCH, BATCHES = 1_000, 100
SHARES = (0.5, 0.99, 0.999, 1)
COSTS, DELTAS = (900,) * SCOPES, (-400,) * SCOPES


def main():
    """Print what there is to know, each size and each fullness in a process of its own."""
    print(f"{'live buckets':<44}{'region, MB':>12}{'in use, MB':>12}{'bytes a bucket':>16}")
    for size in SIZES:
        (grown,) = crew(lambda _, size=size: memory(size), 1, limit_s=600)
        region = region_bytes(size)
        print(f"{size:<44,}{region / 1e6:>12,.1f}{grown / 1e6:>12,.1f}{grown / size:>16,.0f}")
    print(f"\n{'µs':<44}{'median':>10}{'p99':>10}{'p99.9':>10}{'most':>10}")
    for work in (calls, newcomers):
        for size in SIZES if work is calls else SIZES[-1:]:
            crew(lambda _, work=work, size=size: work(size), 1, limit_s=600)


def memory(size):
    """Fill a table; return by how many bytes the process has grown."""
    before = resident()
    table = BucketTable(size)
    fill(table, size)
    assert table.stats()["used"] == size
    return resident() - before


def resident():
    """Return the bytes of memory that this process has in use."""
    gc.collect()
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def fill(table, size, ample_each=None):
    """Bring the buckets of so many users into being, live; one of ``ample_each`` is full again at once."""
    for first in range(0, size, MAX_PLAN):
        users = range(first, min(first + MAX_PLAN, size))
        handle = table.prepare(
            (path(user)[-1], AMPLE if ample_each and user % ample_each == 0 else LIVE) for user in users
        )
        assert table.reserve(handle, (1_000,) * len(users)).allowed


def plan(user):
    """Return five scopes of a user, whose own bucket is live."""
    *above, own = path(user)
    return [*((key, AMPLE) for key in above), (own, LIVE)]


def calls(size):
    """Print what a call of somebody among so many takes: its plan is new, or made ready before."""
    table = BucketTable(size + 100)
    fill(table, size)
    rng = random.Random(size)
    ready_ns, made_ns = [], []
    for number in range(BATCHES):
        users = rng.choices(range(size), k=BATCH)
        handles = [table.prepare(plan(user)) for user in users] if number % 2 else [None] * BATCH
        for user, prepared in zip(users, handles, strict=True):
            began_ns = time.perf_counter_ns()
            handle = prepared or table.prepare(plan(user))
            table.reserve(handle, COSTS)
            table.settle(handle, DELTAS)
            (ready_ns if prepared else made_ns).append(time.perf_counter_ns() - began_ns)
    tell(f"reserve + settle among {size:,}", ready_ns)
    tell(f"prepare + reserve + settle among {size:,}", made_ns)


def newcomers(size):
    """Print what newcomers take where all buckets are live, where a few are full again, and where all are."""
    for ample_each, what in ((None, "no bucket is full"), (100, "one in 100 is full"), (1, "all are full")):
        table = BucketTable(size)
        fill(table, size, ample_each)
        admitted_ns, refused_ns = [], []
        for number in range(10):
            users = range(size + number * BATCH, size + (number + 1) * BATCH)
            for handle in [table.prepare([(path(user)[-1], LIVE)]) for user in users]:
                began_ns = time.perf_counter_ns()
                try:
                    table.reserve(handle, (1_000,))
                except TableFull:
                    refused_ns.append(time.perf_counter_ns() - began_ns)
                else:
                    admitted_ns.append(time.perf_counter_ns() - began_ns)
        tell(f"newcomer admitted, {what}", admitted_ns)
        tell(f"newcomer refused, {what}", refused_ns)


def tell(what, took_ns):
    """Print a row, if there was anything."""
    took_ns.sort()
    shares = [took_ns[min(len(took_ns) - 1, int(len(took_ns) * share))] / 1e3 for share in SHARES if took_ns]
    if shares:
        print(f"{what:<44}" + "".join(f"{us:>10,.2f}" for us in shares), flush=True)


if __name__ == "__main__":
    main()
