"""What a call takes if the table is a file that other processes map too, beside memory of this process's own.

README.md says what the rows mean.
"""

import pytest

from benchmarks.test_bench_bucket import AMPLE, SCOPES, measure, path
from tests.books import shared_file
from tokenguard._bucket import BucketTable

USERS = 1_000
COSTS, DELTAS = (900,) * SCOPES, (-400,) * SCOPES

pytestmark = pytest.mark.benchmark(group="five scopes, shared")


def measure_calls(benchmark, name, table):
    def work(handles):
        for handle in handles:
            table.reserve(handle, COSTS)
            table.settle(handle, DELTAS)

    handles = [table.prepare((key, AMPLE) for key in path(user)) for user in range(USERS)]
    measure(benchmark, name, work, handles)
    assert table.reserve(handles[0], COSTS).allowed


def test_memory_of_its_own(benchmark):
    measure_calls(benchmark, "baseline: reserve + settle, memory of its own", BucketTable(USERS + 100))


def test_shared_file(benchmark):
    with shared_file(USERS + 100) as fd:
        measure_calls(benchmark, "reserve + settle, a file in memory", BucketTable(USERS + 100, fd=fd))
