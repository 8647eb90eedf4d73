import importlib.machinery
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from tests.oracle import NEVER_US, Terms
from tests.strategies import LATEST_US, START_US, S, prepared, scale_of, seen, verdict
from tokenguard import _bucket
from tokenguard._bucket import MAX_BUCKETS, MAX_PLAN, BucketTable
from tokenguard.errors import StaleHandle, TableFull

TEN = Terms(10, Fraction(2), 20)
"""Ten tokens, two per second, twenty of debt: 1 token is 500 000 units, 1 µs adds 1."""
GRANT = Terms(10, Fraction(0))
"""Ten tokens, once."""


def at(seconds):
    return START_US + int(seconds * S)


# fmt: off
CASES = {
    "a new bucket is full": (TEN, [
        # at s,  what,      of, level, wait s
        (0.0,    "peek",     0,    10,    0),
        (9.0,    "peek",     0,    10,    0),
    ]),
    "tokens are taken one call after the other": (TEN, [
        (0.0,    "reserve",  1,     9,    0),
        (0.0,    "reserve",  3,     6,    0),
        (0.0,    "reserve",  6,     0,    0),
    ]),
    "what is not there is refused, and comes at the refill rate": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "reserve",  1,     0,  0.5),
        (0.25,   "reserve",  1,     0, 0.25),
        (0.5,    "reserve",  1,     0,    0),
        (0.5,    "reserve",  3,     0,  1.5),
        (1.5,    "reserve",  3,     2,  0.5),
    ]),
    "a refusal takes nothing": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (0.0,    "reserve",  5,     2,  1.5),
        (0.0,    "reserve",  5,     2,  1.5),
        (0.0,    "reserve",  2,     0,    0),
    ]),
    "a bucket fills up to its capacity and no further": (TEN, [
        (0.0,    "reserve",  4,     6,    0),
        (1.0,    "peek",     0,     8,    0),
        (2.0,    "peek",     0,    10,    0),
        (3600.0, "reserve", 10,     0,    0),
        (3600.0, "reserve",  1,     0,  0.5),
    ]),
    "half a token is kept but does not count": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.75,   "reserve",  1,     0,    0),
        (0.75,   "reserve",  1,     0, 0.25),
        (1.0,    "reserve",  1,     0,    0),
    ]),
    "more than the capacity is never there": (TEN, [
        (0.0,    "reserve", 11,    10, None),
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "reserve", 11,     0, None),
        (0.0,    "reserve", 2**63 - 1, 0, None),
    ]),
    "a fixed grant is never refilled": (GRANT, [
        (0.0,    "reserve",  7,     3,    0),
        (1e6,    "reserve",  4,     3, None),
        (1e6,    "reserve",  3,     0,    0),
        (2e6,    "reserve",  1,     0, None),
        (2e6,    "settle",  -2,     2,    0),
        (2e6,    "reserve",  2,     0,    0),
    ]),
    "overage becomes debt, and is paid back before anything passes": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   5,    -5,    0),
        (0.0,    "reserve",  1,    -5,    3),
        (2.0,    "reserve",  1,    -1,    1),
        (2.5,    "peek",     0,     0,    0),
        (3.0,    "reserve",  1,     0,    0),
    ]),
    "a part of a token of debt is shown as a whole one": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   1,    -1,    0),
        (0.25,   "peek",     0,    -1,    0),
        (0.5,    "peek",     0,     0,    0),
    ]),
    "a call that costs nothing passes, even on debt": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   5,    -5,    0),
        (0.0,    "reserve",  0,    -5,    0),
    ]),
    "what was not used is given back": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (0.0,    "settle",  -5,     7,    0),
        (0.0,    "reserve",  7,     0,    0),
    ]),
    "a refund never lifts above the capacity": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (3.0,    "settle",  -8,    10,    0),
        (3.0,    "reserve", 10,     0,    0),
        (3.0,    "reserve",  1,     0,  0.5),
    ]),
    "debt ends at its floor": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle", 999,   -20,    0),
        (0.0,    "reserve",  1,   -20, 10.5),
    ]),
    "a clock that steps back by up to a second stands still": (TEN, [
        (9.0,    "reserve", 10,     0,    0),
        (8.0,    "reserve",  1,     0,  1.5),
        (9.0,    "reserve",  1,     0,  0.5),
        (9.5,    "reserve",  1,     0,    0),
    ]),
    "a clock that steps back further is believed": (TEN, [
        (9.0,    "reserve", 10,     0,    0),
        (7.5,    "reserve",  1,     0,  0.5),
        (8.0,    "reserve",  1,     0,    0),
        (9.0,    "reserve",  2,     0,    0),
    ]),
    "a clock that jumps forward at most fills the bucket": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (7e9,    "reserve", 10,     0,    0),
        (7e9,    "reserve",  1,     0,  0.5),
    ]),
}
# fmt: on


