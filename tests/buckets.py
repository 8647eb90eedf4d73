"""Buckets that the tests of the table begin with, and a clock that counts from a moment of their own."""

from fractions import Fraction

from tests.oracle import Terms
from tests.strategies import START_US, S, prepared
from tokenguard._bucket import BucketTable

TEN = Terms(10, Fraction(2), 20)
"""Ten tokens, two per second, twenty of debt: 1 token is 500 000 units, 1 µs adds 1."""
GRANT = Terms(10, Fraction(0))
"""Ten tokens, once."""


def at(seconds):
    return START_US + int(seconds * S)


def table_of(*plan, buckets=16):
    """Return a table and its handle of a plan."""
    table = BucketTable(buckets, seed=b"the same each time")
    return table, prepared(table, plan)


def states(table, *keys):
    return [table.state(key) for key in keys]
