"""Many calls in one script come to what they come to one by one; a batch sent twice or late does nothing."""

from fractions import Fraction
from itertools import cycle
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import RedisTable, found, peek_of, reserve_of, settle_of
from tests.oracle import Terms
from tests.redis_servers import RedisServer
from tests.strategies import (
    LATEST_US,
    START_US,
    S,
    amount,
    budgets,
    pauses_us,
    properties,
    scale_of,
    shares,
)
from tokenguard._bucket import MAX_PLAN, Outcome
from tokenguard.backends.batch import MAX_CALLS, STALE

KEYS = tuple(b"%d" % i for i in range(MAX_PLAN + 4))
SLOW = Terms(10**12, Fraction(1, 4096))
"""Its ticks last a second."""
VERSIONS = 3
"""Of every budget, so that calls of one batch may find it under different ones."""


@pytest.fixture(scope="module")
def client():
    """A client of a Redis of these tests' own."""
    with RedisServer() as server, server.client(decode_responses=False) as client:
        yield client


# --- one by one ---------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A call as it is drawn: for ``count`` buckets from ``first`` on, under a version of their budgets."""

    kind: str
    version: int
    first: int
    count: int
    parts: list[int | Fraction]


calls = st.builds(
    Drawn,
    kind=st.sampled_from(["reserve", "reserve", "settle", "refund", "peek"]),
    version=st.integers(0, VERSIONS - 1),
    first=st.one_of(st.integers(0, 2), st.integers(0, len(KEYS) - 1)),
    count=st.one_of(st.integers(1, 4), st.integers(1, MAX_PLAN)),
    parts=st.lists(shares, min_size=1, max_size=4),
)
changes = st.tuples(st.sampled_from(KEYS[:3]), st.integers(0, VERSIONS - 1))
steps_us = st.one_of(st.just(0), pauses_us, st.integers(-3 * S, 0), st.integers(-2 * S, -S))
terms = st.one_of(budgets(), st.just(SLOW))
befores = st.lists(st.tuples(steps_us, st.one_of(calls, calls, changes)), max_size=6)


class Side:
    """A table, and the three versions of the budgets of its buckets."""

    def __init__(self, client, versions):
        self.table = RedisTable(client)
        self.versions = versions

    def terms(self, key, version):
        return self.versions[version][int(key) % 3]

    def call(self, drawn, epoch=None):
        """Return a call that is as drawn."""
        numbers = range(drawn.first, drawn.first + drawn.count)
        plan = [(key, self.terms(key, drawn.version)) for key in (KEYS[i % len(KEYS)] for i in numbers)]
        handle = self.table.prepare([(key, scale_of(terms)) for key, terms in plan], epoch)
        amounts = tuple(amount(part, terms) for (_, terms), part in zip(plan, cycle(drawn.parts), strict=False))
        if drawn.kind == "peek":
            return peek_of(handle)
        if drawn.kind == "reserve":
            return reserve_of(handle, amounts)
        return settle_of(handle, amounts if drawn.kind == "settle" else tuple(-each for each in amounts))

    def do(self, step, now_us):
        """Do one thing by itself."""
        if isinstance(step, Drawn):
            self.table.batch([self.call(step)], now_us)
        else:
            key, version = step
            self.table.configure(key, scale_of(self.terms(key, version)), None, now_us)

    def left(self):
        """Return all that is stored and counted."""
        return {key: (self.table.state(key), self.table.debt(key)) for key in KEYS}, self.table.stats()


def told(results):
    """Return results as values that can be compared."""
    return [found(result) if isinstance(result, Outcome) else result for result in results]


@settings(properties, max_examples=500)
@given(
    versions=st.lists(st.lists(terms, min_size=3, max_size=3), min_size=VERSIONS, max_size=VERSIONS),
    before=befores,
    batch=st.lists(calls, min_size=1, max_size=MAX_CALLS),
    step_us=steps_us,
    stale=st.sampled_from([False, False, True]),
)
def test_batch_comes_to_what_its_calls_come_to_one_by_one(client, versions, before, batch, step_us, stale):
    """Whatever the buckets went through, one script of many calls answers and stores what many scripts do."""
    sides = Side(client, versions), Side(client, versions)
    now_us, results = START_US, []

    for pause_us, step in before:
        now_us = min(LATEST_US, now_us + pause_us)
        for side in sides:
            side.do(step, now_us)
    now_us = min(LATEST_US, now_us + step_us)
    import collections
    C = globals().setdefault("COUNT", collections.Counter())
    C["all"]+=1
    C["batchlen"]+=len(batch)
    C["before"]+=len(before)
    C["keys"]+=len({b.first for b in batch})
    for k in KEYS:
        st_ = sides[1].table.state(k)
        if st_:
            C["stored"] += 1
            if st_[5]==10**6:
                C["slow"] += 1
                if (st_[1]-2)*10**6 < now_us <= (st_[1]-1)*10**6:
                    C["window"] += 1
                    n = sum(1 for b in batch if int(k) in [(b.first+j)%36 for j in range(b.count)] and b.kind in("reserve",) )
                    C["window ops"] += n
                    if n>=2 and not stale: C["window n>=2"]+=1
    for side in sides:
        epoch = side.table.epoch
        if stale:
            side.table.expire_handles()
        asked = [side.call(drawn, epoch) for drawn in batch]
        together = [asked] if side is sides[0] else [[call] for call in asked]
        results.append([result for some in together for result in told(side.table.batch(some, now_us))])

    assert results[0] == results[1]
    assert any(result is STALE for result in results[0]) == (stale and any(d.kind == "reserve" for d in batch))
    assert sides[0].left() == sides[1].left()
    for side in sides:
        side.table.forget()

def test_count():
    print(COUNT)
    assert 0
