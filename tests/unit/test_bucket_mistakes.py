"""What is refused as a mistake, before any bucket is touched."""

import pytest

from tests.buckets import GRANT, TEN, states, table_of
from tests.strategies import START_US, scale_of
from tokenguard._bucket import MAX_BUCKETS, MAX_PLAN, BucketTable

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
