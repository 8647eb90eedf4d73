from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracle import Terms, largest_below, tick_of
from tests.strategies import capacities, properties, rates
from tokenguard.arithmetic import (
    MAX_CAPACITY,
    MAX_RATE,
    MAX_UNITS,
    TICKS_US,
    Scale,
    _largest_below,
    _simplest_between,
    read_rate,
    scale,
)
from tokenguard.errors import InvalidValue

small_fractions = st.fractions(0, 50, max_denominator=10**6)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (0, Fraction(0)),
        (0.0, Fraction(0)),
        (1, Fraction(1)),
        (5, Fraction(5)),
        (0.1, Fraction(1, 10)),
        (1 / 3, Fraction(1, 3)),
        (1000 / 60, Fraction(50, 3)),
        (16.6667, Fraction(166667, 10000)),
        (10_000_000 / 60, Fraction(500_000, 3)),
        (9_999_991 / 60, Fraction(9_999_991, 60)),
        (1e-6, Fraction(1, 10**6)),
        (1e6, Fraction(10**6)),
        (Fraction(1, 86_400), Fraction(1, 86_400)),
        (999_999_999_999, Fraction(999_999_999_999)),
        (MAX_RATE, Fraction(MAX_RATE)),
    ],
)
def test_rate_is_read_as_what_was_meant(value, meant):
    """A rate given as an int, a rounded decimal or a quotient of floats is the fraction behind it."""
    assert read_rate(value) == meant


@properties
@given(st.floats(1e-9, 1e12))
def test_rate_is_read_to_within_its_reading_error(value):
    """What is read differs from what was given by at most 1e-12 of it."""
    rate = read_rate(value)

    assert abs(rate - Fraction(value)) <= Fraction(value) / 10**12


