"""What the table decides: one bucket as a table of rows, many buckets all or nothing, settling."""

import importlib.machinery
from fractions import Fraction

import pytest

from tests.buckets import GRANT, TEN, at, states, table_of
from tests.cases import CASES, walk
from tests.engines import OracleEngine
from tests.oracle import NEVER_US, Terms
from tests.strategies import START_US, S, prepared, seen, verdict
from tokenguard import _bucket
from tokenguard._bucket import BucketTable


@pytest.mark.parametrize("engine", [OracleEngine, lambda: BucketTable(4)], ids=["oracle", "table"])
@pytest.mark.parametrize("sentence", CASES)
def test_one_bucket(sentence, engine):
    """Each table of rows reads as the sentence above it."""
    walk(engine(), sentence)


# --- all or nothing -----------------------------------------------------------------------------------------


def test_compiled_module_is_the_one_in_use():
    """The table comes from an extension, not from Python text."""
    assert _bucket.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def test_allowed_call_lowers_every_bucket_by_its_cost():
    """Each bucket is charged what the call asked of it, and no other."""
    table, handle = table_of((b"team", TEN), (b"user", TEN), (b"calls", GRANT))

    outcome = table.reserve(handle, (4, 3, 1), START_US)

    assert verdict(outcome) == (True, -1, 0)
    assert seen(outcome).levels == (6, 7, 9)
    assert seen(outcome).costs == (4, 3, 1)
    assert seen(table.peek(handle, START_US)).levels == (6, 7, 9)


@pytest.mark.parametrize("short", [0, 1, 2])
def test_refusal_changes_no_bucket(short):
    """Wherever in the plan the short bucket stands, the stored state of all stays as it was."""
    keys = (b"team", b"user", b"calls")
    table, handle = table_of(*((key, TEN) for key in keys))
    table.reserve(handle, (3, 3, 3), START_US)
    before = states(table, *keys)

    outcome = table.reserve(handle, tuple(9 if i == short else 1 for i in range(3)), START_US + 1)

    assert not outcome.allowed
    assert outcome.binding == short
    assert states(table, *keys) == before
    assert table.stats()["used"] == 3


def test_refusal_creates_no_bucket():
    """Buckets that a refused call would have charged first do not come into being."""
    table, handle = table_of((b"team", TEN), (b"user", TEN))

    assert not table.reserve(handle, (1, 11), START_US).allowed

    assert states(table, b"team", b"user") == [None, None]
    assert table.stats()["used"] == 0


def test_plan_without_buckets_always_passes():
    """A caller whom no budget limits is let through."""
    table, handle = table_of()

    outcome = table.reserve(handle, (), START_US)

    assert verdict(outcome) == (True, -1, 0)
    assert len(handle) == len(outcome) == 0
    assert table.settle(handle, (), START_US) == 0


