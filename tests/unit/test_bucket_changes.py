"""Budgets that change, clocks that step, and looking without touching."""

import subprocess
import sys
from fractions import Fraction

import pytest

from tests.buckets import GRANT, TEN, at, states, table_of
from tests.oracle import Terms
from tests.strategies import LATEST_US, START_US, S, prepared, scale_of, seen, verdict
from tokenguard._bucket import BucketTable
from tokenguard.errors import StaleHandle

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
        "repaired": 0,
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
