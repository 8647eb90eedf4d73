"""The log of changes: what one process adds to it, and rewrites, another is told."""

import mmap
import os
import random
import time

from tests.crew import Worker
from tokenguard._bucket import BucketTable

BUCKETS = 500_000
PADDING = b" " * 1_500_000
"""Makes records so long that there is time to rewrite the log while they are read."""
ADDED = 5
ROUNDS = 100
LIMIT_S = 20


def follow(table, calls, begun):
    """Read the log at each call, and say when; return after which records some were left out."""
    read_to, known, gaps = 0, -1, []
    for number in range(ROUNDS):
        os.read(calls, 1)
        begun[0] = number + 1
        read_to, is_whole, records = table.changes(read_to)
        told = [int(number) for number in records.split()]
        if not is_whole and told[:1] not in ([], [known + 1]):
            gaps.append(known)
        known = told[-1] if told else known
    return gaps


def let_pass(seconds):
    """Wait for so short a time that to sleep would take longer."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


def test_reader_is_told_that_the_log_was_rewritten_while_he_read():
    """Who is told only what was added is told all of it, even if another log took its place while he read."""
    table, begun = BucketTable(BUCKETS), memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    rng, (calls, caller) = random.Random(1), os.pipe()
    with os.fdopen(calls), os.fdopen(caller, "w"), Worker(lambda: follow(table, calls, begun), LIMIT_S) as reader:
        reader.go()
        until_s = time.monotonic() + LIMIT_S
        for number in range(ADDED * ROUNDS):
            table.configure(b"a", (10, 0, 0, 1, 1), record=b"%d" % number + PADDING)
            if number % ADDED == ADDED - 1:
                os.write(caller, b"!")
                while begun[0] * ADDED <= number:
                    assert time.monotonic() < until_s, "the reader does not get on"
                let_pass(rng.uniform(0, 1e-3))
                table.rewrite(b"%d " % number)

        assert reader.answer() == []
