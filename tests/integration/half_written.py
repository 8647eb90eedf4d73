"""What the first reader finds after a process was killed in the midst of a change.

Run, with a test build: python -m tests.variants CORE tests.integration.half_written state|peek|dump
For each point at which the process can be killed, it prints a line: how often the reader had to repair the table,
and whether it found what was there before the change, after it, or neither.
"""

import ctypes
import signal
import sys
from fractions import Fraction

from tests.buckets import TEN, at, table_of
from tests.crew import Worker
from tests.oracle import Terms
from tests.strategies import START_US, scale_of
from tokenguard import _bucket

PLAN = ((b"a", TEN), (b"b", TEN))
OTHER = scale_of(Terms(700, Fraction(3), 40))
READERS = {
    "state": lambda table, _: table.state(b"a"),
    "peek": lambda table, handle: table.peek(handle, at(3)).level(0),
    "dump": lambda table, _: table.dump(0, 1, at(3)),
}
core = ctypes.PyDLL(_bucket.__file__)


def change(table):
    """Change the first bucket from one scale and level to others."""
    table.configure(b"a", OTHER, level=650, now_us=at(3))


def killed(table, point):
    """Let a process change the table and be killed at a point; return whether there was such a point."""

    def work():
        ctypes.c_int64.in_dll(core, "tg_points").value = point
        change(table)

    with Worker(work) as worker:
        worker.go()
        return worker.wait() == -signal.SIGKILL


def prepared_table():
    table, handle = table_of(*PLAN)
    table.reserve(handle, (7, 3), START_US)
    return table, handle


def main(reader):
    """Kill at each point, read, tell."""
    read = READERS[reader]
    table, handle = prepared_table()
    before = read(table, handle)
    change(table)
    after = read(table, handle)
    assert before != after
    for point in range(1, 1_000):
        table, handle = prepared_table()
        if not killed(table, point):
            break
        found = read(table, handle)
        print(table.stats()["repaired"], {before: "before", after: "after"}.get(found, "neither"))


if __name__ == "__main__":
    main(sys.argv[1])
