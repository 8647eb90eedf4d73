"""From a budget to exact integers: the only place that knows how.

A bucket's level is an integer in *units*. One token is ``unit`` units, and each tick of ``tick_us`` µs adds
``gain`` units. No amount is ever rounded after this point, so refilling is associative: looking at a bucket,
refusing a call or splitting a wait in two changes no later decision. Every amount stays below 2^53, which
makes the doubles of a Lua script as exact as these integers.

Source: docs/decisions/001-exact-integers.md
"""

from __future__ import annotations

import math
from fractions import Fraction

from tokenguard.errors import InvalidValue
from tokenguard.model import Scale

MAX_CAPACITY = 10**12
MAX_RATE = 10**12
"""Tokens per second."""
MAX_UNITS = 2**52
TICKS_US = tuple(10**exponent for exponent in range(7))
DEFAULT_DEBT = 10
"""How many capacities a bucket may owe where the budget does not say."""

_READING_ERROR = Fraction(1, 10**12)
_REPRESENTATION_ERROR = Fraction(1, 10**6)


def read_rate(value: float | Fraction) -> Fraction:
    """Return the simplest fraction within 1e-12 (relative) of ``value``.

    A rate that somebody typed or computed as a float is taken for what was meant: ``1000/60`` is 50/3 and
    ``16.6667`` is 166667/10000.

    Args:
        value: Tokens per second, finite, at least 0.
    """
    exact = Fraction(value)
    if exact.denominator == 1:
        return exact
    margin = exact * _READING_ERROR
    return _simplest_between(exact - margin, exact + margin)


def scale(capacity: int, rate: Fraction, max_debt: int) -> Scale:
    """Return the integers of a budget, with the shortest tick in which they are exact.

    Where no tick makes the rate exact, the largest rate below it that can be represented is taken;
    ``Scale.rate`` tells which.

    Args:
        capacity: Whole tokens, 1 to 10^12.
        rate: Tokens per second, 0 to 10^12.
        max_debt: Whole tokens, 0 to 2^52 less the capacity.

    Raises:
        InvalidValue: An argument is out of bounds, or the nearest rate is off by more than 1e-6 (relative).
    """
    _check_bounds(capacity, rate, max_debt)
    for tick_us in TICKS_US:
        per_tick = rate * tick_us / 1_000_000
        gain, unit = per_tick.numerator, per_tick.denominator
        if (capacity + max_debt) * unit <= MAX_UNITS and gain <= MAX_UNITS:
            return Scale(capacity, max_debt, gain, unit, tick_us)
    nearest = _largest_below(rate, MAX_UNITS // max(capacity + max_debt, math.ceil(rate)))
    if nearest < rate * (1 - _REPRESENTATION_ERROR):
        raise InvalidValue(
            "refillPerSec",
            f"refillPerSec {float(rate)!r} cannot be kept exactly beside capacity {capacity} and maxDebt "
            f"{max_debt}: the nearest rate is {float(nearest)!r}; use that, or lower capacity or maxDebt",
        )
    return scale(capacity, nearest, max_debt)


def _check_bounds(capacity: int, rate: Fraction, max_debt: int) -> None:
    if not 1 <= capacity <= MAX_CAPACITY:
        raise InvalidValue("capacity", f"capacity must be between 1 and 10^12, got {capacity}")
    if not 0 <= rate <= MAX_RATE:
        raise InvalidValue("refillPerSec", f"refillPerSec must be between 0 and 10^12, got {_shown(rate)}")
    if not 0 <= max_debt <= MAX_UNITS - capacity:
        raise InvalidValue(
            "maxDebt",
            f"maxDebt must be between 0 and {MAX_UNITS - capacity} at this capacity, got {max_debt}",
        )


def _shown(rate: Fraction) -> str:
    try:
        return repr(float(rate))
    except OverflowError:
        return "over 10^308"


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction with the smallest denominator in [low, high], by continued fractions."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    floor = whole - 1
    return floor + 1 / _simplest_between(1 / (high - floor), 1 / (low - floor))


def _largest_below(value: Fraction, max_denominator: int) -> Fraction:
    """Return the largest fraction not above ``value`` whose denominator is at most ``max_denominator``."""
    near = value.limit_denominator(max_denominator)
    if near <= value:
        return near
    # `near` is the least one above. Its neighbour below, a/b, solves near.n * b - a * near.d = 1
    # with the largest b within bounds.
    smallest = pow(near.numerator, -1, near.denominator)
    b = smallest + (max_denominator - smallest) // near.denominator * near.denominator
    return Fraction((near.numerator * b - 1) // near.denominator, b)
