"""A table that is full: what makes room, and what never does; and many threads at once."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from tests.buckets import GRANT, TEN, at, states, table_of
from tests.oracle import Terms
from tests.strategies import START_US, prepared, scale_of, seen
from tokenguard._bucket import BucketTable
from tokenguard.errors import StaleHandle, TableFull

# --- room ---------------------------------------------------------------------------------------------------


def test_table_full_charges_nothing():
    """A call that needs one bucket more than there is room for leaves all others as they were."""
    table, handle = table_of((b"a", TEN), (b"b", TEN), buckets=2)
    table.reserve(handle, (5, 5), START_US)
    crowded = prepared(table, ((b"a", TEN), (b"new", TEN), (b"b", TEN)))

    with pytest.raises(TableFull, match="all 2 buckets are in use, none of them full"):
        table.reserve(crowded, (1, 1, 1), START_US)

    assert seen(table.peek(crowded, START_US)).levels == (5, 10, 5)
    assert table.stats()["refused_full"] == 1


def test_table_full_refuses_no_call_that_needs_no_room():
    """Who already has his buckets, or asks nothing of the new one, passes."""
    table, handle = table_of((b"a", TEN), buckets=1)
    table.reserve(handle, (5,), START_US)

    assert table.reserve(handle, (5,), START_US).allowed
    assert table.reserve(prepared(table, ((b"a", TEN), (b"new", TEN))), (0, 0), START_US).allowed


def test_full_bucket_makes_room():
    """A bucket that is full again is dropped for a new one, and nobody can tell."""
    table, handle = table_of((b"a", TEN), buckets=1)
    table.reserve(handle, (10,), START_US)
    other = prepared(table, ((b"b", TEN),))

    with pytest.raises(TableFull):
        table.reserve(other, (1,), at(5) - 1)
    assert table.reserve(other, (1,), at(5)).allowed

    assert table.state(b"a") is None
    assert table.peek(handle, at(5)).level(0) == 10
    assert table.stats()["reclaimed"] == 1


def test_drained_bucket_is_never_dropped():
    """However many new ones ask for room, a bucket in use keeps its level; a fixed grant waits for ever."""
    table, handle = table_of((b"grant", GRANT), (b"slow", Terms(10, Fraction(1, 1000))), buckets=3)
    table.reserve(handle, (1, 10), START_US)

    for i in range(200):
        assert table.reserve(prepared(table, ((b"%d" % i, TEN),)), (1,), at(i)).allowed

    assert seen(table.peek(handle, at(199))).levels == (9, 0)
    assert table.stats()["reclaimed"] == 199


def test_search_for_room_goes_on_where_it_stopped():
    """In a large table one call looks at a part of it only, but a few calls find the one bucket that is full."""
    table, handle = table_of((b"returned", GRANT), buckets=500)
    table.reserve(handle, (1,), START_US)
    for i in range(499):
        table.reserve(prepared(table, ((b"%d" % i, GRANT),)), (1,), START_US)
    first = prepared(table, ((b"first", GRANT),))
    for _ in range(4):
        with pytest.raises(TableFull):
            table.reserve(first, (1,), START_US)

    table.settle(handle, (-1,), START_US)

    def finds_room():
        try:
            return table.reserve(first, (1,), START_US).allowed
        except TableFull:
            return False

    assert any(finds_room() for _ in range(4))
    assert table.state(b"returned") is None


def test_room_is_never_made_of_a_bucket_of_the_same_call():
    """A call's own buckets, full as they are, stay in place while its new ones come into being."""
    table, handle = table_of((b"a", TEN), (b"b", TEN), buckets=2)
    table.reserve(handle, (1, 1), START_US)
    three = prepared(table, ((b"a", TEN), (b"b", TEN), (b"c", TEN)))

    with pytest.raises(TableFull):
        table.reserve(three, (2, 2, 2), at(60))
    assert table.reserve(prepared(table, ((b"b", TEN), (b"c", TEN))), (2, 3), at(60)).allowed

    assert states(table, b"a") == [None]
    assert seen(table.peek(three, at(60))).levels == (10, 8, 7)


def test_settle_without_room_forgives():
    """An overage whose bucket was dropped and finds no room is counted, not lost."""
    table, handle = table_of((b"a", TEN), buckets=1)
    table.reserve(prepared(table, ((b"b", TEN),)), (1,), START_US)

    assert table.settle(handle, (7,), START_US) == 7
    assert table.stats()["forgiven"] == 7


def test_level_without_room_is_refused_and_changes_no_budget():
    """A budget set with a level for which there is no room is not set by half."""
    table, handle = table_of((b"a", TEN), buckets=1)
    table.reserve(handle, (1,), START_US)

    with pytest.raises(TableFull):
        table.configure(b"b", scale_of(TEN), 3, START_US)

    assert table.epoch == handle.epoch


def test_reclaim_is_unobservable_to_a_settle_under_a_stale_handle():
    """Overage is charged alike, whether the full bucket was dropped meanwhile or not, whatever else changed."""
    charged = []
    for crowd in (0, 1):
        table, handle = table_of((b"a", TEN), buckets=1)
        table.reserve(handle, (1,), START_US)
        if crowd:
            other = prepared(table, ((b"crowd", TEN),))
            table.reserve(other, (1,), at(60))
            assert table.state(b"a") is None
            table.remove(b"crowd")
        table.configure(b"somebody else", scale_of(GRANT), now_us=at(60))

        charged.append((table.settle(handle, (7,), at(60)), table.peek(handle, at(60)).level(0)))

    assert charged[0] == charged[1] == (0, 3)