@pytest.mark.parametrize("sentence", CASES)
def test_one_bucket(sentence):
    """Each table of rows reads as the sentence above it."""
    terms, rows = CASES[sentence]
    table = BucketTable(4)
    handle = prepared(table, ((b"one", terms),))

    for seconds, act, count, level, wait in rows:
        now_us = at(seconds)
        if act == "settle":
            table.settle(handle, (count,), now_us)
        outcome = table.reserve(handle, (count,), now_us) if act == "reserve" else table.peek(handle, now_us)
        wait_us = NEVER_US if wait is None else int(wait * S)
        assert (outcome.level(0), outcome.retry_after_us) == (level, wait_us), f"at {seconds} s"
        assert outcome.allowed == (wait_us == 0)


def table_of(*plan, buckets=16):
    """Return a table and its handle of a plan."""
    table = BucketTable(buckets, seed=b"the same each time")
    return table, prepared(table, plan)


def states(table, *keys):
    return [table.state(key) for key in keys]


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


# --- budgets ------------------------------------------------------------------------------------------------


def test_raise_then_lower_is_the_identity_but_for_less_than_a_token():
    """What was used stays used, to the whole token."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (7,), START_US)

    table.configure(b"a", scale_of(Terms(1000, Fraction(1, 3))), now_us=START_US + 250_000)
    raised = table.state(b"a")
    table.configure(b"a", scale_of(TEN), now_us=START_US + 250_000)

    assert raised[0] == 993 * raised[4]
    assert table.state(b"a") == (3 * 500_000, START_US + 250_000, 10, 1, 500_000, 1)


def test_budget_lowered_below_what_was_used_starts_in_debt():
    """Who has used more than the new budget gives must first pay that back."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (9,), START_US)

    table.configure(b"a", scale_of(Terms(4, Fraction(1), 40)), now_us=START_US)

    lowered = prepared(table, ((b"a", Terms(4, Fraction(1), 40)),))
    assert verdict(table.reserve(lowered, (1,), START_US)) == (False, 0, 6 * S)
    assert table.peek(lowered, START_US).level(0) == -5


def test_lowering_forgives_what_the_new_floor_does_not_bear():
    """A change of budget goes down to the new floor of debt and counts the rest."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (9,), START_US)

    table.configure(b"a", scale_of(Terms(4, Fraction(1), 2)), now_us=START_US)

    assert table.state(b"a")[:3] == (-2 * 10**6, START_US, 4)
    assert table.stats()["forgiven"] == 3


def test_change_refills_at_the_old_rate_up_to_the_moment_of_the_change():
    """The time before a change counts at the rate of before."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)

    table.configure(b"a", scale_of(Terms(10, Fraction(10))), now_us=at(2))

    assert table.state(b"a")[:2] == (4 * 100_000, at(2))


def test_conversion_starts_at_the_next_tick():
    """Where the new tick is longer, the part of it that is over is not granted."""
    coarse = Terms(10**12, Fraction(1, 7))
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (1,), START_US)

    table.configure(b"a", scale_of(coarse), now_us=START_US + 1)

    assert table.state(b"a")[1] == START_US // 10_000 + 1


def test_conversion_under_a_frozen_clock_grants_nothing_twice():
    """A clock that stands still while the budget changes is not refilled for again afterwards."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)

    table.configure(b"a", scale_of(Terms(10, Fraction(4), 20)), now_us=START_US - 900_000)

    assert table.state(b"a")[:2] == (0, START_US)


def test_changed_default_converts_at_first_touch():
    """A plan that names other numbers than the bucket was written under takes it over, even when refused."""
    table, handle = table_of((b"a", GRANT))
    table.reserve(handle, (10,), START_US)
    raised = prepared(table, ((b"a", TEN),))

    refused = table.reserve(raised, (1,), START_US)

    assert verdict(refused) == (False, 0, S // 2)
    assert table.reserve(raised, (1,), START_US + S // 2).allowed


def test_lower_floor_of_debt_alone_is_a_change():
    """A budget that allows less debt than before forgives what goes beyond."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)
    table.settle(handle, (15,), START_US)

    table.configure(b"a", scale_of(TEN._replace(max_debt=4)), now_us=START_US)

    assert table.state(b"a")[0] == -4 * 500_000
    assert table.stats()["forgiven"] == 11


