"""Readers that take no lock, beside writers: they never see half a change, and never hold anybody up."""

import hashlib
import random
import struct
import subprocess
import time
from collections import Counter
from itertools import count, islice
from typing import NamedTuple

import pytest

from tests.crew import Worker, crew, pause_soon
from tests.strategies import START_US, S
from tests.variants import ROOT, command
from tokenguard._bucket import MAX_PLAN, BucketTable
from tokenguard.arithmetic import TICKS_US
from tokenguard.model import Scale

SECONDS = 1.5
LEAST_CHANGES = 2_000
KEYS = [b"key-%d" % number for number in range(MAX_PLAN)]
MOST_USED = 1_000
SLOT = struct.Struct("=QIHHqqqqqq")
"""A bucket as ``dump`` returns it: two parts of its fingerprint, 0, the tick's number, level, tick, scale."""


class Look(NamedTuple):
    """One of the looks that buckets are given: each of its fields says which, and so does its tick.

    No level under one look is a multiple of another's unit, and from one look's time to that of any later one a
    bucket is filled.
    """

    scale: Scale
    now_us: int

    def fits(self, level, tick, capacity, gain, unit, tick_us, debt=None):
        """Return whether fields are those of this look, with no more used than may be."""
        scale = Scale(capacity, self.scale.debt if debt is None else debt, gain, unit, tick_us)
        is_whole = level % unit == 0 and self.has(level // unit)
        return is_whole and scale == self.scale and tick == self.now_us // tick_us

    def has(self, tokens):
        """Return whether a level is one that this look may have: a token is taken with every change."""
        return tokens in range(self.scale.capacity - MOST_USED, self.scale.capacity)


LOOKS = [
    Look(Scale(10_000 * i, 100 * i, 10**7 + i, unit, 10**i), START_US + 100 * S * i)
    for i, unit in enumerate((1_000_003, 1_000_033, 1_000_037, 1_000_039), 1)
]


def table_of_looks():
    table = BucketTable(MAX_PLAN)
    take(table, plans_of(table)[0])
    return table


def plans_of(table):
    return [(look, table.prepare((key, look.scale) for key in KEYS)) for look in LOOKS]


def take(table, plan):
    """Take a token from every bucket, which gives each the plan's look."""
    look, handle = plan
    assert table.reserve(handle, (1,) * MAX_PLAN, look.now_us).allowed


def for_a_while(table):
    """Yield often, and pause here and there; until the time is over and much has changed."""
    until_s = time.monotonic() + SECONDS
    while time.monotonic() < until_s or table.turn < LEAST_CHANGES:
        pause_soon()
        yield from range(5)


def change_looks(table, seed):
    """Give the buckets one look after the other."""
    rng, plans = random.Random(seed), plans_of(table)
    for _ in for_a_while(table):
        take(table, rng.choice(plans))


class States:
    """Buckets as they are stored."""

    def __init__(self, table):
        self._table = table

    def read(self):
        """Return what is seen of each bucket."""
        return [self._table.state(key) for key in KEYS]

    @staticmethod
    def looks(fields):
        """Return the looks that what was seen fits."""
        return [look for look in LOOKS if look.fits(*fields)]


class Dumps(States):
    """Buckets as they are saved."""

    def read(self):
        records = self._table.dump(0, MAX_PLAN, now_us=0)
        return (records[at : at + SLOT.size] for at in range(0, MAX_PLAN * SLOT.size, SLOT.size))

    @staticmethod
    def looks(record):
        _, _, _, pace, level, tick, capacity, debt, gain, unit = SLOT.unpack(record)
        return States.looks((level, tick, capacity, gain, unit, TICKS_US[pace - 1], debt))


class Peeks(States):
    """Buckets as a call would find them."""

    def __init__(self, table):
        super().__init__(table)
        self._plans = plans_of(table)

    def read(self):
        look, handle = random.choice(self._plans)
        outcome = self._table.peek(handle, look.now_us)
        return ((look, outcome.level(i)) for i in range(MAX_PLAN))

    @staticmethod
    def looks(found):
        look, level = found
        return [look] if look.has(level) or level == look.scale.capacity else []


readers = pytest.mark.parametrize("reader", [States, Dumps, Peeks])


def read_much(table, reader):
    """Read for a while; return all that was seen."""
    seen, read = set(), reader(table).read
    for _ in for_a_while(table):
        seen.update(read())
    return seen


@readers
def test_reader_never_sees_half_a_change(reader):
    """While two processes change every field of buckets, whoever reads one finds fields that belong together."""
    table = table_of_looks()

    seen, *_ = crew(lambda number: change_looks(table, number) if number else read_much(table, reader), 3)

    looks = {thing: reader.looks(thing) for thing in seen}
    assert [thing for thing, fitting in looks.items() if not fitting] == []
    assert {look for fitting in looks.values() for look in fitting} == set(LOOKS)


@readers
def test_stopped_reader_holds_nobody_up(reader):
    """Wherever a reader is stopped, others go on: no call waits for it."""
    table = table_of_looks()
    plans, reads, read = plans_of(table), table.tally(b"reads"), reader(table).read

    def read_on():
        while True:
            read()
            reads.add()

    with Worker(read_on) as worker:
        worker.go()
        for _ in range(200):
            take_until_more(table, plans, b"reads")
            for plan in random.choices(plans, k=random.randrange(20)):
                take(table, plan)
            worker.stop()
            take(table, random.choice(plans))
            worker.resume()


def take_until_more(table, plans, name):
    """Take until somebody else has counted on."""
    before = table.tallies()[name]
    for _ in range(1_000_000):
        if table.tallies()[name] != before:
            return
        take(table, random.choice(plans))
    raise AssertionError(f"nobody counted {name}")


# --- the index ----------------------------------------------------------------------------------------------

SEED = b"the same each time"
BUCKETS = 8


def of_chain(number):
    """Yield keys that the index of so few buckets has in one chain."""
    for i in count():
        key = b"key-%d" % i
        if hashlib.blake2b(key, digest_size=12, key=SEED).digest()[0] % BUCKETS == number:
            yield key


STAYS, *NEIGHBOURS = islice(of_chain(0), 4)
OTHERS = [*NEIGHBOURS, *islice(of_chain(1), 4)]


def come(table, key):
    """Put a bucket there with a level of 1."""
    table.configure(key, Scale(capacity_of(key), 0, 0, 1, 1), level=1, now_us=START_US)


def capacity_of(key):
    """Return the capacity that no other key has."""
    return 7 + [STAYS, *OTHERS].index(key)


def churn(table, seed):
    """Let buckets of two chains come and go, and have each other's slots."""
    rng = random.Random(seed)
    for _ in for_a_while(table):
        come(table, rng.choice(OTHERS))
        table.remove(rng.choice(OTHERS))


class Chain:
    """The bucket that stays, and one that may be new or gone."""

    def __init__(self, table):
        self._table = table

    def read(self):
        other = random.choice(NEIGHBOURS)
        return (True, self._level(STAYS)), (False, self._level(other))

    def _level(self, key):
        """Return a bucket's level; "full" if it is or is not there, for it comes full."""
        fields, capacity = self._table.state(key), capacity_of(key)
        level = capacity if fields is None else fields[0]
        assert fields in (None, (level, START_US, capacity, 0, 1, 1))
        return "full" if level == capacity else level


def test_reader_finds_a_bucket_whose_neighbours_come_and_go():
    """While others come and go, one that stays is found, and none is taken for another."""
    table = BucketTable(BUCKETS, seed=SEED)
    come(table, STAYS)

    seen, *_ = crew(lambda number: churn(table, number) if number else read_much(table, Chain), 3)

    assert seen == {(True, 1), (False, "full"), (False, 1)}


# --- a writer that died -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["state", "peek", "dump"])
def test_reader_after_a_killed_writer_finds_a_whole_bucket(test_core, reader):
    """It does not wait for what is half written: it takes the lock, and finds what was there before."""
    asked = command(test_core, "tests.integration.half_written", reader)

    found = Counter(subprocess.check_output(asked, cwd=ROOT, text=True, timeout=60).splitlines())

    assert found.keys() == {"0 before", "1 before", "0 after"}
    assert found["1 before"] >= 10, "it should have been half written from its first field to its last"