def test_reclaim_waits_for_a_frozen_clock():
    """A bucket that is full, but has been refilled beyond the present, is not taken for a new one."""
    table, handle = table_of((b"a", TEN), buckets=1)
    table.reserve(handle, (1,), START_US)
    table.settle(handle, (-1,), START_US)

    with pytest.raises(TableFull):
        table.reserve(prepared(table, ((b"b", TEN),)), (1,), START_US - 900_000)


@pytest.mark.parametrize("buckets", [1, 2, 5, 64, 1000])
def test_index_keeps_every_bucket_through_many_inserts_and_removals(buckets):
    """After thousands of keys came and went in a small table, it holds what a dict would."""
    rng = random.Random(buckets)
    table, kept = BucketTable(buckets, seed=b"%d" % buckets), {}
    keys = [b"user-%d" % i for i in range(4 * buckets + 500)]

    for _ in range(20_000):
        key = rng.choice(list(kept) if kept and rng.random() < 0.4 else keys)
        if rng.random() < 0.4:
            table.remove(key)
            kept.pop(key, None)
            continue
        handle = prepared(table, ((key, Terms(10**6, Fraction(0))),))
        if key in kept or len(kept) < buckets:
            assert table.reserve(handle, (1,), START_US).level(0) == kept.get(key, 10**6) - 1
            kept[key] = kept.get(key, 10**6) - 1
        else:
            with pytest.raises(TableFull):
                table.reserve(handle, (1,), START_US)

    assert {key: state[0] for key in keys if (state := table.state(key))} == kept
    assert table.stats()["used"] == len(kept)


def test_handle_follows_its_buckets_to_another_slot():
    """A handle that remembers where a bucket was finds it elsewhere, and takes no other for it."""
    table, handle = table_of((b"a", TEN), buckets=2)
    other = prepared(table, ((b"b", TEN),))
    table.reserve(handle, (1,), START_US)
    table.reserve(prepared(table, ((b"c", GRANT),)), (1,), START_US)

    table.reserve(other, (2,), at(60))
    assert table.state(b"a") is None
    assert table.peek(handle, at(60)).level(0) == 10
    table.reserve(handle, (3,), at(120))

    assert table.state(b"b") is None
    assert seen(table.peek(handle, at(120))).levels == (7,)
    assert seen(table.peek(other, at(120))).levels == (10,)


# --- threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def eager():
    """Let threads take turns after microseconds, not milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(count, work):
    """Run ``work(number)`` in as many threads, all started at one moment; return what each gave."""
    barrier = threading.Barrier(count)

    def start(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("calls", "cost"), [(8, 1), (8, 3), (16, 300), (16, 1000), (4, 1001)])
def test_threads_at_one_instant_are_admitted_as_far_as_it_goes(calls, cost):
    """Of k calls for n tokens each on a full bucket, exactly min(k, C // n) pass."""
    table, handle = table_of((b"a", Terms(1000, Fraction(5))), (b"b", Terms(2000, Fraction(5))))

    admitted = sum(together(calls, lambda _: table.reserve(handle, (cost, cost), START_US).allowed))

    assert admitted == min(calls, 1000 // cost)
    assert seen(table.peek(handle, START_US)).levels == (1000 - admitted * cost, 2000 - admitted * cost)


@pytest.mark.usefixtures("eager")
def test_threads_lose_no_token():
    """After many reserves and settles from many threads, the level is what their sum says."""
    table, shared = table_of((b"shared", Terms(10**9, Fraction(0))))
    rounds = 3_000

    def work(number):
        rng = random.Random(number)
        plan = ((b"shared", Terms(10**9, Fraction(0))), (b"own-%d" % number, Terms(10**6, Fraction(0), 10**6)))
        handle, spent = prepared(table, plan), 0
        for _ in range(rounds):
            cost, delta = rng.randrange(100), rng.randrange(-100, 100)
            if table.reserve(handle, (cost, cost), START_US).allowed:
                table.settle(handle, (max(delta, -cost),) * 2, START_US)
                spent += cost + max(delta, -cost)
        return spent, 10**6 - table.peek(handle, START_US).level(1)

    spent = together(4, work)

    assert all(mine == seen_in_bucket for mine, seen_in_bucket in spent)
    assert table.peek(shared, START_US).level(0) == 10**9 - sum(mine for mine, _ in spent)
    assert table.stats()["forgiven"] == 0


@pytest.mark.usefixtures("eager")
def test_threads_share_one_handle():
    """A handle may be used by many threads at once."""
    grant = Terms(10**6, Fraction(0))
    table, handle = table_of((b"a", grant), (b"b", grant), (b"c", grant))

    taken = sum(
        together(4, lambda _: sum(table.reserve(handle, (1, 1, 1), START_US).allowed for _ in range(3_000)))
    )

    assert taken == 4 * 3_000
    assert seen(table.peek(handle, START_US)).levels == (10**6 - taken,) * 3


@pytest.mark.usefixtures("eager")
def test_threads_and_changes_of_budgets_lose_no_token():
    """While one thread keeps changing budgets, a call of the others is charged whole or refused as stale."""
    grant = Terms(10**6, Fraction(0))
    table, _ = table_of()

    def work(number):
        taken = 0
        for _ in range(2_000):
            if number == 0:
                table.configure(b"somebody else", scale_of(TEN), now_us=START_US)
                continue
            handle = prepared(table, ((b"shared", grant),))
            try:
                taken += table.reserve(handle, (1,), START_US).allowed
            except StaleHandle:
                continue
        return taken

    taken = sum(together(4, work))

    assert 0 < taken == 10**6 - table.state(b"shared")[0]