def test_level_is_set_as_given():
    """An explicit level replaces what was there, or was not."""
    table, handle = table_of((b"a", TEN), (b"b", TEN), (b"c", TEN))
    table.reserve(handle, (9, 0, 0), START_US)

    table.configure(b"a", scale_of(TEN), 10, START_US)
    table.configure(b"b", scale_of(TEN), -20, START_US)
    table.configure(b"c", scale_of(TEN), 10, START_US)

    assert [state and state[0] for state in states(table, b"a", b"b", b"c")] == [5_000_000, -10_000_000, None]


def test_removed_bucket_is_full_again():
    """A bucket that is forgotten comes back new; to forget one that is not there is no error."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)

    table.remove(b"a")
    table.remove(b"nobody")

    assert table.state(b"a") is None
    assert table.peek(prepared(table, ((b"a", TEN),)), START_US).level(0) == 10


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.configure(b"other", scale_of(TEN)),
        lambda table: table.configure(b"other", scale_of(TEN), 3),
        lambda table: table.remove(b"other"),
    ],
)
def test_stale_handle_is_refused_and_charges_nothing(change):
    """After any change of a budget, plans must be resolved anew."""
    table, handle = table_of((b"a", TEN))
    before = table.epoch

    change(table)

    assert table.epoch != before == handle.epoch
    with pytest.raises(StaleHandle, match="budget changed"):
        table.reserve(handle, (1,), START_US)
    assert table.state(b"a") is None


def test_handle_prepared_from_budgets_read_earlier_is_stale():
    """Who read the budgets before they changed, and prepared after, is told so."""
    table, _ = table_of()
    epoch = table.epoch
    table.configure(b"a", scale_of(TEN))

    handle = table.prepare([(b"a", scale_of(TEN))], epoch)

    with pytest.raises(StaleHandle):
        table.reserve(handle, (1,), START_US)


def test_stale_handle_still_settles():
    """What was reserved under an old budget is settled under the one that the bucket stands in."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), START_US)
    table.configure(b"a", scale_of(Terms(100, Fraction(1), 50)), now_us=START_US)

    assert table.settle(handle, (40,), START_US) == 0

    assert table.state(b"a")[0] == 50 * 10**6
    assert table.peek(handle, START_US).level(0) == -20


# --- the clock ----------------------------------------------------------------------------------------------


def test_only_a_step_back_of_over_a_second_is_counted():
    """A frozen clock is nothing to report; one that is believed again is."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))
    table.reserve(handle, (10, 10), at(9))

    table.reserve(handle, (1, 1), at(8))
    assert table.stats()["clock_steps"] == 0
    table.reserve(handle, (1, 1), at(8) - 1)
    assert table.stats()["clock_steps"] == 2


def test_step_back_is_kept_on_a_refusal():
    """That a clock has stepped back far is noticed once, not at every call."""
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (10,), at(9))

    table.reserve(handle, (10,), at(3))
    table.reserve(handle, (10,), at(3))

    assert table.state(b"a")[:2] == (0, at(3))
    assert table.stats()["clock_steps"] == 1


def test_small_step_back_after_a_conversion_to_a_long_tick_is_no_large_one():
    """A bucket whose first tick has yet to begin takes a step back of 2 µs for what it is."""
    second = Terms(10**12, Fraction(1, 4096))
    table, handle = table_of((b"a", TEN))
    table.reserve(handle, (1,), START_US)
    table.configure(b"a", scale_of(second), now_us=START_US + 1)
    assert scale_of(second).tick_us == S
    before = table.state(b"a")

    table.reserve(prepared(table, ((b"a", second),)), (0,), START_US - 1)

    assert table.state(b"a") == before
    assert table.stats()["clock_steps"] == 0


def test_clock_is_read_where_no_time_is_given():
    """Without a time of its own a call happens now."""
    table, handle = table_of((b"a", Terms(10, Fraction(1, 1000))))

    table.reserve(handle, (10,))

    assert table.reserve(handle, (1,)).retry_after_us == pytest.approx(1000 * S, abs=60 * S)
    assert table.state(b"a")[1] > START_US


@pytest.mark.parametrize("now_us", [0, LATEST_US])
def test_time_goes_from_zero_to_the_largest_exact_double(now_us):
    """Both ends of time are times like any other."""
    table, handle = table_of((b"a", TEN), (b"b", Terms(10**12, Fraction(1, 4096))))

    assert seen(table.reserve(handle, (10, 10**12), now_us)).levels == (0, 0)
    assert table.reserve(handle, (1, 0), now_us).retry_after_us == S // 2


# --- peeking and showing ------------------------------------------------------------------------------------


def test_peek_changes_nothing():
    """To look at buckets, with a step of the clock and a changed budget to notice, writes nothing."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))
    table.reserve(handle, (10, 0), at(9))
    before, stats = states(table, b"a", b"b"), table.stats()

    outcome = table.peek(prepared(table, ((b"a", Terms(20, Fraction(1))), (b"b", TEN))), at(1))

    assert verdict(outcome) == (True, -1, 0)
    assert seen(outcome).levels == (10, 10)
    assert seen(outcome).costs == seen(outcome).waits_us == (0, 0)
    assert (states(table, b"a", b"b"), table.stats()) == (before, stats)


