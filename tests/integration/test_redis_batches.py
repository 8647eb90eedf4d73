"""Many calls in one script come to what they come to one by one; a batch sent twice or late does nothing."""

from fractions import Fraction
from itertools import cycle
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.buckets import TEN, at
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
    prepared,
    properties,
    scale_of,
    shares,
)
from tokenguard._bucket import MAX_PLAN, Outcome
from tokenguard.backends.batch import MAX_CALLS, STALE, Reply

KEYS = tuple(b"%d" % i for i in range(MAX_PLAN + 4))
SLOW = Terms(10**12, Fraction(1, 4096), 10)
"""Its ticks last a second."""
RAISED = Terms(20, Fraction(1), 20)
VERSIONS = 3
"""Of every budget, so that calls of one batch may find it under different ones."""


@pytest.fixture(scope="module")
def client():
    """A client of a Redis of these tests' own."""
    with RedisServer() as server, server.client(decode_responses=False) as client:
        yield client


def table_of(client, *budgets):
    """Return a table, and its handle of a plan of buckets b"0", b"1" and so on."""
    table = RedisTable(client)
    return table, prepared(table, tuple((b"%d" % i, terms) for i, terms in enumerate(budgets)))


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
    first=st.one_of(st.sampled_from([0, 0, 1, 2]), st.integers(0, len(KEYS) - 1)),
    count=st.one_of(st.sampled_from([1, 1, 2, 3]), st.integers(1, MAX_PLAN)),
    parts=st.lists(shares, min_size=1, max_size=4),
)
batches = st.sampled_from([1, 2, 3, 5, 8, 13, 21, MAX_CALLS]).flatmap(
    lambda size: st.lists(calls, min_size=size, max_size=size)
)
changes = st.tuples(st.sampled_from(KEYS[:3]), st.integers(0, VERSIONS - 1))
steps_us = st.one_of(st.just(0), pauses_us, st.integers(-3 * S, 0), st.integers(-2 * S, -S))
three = st.lists(st.one_of(budgets(), st.just(SLOW)), min_size=3, max_size=3)
befores = st.lists(st.tuples(steps_us, st.one_of(calls, calls, changes)), max_size=6)


class Side:
    """A table, and the versions of its budgets, of which every third bucket has the same."""

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

    def live(self, steps):
        """Do one thing after the other, each some time after the one before; return when it was."""
        now_us = START_US
        for pause_us, step in steps:
            now_us = min(LATEST_US, now_us + pause_us)
            if isinstance(step, Drawn):
                self.table.batch([self.call(step)], now_us)
            else:
                key, version = step
                self.table.configure(key, scale_of(self.terms(key, version)), None, now_us)
        return now_us

    def left(self):
        """Return all that is stored and counted."""
        return {key: (self.table.state(key), self.table.debt(key)) for key in KEYS}, self.table.stats()


def told(results):
    """Return results as values that can be compared."""
    return [found(result) if isinstance(result, Outcome) else result for result in results]


@settings(properties, max_examples=60)
@given(
    versions=st.lists(three, min_size=VERSIONS, max_size=VERSIONS),
    before=befores,
    batch=batches,
    step_us=steps_us,
    stale=st.sampled_from([False, False, True]),
)
def test_batch_comes_to_what_its_calls_come_to_one_by_one(client, versions, before, batch, step_us, stale):
    """Whatever the buckets went through, one script of many calls answers and stores what many scripts do."""
    together, apart = Side(client, versions), Side(client, versions)
    results = []

    for side in together, apart:
        now_us = min(LATEST_US, side.live(before) + step_us)
        epoch = side.table.epoch
        if stale:
            side.table.expire_handles()
        asked = [side.call(drawn, epoch) for drawn in batch]
        scripts = [asked] if side is together else [[call] for call in asked]
        results.append([result for some in scripts for result in told(side.table.batch(some, now_us))])

    assert results[0] == results[1]
    assert (STALE in results[0]) == (stale and any(drawn.kind == "reserve" for drawn in batch))
    assert together.left() == apart.left()
    for side in together, apart:
        side.table.forget()


def test_old_plan_is_settled_beside_a_new_one_that_reserves(client):
    """After a change of budget, a settlement by the old plan and a reserve by the new one meet in one bucket."""
    table, old = table_of(client, TEN)
    table.reserve(old, (10,), START_US)
    table.configure(b"0", scale_of(RAISED), None, START_US)
    new = prepared(table, ((b"0", RAISED),))

    refused, forgiven, allowed = table.batch(
        [reserve_of(new, (11,)), settle_of(old, (-4,)), reserve_of(new, (11,))], START_US
    )

    assert (refused.allowed, refused.level(0), refused.retry_after_us) == (False, 10, S)
    assert forgiven == 0
    assert (allowed.allowed, allowed.level(0)) == (True, 3)
    assert table.state(b"0")[:3] == (3 * 10**6, START_US, 20)