@properties
@given(small_fractions, st.fractions(0, 1, max_denominator=10**4))
def test_simplest_fraction_between_two_has_the_smallest_denominator(low, width):
    """Trying one denominator after the other finds nothing simpler."""
    high = low + width

    found = _simplest_between(low, high)

    assert low <= found <= high
    assert not any(-(-low * d // 1) <= high * d for d in range(1, min(found.denominator, 3_000)))


@properties
@given(st.floats(1e-3, 1e3))
def test_rate_read_is_the_simplest_one_within_its_reading_error(value):
    """No fraction with a slightly smaller denominator lies within 1e-12 of what was given."""
    read = read_rate(value).denominator

    margin = Fraction(value) / 10**12
    low, high = Fraction(value) - margin, Fraction(value) + margin
    assert not any(-(-low * d // 1) <= high * d for d in range(max(1, read - 300), read))


@properties
@given(st.fractions(0, 10**3, max_denominator=500))
def test_simple_rate_survives_the_way_through_a_float(value):
    """A quotient of small whole numbers is read back exactly from its float."""
    assert read_rate(float(value)) == value


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ((1, Fraction(0), 0), Scale(1, 0, 0, 1, 1)),
        ((1000, Fraction(5), 10_000), Scale(1000, 10_000, 1, 200_000, 1)),
        ((10_000, Fraction(50), 100_000), Scale(10_000, 100_000, 1, 20_000, 1)),
        ((10**7, Fraction(10**7, 60), 10**8), Scale(10**7, 10**8, 1, 6, 1)),
        ((10**6, Fraction(50, 3), 0), Scale(10**6, 0, 1, 60_000, 1)),
        ((10**6, Fraction(166_667, 10_000), 10**7), Scale(10**6, 10**7, 166_667, 10**8, 100)),
        ((MAX_CAPACITY, Fraction(1), 0), Scale(MAX_CAPACITY, 0, 1, 1000, 1000)),
        ((MAX_CAPACITY, Fraction(1, 7), 0), Scale(MAX_CAPACITY, 0, 1, 700, 10_000)),
        ((MAX_CAPACITY, Fraction(MAX_RATE), 0), Scale(MAX_CAPACITY, 0, 10**6, 1, 1)),
        ((1, Fraction(1, 10**9), 0), Scale(1, 0, 1, 10**15, 1)),
        ((1, Fraction(0), MAX_UNITS - 1), Scale(1, MAX_UNITS - 1, 0, 1, 1)),
    ],
)
def test_budget_becomes_these_integers(budget, expected):
    """Each budget has one scale: per token and per tick in lowest terms, in the shortest tick that fits."""
    assert scale(*budget) == expected


def fits(terms, tick_us):
    per_tick = terms.rate * tick_us / 10**6
    units = (terms.capacity + terms.max_debt) * per_tick.denominator
    return units <= MAX_UNITS and per_tick.numerator <= MAX_UNITS


@st.composite
def any_budgets(draw):
    capacity = draw(st.one_of(capacities, st.integers(1, MAX_CAPACITY)))
    max_debt = draw(st.sampled_from([0, 1, capacity, 10 * capacity, MAX_UNITS - capacity]))
    return Terms(capacity, draw(rates), max_debt)


hard_budgets = st.builds(
    Terms,
    capacity=st.integers(10**10, MAX_CAPACITY),
    rate=st.one_of(st.floats(1e-3, 1e6).map(read_rate), st.floats(1e8, 1e11).map(Fraction)),
    max_debt=st.sampled_from([0, 10**12, 10**13]),
).filter(lambda terms: not any(fits(terms, tick_us) for tick_us in TICKS_US))


def scale_or_none(terms):
    try:
        return scale(*terms)
    except InvalidValue:
        return None


@properties
@given(st.one_of(any_budgets(), hard_budgets))
def test_scale_keeps_to_the_bounds_of_a_double(terms):
    """Capacity and debt in units, and the gain of a tick, are at most 2^52."""
    made = scale_or_none(terms)

    assume(made is not None)
    assert (made.capacity, made.debt) == (terms.capacity, terms.max_debt)
    assert (made.capacity + made.debt) * made.unit <= MAX_UNITS
    assert 0 <= made.gain <= MAX_UNITS
    assert made.unit >= 1


@properties
@given(any_budgets())
def test_smallest_tick_in_which_a_rate_is_exact_is_chosen(terms):
    """A rate that some tick represents is kept exactly, in the shortest such tick."""
    exact_in = [tick_us for tick_us in TICKS_US if fits(terms, tick_us)]

    assume(exact_in)
    made = scale(*terms)
    assert made.rate == terms.rate
    assert made.tick_us == exact_in[0]


@properties
@given(st.one_of(any_budgets(), hard_budgets))
def test_scale_agrees_with_the_oracle(terms):
    """The oracle, which finds its ticks in its own way, comes to the same numbers."""
    made = scale_or_none(terms)

    assume(made is not None)
    assert (made.tick_us, Fraction(made.gain, made.unit)) == tick_of(terms)


@properties
@given(hard_budgets)
def test_effective_rate_is_the_next_lower_one_or_is_refused(terms):
    """A rate that no tick represents becomes the next lower one, or is refused where that is over 1e-6 lower."""
    made = scale_or_none(terms)

    best = largest_below(terms.rate, MAX_UNITS // max(terms.capacity + terms.max_debt, -(-terms.rate // 1)))
    if best < terms.rate * (1 - Fraction(1, 10**6)):
        assert made is None
    else:
        assert made is not None
        assert made.rate == best


@properties
@given(st.one_of(any_budgets(), hard_budgets))
def test_effective_rate_given_back_is_the_same_budget(terms):
    """Who sets a budget to the rate that was echoed changes nothing."""
    made = scale_or_none(terms)

    assume(made is not None)
    assert scale(terms.capacity, made.rate, terms.max_debt) == made


@properties
@given(any_budgets(), st.floats(0, 1e9))
def test_effective_rate_is_never_above_the_given_one(terms, value):
    """From the float that somebody gave to the rate in effect, at most the reading error is added."""
    made = scale_or_none(terms._replace(rate=read_rate(value)))

    assume(made is not None)
    assert made.rate <= Fraction(value) * (1 + Fraction(1, 10**12))


@properties
@given(small_fractions, st.integers(1, 60))
def test_largest_below_is_the_best_of_all_small_denominators(value, most):
    """Among all fractions not above a value with a denominator in bounds, none is larger."""
    best = max(Fraction(value * d // 1, d) for d in range(1, most + 1))

    assert _largest_below(value, most) == best
    assert largest_below(value, most) == best


@properties
@given(st.fractions(0, 10**6, max_denominator=10**15), st.integers(1, 2**52))
def test_largest_below_agrees_with_a_walk_down_the_tree(value, most):
    """With large denominators too, it is what a walk down the Stern-Brocot tree finds."""
    assert _largest_below(value, most) == largest_below(value, most)


@pytest.mark.parametrize(
    ("budget", "field", "message"),
    [
        ((0, Fraction(1), 0), "capacity", "capacity must be between 1 and 10^12, got 0"),
        ((-5, Fraction(1), 0), "capacity", "capacity must be between 1 and 10^12, got -5"),
        ((10**12 + 1, Fraction(1), 0), "capacity", "capacity must be between 1 and 10^12, got 1000000000001"),
        ((1, Fraction(-1, 2), 0), "refillPerSec", "refillPerSec must be between 0 and 10^12, got -0.5"),
        (
            (1, Fraction(2 * 10**12), 0),
            "refillPerSec",
            "refillPerSec must be between 0 and 10^12, got 2000000000000.0",
        ),
        (
            (1, Fraction(1), -1),
            "maxDebt",
            f"maxDebt must be between 0 and {2**52 - 1} at this capacity, got -1",
        ),
        (
            (10, Fraction(1), 2**52),
            "maxDebt",
            f"maxDebt must be between 0 and {2**52 - 10} at this capacity, got {2**52}",
        ),
    ],
)
def test_refusal_names_field_value_and_what_is_allowed(budget, field, message):
    """A budget out of bounds is refused in words that its owner can act upon."""
    with pytest.raises(InvalidValue) as refusal:
        scale(*budget)

    assert refusal.value.field == field
    assert str(refusal.value) == message


def test_rate_beyond_any_float_is_refused():
    """A rate too large to be shown as a float is out of bounds like any other."""
    with pytest.raises(InvalidValue, match=r"refillPerSec must be between 0 and 10\^12"):
        scale(1, Fraction(10**400), 0)


def test_refusal_of_a_rate_says_which_one_could_be_kept():
    """Where the nearest rate is over 1e-6 off, the message gives it, and that one is accepted exactly."""
    capacity, rate = 10**12, read_rate(0.123456789)

    with pytest.raises(InvalidValue, match="cannot be kept exactly") as refusal:
        scale(capacity, rate, 0)

    assert refusal.value.field == "refillPerSec"
    nearest = largest_below(rate, MAX_UNITS // capacity)
    assert f"refillPerSec {float(rate)!r} " in str(refusal.value)
    assert f"capacity {capacity} and maxDebt 0: the nearest rate is {float(nearest)!r}; use that" in str(
        refusal.value
    )
    assert scale(capacity, read_rate(float(nearest)), 0).rate == nearest


def test_rate_a_little_off_is_accepted_and_says_what_is_in_effect():
    """A rate that cannot be exact, but to within 1e-6, is taken from below."""
    rate = Fraction(1_000_000_007, 10**9) * 1000

    made = scale(10**11, rate, 0)

    assert rate * (1 - Fraction(1, 10**6)) <= made.rate < rate