def test_representations_show_live_state():
    """What is printed in a debugger tells how things stand."""
    table, handle = table_of((b"a", TEN), (b"b", GRANT), buckets=5)

    allowed = table.reserve(handle, (4, 9), START_US)
    refused = table.reserve(handle, (7, 0), START_US)

    assert repr(table) == "<BucketTable 2 of 5 buckets>"
    assert repr(allowed) == "<Outcome allowed, levels [6, 1]>"
    assert repr(refused) == "<Outcome short for 500000 µs at 0, levels [6, 1]>"


def test_stats_show_what_the_table_holds():
    """Every counter has its name, and the memory is told in bytes."""
    table, handle = table_of((b"a", TEN), buckets=5)
    table.reserve(handle, (4,), START_US)

    stats = table.stats()

    region_bytes = stats.pop("region_bytes")
    assert region_bytes >= 5 * 64
    assert stats == {
        "buckets": 5,
        "used": 1,
        "reclaimed": 0,
        "refused_full": 0,
        "clock_steps": 0,
        "forgiven": 0,
    }


def test_seed_is_random_unless_given():
    """Nobody can choose ids that collide in a table whose seed he does not know."""
    assert BucketTable(1).seed != BucketTable(1).seed
    assert BucketTable(1, seed=b"ours").seed == b"ours"


@pytest.mark.parametrize("number", [-1, 2, 2**31 - 1])
def test_bucket_that_the_plan_does_not_have_is_an_index_error(number):
    """An outcome answers for the buckets of its plan only."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))
    outcome = table.peek(handle, START_US)

    for ask in (outcome.level, outcome.cost, outcome.wait_us, outcome.full_in_us):
        with pytest.raises(IndexError, match="bucket must be between 0 and 1"):
            ask(number)


def test_outcome_made_by_hand_does_not_crash():
    """An outcome that no table gave out raises an error and does not take the process down."""
    made = "from tokenguard._bucket import Outcome; Outcome().retry_after_us; Outcome().level(0)"

    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=False)

    assert done.returncode == 1, "it crashed"
    assert "Error" in done.stderr


# --- what is refused as a mistake ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "now_us", "error", "message"),
    [
        ((1,), START_US, ValueError, "the plan has 2 buckets, got 1 amounts"),
        ((1, 1, 1), START_US, ValueError, "the plan has 2 buckets, got 3 amounts"),
        ((1, -1), START_US, ValueError, "a cost must be at least 0, got -1"),
        ((1, 1), -1, ValueError, r"now_us must be between 0 and 2\^53 - 1, got -1"),
        ((1, 1), 2**53, ValueError, r"now_us must be between 0 and 2\^53 - 1, got 9007199254740992"),
        ((1, 1.0), START_US, TypeError, "integer"),
        ((1, 1), float(START_US), TypeError, "integer"),
        ((1, "1"), START_US, TypeError, "integer"),
        ((1, None), START_US, TypeError, "integer"),
        ((1, 2**63), START_US, OverflowError, "too (large|big)"),
        ([1, 1], START_US, TypeError, "costs"),
        (None, START_US, TypeError, "costs"),
    ],
)
def test_mistaken_reserve_is_an_error_and_charges_nothing(costs, now_us, error, message):
    """Amounts and times that cannot be meant are told apart from a refusal."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))

    with pytest.raises(error, match=message):
        table.reserve(handle, costs, now_us)

    assert states(table, b"a", b"b") == [None, None]