def test_clock_step_that_a_conversion_brings_to_light_is_met_by_the_next_call(client):
    """A clock frozen under ticks of a second has stepped back far under ticks of a µs, in a batch, too."""
    (together, old), (apart, same) = table_of(client, SLOW), table_of(client, SLOW)
    for table, handle in (together, old), (apart, same):
        table.reserve(handle, (1,), START_US)

    calls = [[reserve_of(prepared(table, ((b"0", TEN),)), (1,))] * 2 for table in (together, apart)]
    together.batch(calls[0], at(-1.5))
    apart.batch(calls[1][:1], at(-1.5))
    apart.batch(calls[1][1:], at(-1.5))

    assert together.state(b"0") == apart.state(b"0")
    assert together.stats() == apart.stats()


def test_stale_reserve_takes_nothing_and_holds_nobody_up(client):
    """Under an old epoch no reserve is evaluated, and what stands beside it is."""
    table, handle = table_of(client, TEN, TEN)
    table.reserve(handle, (10, 10), START_US)
    table.expire_handles()

    results = table.batch(
        [reserve_of(handle, (1, 1)), settle_of(handle, (-4, 5)), reserve_of(handle, (0, 0)), peek_of(handle)],
        START_US,
    )

    assert results[:3] == [STALE, 0, STALE]
    assert found(results[3]).levels == (4, -5)


def test_largest_batch_is_evaluated(client):
    """As many calls as go into a batch, each of the longest plan, no two with a bucket in common."""
    table = RedisTable(client)
    plans = [tuple((b"%d-%d" % (i, j), TEN) for j in range(MAX_PLAN)) for i in range(MAX_CALLS)]
    costs = tuple(range(1, 9)) * (MAX_PLAN // 8)

    results = table.batch([reserve_of(prepared(table, plan), costs) for plan in plans], START_US)

    assert all(result.allowed for result in results)
    assert {found(result).levels for result in results} == {tuple(10 - cost for cost in costs)}
    assert table.stats()["used"] == MAX_CALLS * MAX_PLAN
    assert [table.state(key)[0] for key, _ in plans[-1]] == [(10 - cost) * 500_000 for cost in costs]


# --- twice and late -----------------------------------------------------------------------------------------


def test_recorded_batch_sent_again_does_nothing(client):
    """Who got no answer may send his settlements again: they are done once."""
    table, handle = table_of(client, TEN)
    table.reserve(handle, (8,), START_US)
    batch = [settle_of(handle, (-3,)), settle_of(handle, (25,))]

    first = table.send(batch, START_US, 5, recorded=True)
    left = table.state(b"0"), table.stats()
    again = table.send(batch, at(1), 5, recorded=True)

    assert (first.done, first.results) == (True, [0, 0])
    assert again == Reply(done=False)
    assert (table.state(b"0"), table.stats()) == left


@pytest.mark.parametrize("recorded", [True, False])
def test_batch_that_comes_late_does_nothing(client, recorded):
    """What was overtaken by a later batch on record is not done any more, whatever it asks."""
    table, handle = table_of(client, TEN)
    table.send([settle_of(handle, (2,))], START_US, 7, recorded=True)
    left = table.state(b"0")

    late = table.send([settle_of(handle, (3,)), reserve_of(handle, (1,))], at(1), 6, recorded=recorded)

    assert not late.done
    assert table.state(b"0") == left
    assert table.send([peek_of(handle)], START_US, 8).done


def test_late_batch_does_not_put_the_record_back(client):
    """After a late batch, the one on record still counts as done."""
    table, handle = table_of(client, TEN)
    batch = [settle_of(handle, (2,))]
    table.send(batch, START_US, 7, recorded=True)
    table.send(batch, START_US, 6, recorded=True)

    assert not table.send(batch, START_US, 7, recorded=True).done


def test_batch_that_is_not_recorded_leaves_the_record_as_it_is(client):
    """What is never sent twice needs no record, and writes none."""
    table, handle = table_of(client, TEN)
    table.send([settle_of(handle, (1,))], START_US, 3, recorded=True)
    table.send([reserve_of(handle, (1,))], START_US, 9)

    assert table.send([settle_of(handle, (1,))], START_US, 4, recorded=True).done
    assert table.peek(handle, START_US).level(0) == 7


def test_batch_without_calls_is_recorded(client):
    """A node that has nothing to settle learns that Redis can be written to."""
    table = RedisTable(client)

    assert table.send([], START_US, 1, recorded=True).done
    assert not table.send([], START_US, 1, recorded=True).done
