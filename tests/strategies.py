"""What the random tests draw from, and how they drive a table: budgets, costs, times."""

from __future__ import annotations

import functools
from fractions import Fraction

from hypothesis import settings
from hypothesis import strategies as st

from tests.oracle import OracleOutcome, Plan, Terms
from tokenguard import arithmetic
from tokenguard._bucket import BucketTable, Handle, Outcome
from tokenguard.errors import InvalidValue

S = 1_000_000
"""One second in µs."""
START_US = 1_700_000_000 * S
LATEST_US = 2**53 - 1

properties = settings(max_examples=100, deadline=None, database=None)


@functools.cache
def scale_of(terms: Terms) -> arithmetic.Scale:
    """Return the integers that the engine is given for a budget."""
    return arithmetic.scale(terms.capacity, terms.rate, terms.max_debt)


capacities = st.one_of(
    st.sampled_from([1, 2, 3, 7, 10, 100, 1_000, 9_999_991, 10**9, 10**12]), st.integers(1, 10**5)
)
rates = st.one_of(
    st.sampled_from([0, 5, 50, 1 / 3, 1000 / 60, 16.6667, 1e-6, 1e6, 10_000_000 / 60, 0.7, 1e12]),
    st.integers(0, 10**4),
    st.floats(1e-6, 1e6),
).map(arithmetic.read_rate)


@st.composite
def budgets(draw) -> Terms:
    """Draw a budget whose rate can be kept: without debt, with little, or with the default ten capacities."""
    capacity = draw(capacities)
    max_debt = draw(st.sampled_from([0, 1, capacity, 10 * capacity]))
    try:
        rate = arithmetic.scale(capacity, draw(rates), max_debt).rate
    except InvalidValue:
        rate = Fraction(5)
    return Terms(capacity, rate, max_debt)


shares = st.one_of(
    st.integers(0, 12),
    st.fractions(0, 2, max_denominator=10),
    st.sampled_from([Fraction(1), Fraction(1, 10**6), Fraction(20), 2**52]),
)
"""An amount: whole tokens if an int, a part of a bucket's capacity if a fraction."""


def amount(share: int | Fraction, terms: Terms) -> int:
    """Return the tokens that a share of a budget comes to."""
    return share if isinstance(share, int) else int(share * terms.capacity)


pauses_us = st.one_of(
    st.sampled_from([0, 1, 10, 999_999, S, 60 * S, 3_600 * S, 10 * 365 * 86_400 * S]),
    st.integers(0, 3 * S),
    st.integers(0, 86_400 * S),
)


def prepared(table: BucketTable, plan: Plan) -> Handle:
    """Return the table's handle of a plan."""
    return table.prepare((key, scale_of(terms)) for key, terms in plan)


def seen(outcome: Outcome) -> OracleOutcome:
    """Return what an engine's outcome says, in the oracle's words."""
    numbers = range(len(outcome))
    return OracleOutcome(
        levels=tuple(outcome.level(i) for i in numbers),
        costs=tuple(outcome.cost(i) for i in numbers),
        waits_us=tuple(outcome.wait_us(i) for i in numbers),
        full_in_us=tuple(outcome.full_in_us(i) for i in numbers),
    )


def verdict(outcome: Outcome | OracleOutcome) -> tuple[bool, int, int]:
    """Return whether it is allowed, the binding bucket, and the wait."""
    return outcome.allowed, outcome.binding, outcome.retry_after_us
