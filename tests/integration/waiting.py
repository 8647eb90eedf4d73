"""Processes that wait for a table's lock while the one that has it is killed in the middle of an operation.

Run: python -m tests.variants CORE tests.integration.waiting FOLDER
It prints, as JSON, how many seconds after the kill each waiting process had done what it waited for, and how often
the table was repaired.
"""

import json
import mmap
import os
import signal
import sys
import time
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from tests.books import shared_file
from tests.crew import Worker
from tests.region import header_of
from tokenguard._bucket import MAX_PLAN, BucketTable, region_bytes
from tokenguard.arithmetic import scale

PLAN = [(b"%d" % number, scale(10**9, Fraction(0), 0)) for number in range(MAX_PLAN)]
WAITING = 2
CALLS = 10**7
LIMIT_S = 10
"""Until then everything must have come about; the processes are killed then."""


def hold(table):
    """Make long operations, one after another."""
    handle = table.prepare(PLAN)
    for _ in range(CALLS):
        table.reserve(handle, (1,) * MAX_PLAN)


def wait(table, number, about):
    """Say that the lock will be waited for, and wait for it; return when it was given back."""
    about[number] = 1
    table.expire_handles()
    return time.monotonic()


def stop_inside(holder, region):
    """Stop a process in the middle of an operation."""
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        turn = header_of(region).turn
        while header_of(region).turn == turn and time.monotonic() < until_s:
            pass  # it goes on
        holder.stop()
        if header_of(region).noted:
            return
        holder.resume()
    raise AssertionError("it was never stopped inside an operation")


def is_asleep(worker):
    return (Path("/proc") / str(worker.pid) / "stat").read_text().rpartition(")")[2].split()[0] == "S"


def until_they_wait(workers, about):
    """Look on until all have said that they will wait, and do."""
    until_s = time.monotonic() + LIMIT_S
    while not (all(about) and all(map(is_asleep, workers))):
        assert time.monotonic() < until_s, "they do not wait"


def main(folder):
    """Stop one inside an operation, have others wait for it, kill it; print how the others fare."""
    buckets = 2 * MAX_PLAN
    about = memoryview(mmap.mmap(-1, mmap.PAGESIZE))[:WAITING]
    with shared_file(buckets, folder) as fd, ExitStack() as workers:
        table = BucketTable(buckets, fd=fd)
        holder = workers.enter_context(Worker(lambda: hold(table), LIMIT_S))
        waiting = [
            workers.enter_context(Worker(lambda number=number: wait(table, number, about), LIMIT_S))
            for number in range(WAITING)
        ]
        holder.go()
        stop_inside(holder, mmap.mmap(fd, region_bytes(buckets)))
        for worker in waiting:
            worker.go()
        until_they_wait(waiting, about)

        killed_s = time.monotonic()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()

        took_s = [worker.answer() - killed_s for worker in waiting]
        print(json.dumps({"took_s": took_s, "repaired": table.stats()["repaired"]}))


if __name__ == "__main__":
    main(sys.argv[1])