def test_longest_wait_binds():
    """Of several short buckets the one with the longest wait is named, and every wait is told."""
    table, handle = table_of((b"a", TEN), (b"b", Terms(10, Fraction(1))), (b"c", Terms(10, Fraction(4))))
    table.reserve(handle, (10, 10, 10), START_US)

    outcome = table.reserve(handle, (1, 1, 1), START_US)

    assert verdict(outcome) == (False, 1, S)
    assert seen(outcome).waits_us == (S // 2, S, S // 4)


def test_first_of_equal_waits_binds():
    """Where two buckets are short for equally long, the one further up is named."""
    table, handle = table_of((b"a", GRANT), (b"b", TEN), (b"c", TEN))
    table.reserve(handle, (0, 10, 10), START_US)

    assert verdict(table.reserve(handle, (1, 1, 1), START_US)) == (False, 1, S // 2)


def test_never_binds_before_any_wait():
    """A bucket that can never pass the call is named, however long the others take."""
    table, handle = table_of((b"a", Terms(10, Fraction(1, 10**6))), (b"b", GRANT), (b"c", GRANT))
    table.reserve(handle, (10, 10, 0), START_US)

    outcome = table.reserve(handle, (10, 1, 11), START_US)

    assert verdict(outcome) == (False, 1, NEVER_US)
    assert seen(outcome).waits_us == (10**13, NEVER_US, NEVER_US)


def test_wait_beyond_all_measure_is_never():
    """A wait of more than 31 years is told as never."""
    table, handle = table_of((b"slow", Terms(2000, Fraction(1, 10**6))))
    table.reserve(handle, (2000,), START_US)

    assert table.reserve(handle, (999,), START_US).retry_after_us == 999 * 10**12
    assert table.reserve(handle, (1000,), START_US).retry_after_us == NEVER_US
    assert table.peek(handle, START_US).full_in_us(0) == NEVER_US


@pytest.mark.parametrize("rate", [Fraction(5), Fraction(50, 3), Fraction(166_667, 10_000), Fraction(1, 7)])
def test_exactly_at_retry_after_it_passes_and_a_microsecond_earlier_it_does_not(rate):
    """The wait is neither a tick too long nor one too short."""
    table, handle = table_of((b"one", Terms(1000, rate, 10_000)))
    table.reserve(handle, (1000,), START_US)
    table.settle(handle, (77,), START_US + 1)

    wait_us = table.reserve(handle, (13,), START_US + 5).retry_after_us

    assert not table.reserve(handle, (13,), START_US + 5 + wait_us - 1).allowed
    assert table.reserve(handle, (13,), START_US + 5 + wait_us).allowed


def test_full_in_counts_from_what_the_call_left():
    """After a reserve, the time to full includes what was just taken."""
    table, handle = table_of((b"a", TEN), (b"b", GRANT))

    outcome = table.reserve(handle, (4, 1), START_US)

    assert seen(outcome).full_in_us == (2 * S, NEVER_US)
    assert table.peek(handle, at(2) - 1).full_in_us(0) == 1
    assert table.peek(handle, at(2)).full_in_us(0) == 0


def test_call_that_costs_nothing_creates_nothing():
    """A bucket of which nothing is asked is neither made nor written."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))
    table.reserve(handle, (1, 0), START_US)
    before = table.state(b"a")

    assert table.reserve(handle, (0, 0), at(1)).allowed

    assert states(table, b"a", b"b") == [before, None]


# --- settling -----------------------------------------------------------------------------------------------


def test_settle_corrects_each_bucket_by_its_own_delta():
    """Overage, refund and nothing may fall to the buckets of one call."""
    table, handle = table_of((b"a", TEN), (b"b", TEN), (b"c", TEN))
    table.reserve(handle, (5, 5, 5), START_US)

    assert table.settle(handle, (6, -2, 0), START_US) == 0

    assert seen(table.peek(handle, START_US)).levels == (-1, 7, 5)


def test_what_falls_below_the_floor_is_forgiven_and_counted():
    """Settle returns what no bucket could bear, summed over the plan, and the table adds it up."""
    table, handle = table_of((b"a", TEN), (b"b", GRANT))
    table.reserve(handle, (10, 10), START_US)

    assert table.settle(handle, (25, 3), START_US) == 5 + 3
    assert table.settle(handle, (1, -1), START_US) == 1

    assert seen(table.peek(handle, START_US)).levels == (-20, 1)
    assert table.stats()["forgiven"] == 9


def test_part_of_a_token_forgiven_counts_as_one():
    """What is forgiven is rounded up."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)

    assert table.settle(handle, (21,), START_US + S // 4) == 1


def test_delta_of_nothing_writes_nothing():
    """To settle at what was reserved is no write at all."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)
    before = table.state(b"a")

    table.settle(handle, (0,), at(3))

    assert table.state(b"a") == before


def test_any_delta_leaves_the_level_in_bounds():
    """The largest numbers that fit are clamped, not multiplied."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (1,), START_US)

    assert table.settle(handle, (2**63 - 1,), START_US) > 2**52
    assert table.peek(handle, START_US).level(0) == -20
    assert table.settle(handle, (-(2**63),), START_US) == 0
    assert table.peek(handle, START_US).level(0) == 10


def test_what_many_buckets_forgive_never_adds_up_to_less_than_what_one_does():
    """However much is forgiven, the sum and the counter do not wrap around."""
    table, one = table_of((b"a", TEN))
    many = prepared(table, tuple((b"%d" % i, TEN) for i in range(4)))

    by_one = table.settle(one, (2**63 - 1,), START_US)
    by_many = table.settle(many, (2**63 - 1,) * 4, START_US)

    assert by_many >= by_one > 2**52
    assert table.stats()["forgiven"] >= by_many


def test_refund_to_a_bucket_that_is_not_there_creates_nothing():
    """A bucket that is gone was full; there is nothing to give back to."""
    table, handle = table_of((b"a", TEN))

    assert table.settle(handle, (-5,), START_US) == 0
    assert table.state(b"a") is None


def test_overage_of_a_bucket_that_is_not_there_is_charged():
    """A bucket that is gone was full; what is used beyond the reservation is taken from that."""
    table, handle = table_of((b"a", TEN))

    assert table.settle(handle, (13,), START_US) == 0
    assert table.peek(handle, START_US).level(0) == -3