@pytest.mark.parametrize(
    ("deltas", "now_us", "error"),
    [
        ((1,), START_US, ValueError),
        ((1, 1), -1, ValueError),
        ((1.5, 1), START_US, TypeError),
        ((1, 2**63), START_US, OverflowError),
        ([1, 1], START_US, TypeError),
    ],
)
def test_mistaken_settle_is_an_error_and_charges_nothing(deltas, now_us, error):
    """A settle is checked whole before anything is written."""
    table, handle = table_of((b"a", TEN), (b"b", TEN))

    with pytest.raises(error):
        table.settle(handle, deltas, now_us)

    assert states(table, b"a", b"b") == [None, None]


def test_handle_of_another_table_is_refused():
    """A handle opens only the table that gave it out."""
    table, _ = table_of((b"a", TEN))
    _, foreign = table_of((b"a", TEN))

    for use in (
        lambda: table.reserve(foreign, (1,)),
        lambda: table.settle(foreign, (1,)),
        lambda: table.peek(foreign),
    ):
        with pytest.raises(ValueError, match="prepared by another table"):
            use()
    assert table.state(b"a") is None


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ((0, 0, 1, 1, 1), ValueError),
        ((10, -1, 1, 1, 1), ValueError),
        ((10, 0, -1, 1, 1), ValueError),
        ((10, 0, 2**52 + 1, 1, 1), ValueError),
        ((10, 0, 1, 0, 1), ValueError),
        ((10, 0, 1, 1, 0), ValueError),
        ((10, 0, 1, 1, 2), ValueError),
        ((10, 0, 1, 1, 10**7), ValueError),
        ((2**52, 1, 1, 1, 1), ValueError),
        ((2**51, 0, 1, 3, 1), ValueError),
        ((2**62, 2**62, 1, 2**62, 1), ValueError),
        ((10, 0, 1, 1), ValueError),
        ((10, 0, 1, 1, 1, 1), ValueError),
        ((10.0, 0, 1, 1, 1), TypeError),
        (None, TypeError),
    ],
)
def test_scale_out_of_bounds_is_refused(bad, error):
    """Numbers whose products would not fit never come into the table."""
    table, _ = table_of()
    epoch = table.epoch

    with pytest.raises(error):
        table.prepare([(b"a", bad)])
    with pytest.raises(error):
        table.configure(b"a", bad, now_us=START_US)
    assert table.epoch == epoch


@pytest.mark.parametrize("level", [-21, 11, 2**62])
def test_level_out_of_bounds_is_refused(level):
    """A level lies between the floor of debt and the capacity."""
    table, _ = table_of()

    with pytest.raises(ValueError, match=f"level must be between -20 and 10, got {level}"):
        table.configure(b"a", scale_of(TEN), level, START_US)

    assert table.state(b"a") is None
    assert table.epoch == 0


def test_level_of_a_float_is_refused():
    """A level is a whole number of tokens."""
    table, _ = table_of()

    with pytest.raises(TypeError):
        table.configure(b"a", scale_of(TEN), 1.5, START_US)


def test_plan_holds_at_most_32_buckets():
    """Thirty-two buckets are decided upon as one; a thirty-third is a mistake."""
    table, handle = table_of(*((b"%d" % i, TEN) for i in range(MAX_PLAN)), buckets=MAX_PLAN)

    assert table.reserve(handle, (1,) * MAX_PLAN, START_US).allowed
    assert table.stats()["used"] == MAX_PLAN == 32
    with pytest.raises(ValueError, match="a plan must have at most 32 buckets, got 33"):
        table.prepare((b"%d" % i, scale_of(TEN)) for i in range(MAX_PLAN + 1))


def test_plan_names_each_bucket_once():
    """A bucket that is named twice would be checked once and charged twice."""
    table, _ = table_of()

    with pytest.raises(ValueError, match="must name each bucket once"):
        table.prepare([(b"a", scale_of(TEN)), (b"b", scale_of(TEN)), (b"a", scale_of(GRANT))])


@pytest.mark.parametrize("buckets", [0, -1, MAX_BUCKETS + 1])
def test_table_size_out_of_bounds_is_refused(buckets):
    """A table holds at least one bucket and at most ten million."""
    with pytest.raises(ValueError, match=f"buckets must be between 1 and 10000000, got {buckets}"):
        BucketTable(buckets)


def test_seed_that_no_hash_takes_is_refused_at_once():
    """A seed of over 64 bytes is told when it is given, not at the first bucket."""
    with pytest.raises(ValueError, match="64"):
        BucketTable(1, seed=b"x" * 65)


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
    table, handle = table_of((b"returned", GRANT), buckets=4_000)
    table.reserve(handle, (1,), START_US)
    for i in range(3_999):
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
