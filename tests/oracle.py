"""The arithmetic of DESIGN section 4 once more, in exact fractions: the oracle that every engine is held to.

Levels are fractions of tokens and are never rounded; units appear only where stored integers are asked for.
It shares no code with the engines, knows no slot, script or lock, and never drops a bucket to make room.

Two refinements of the text: a conversion starts from the later of now and the bucket's own tick, so that a
frozen clock grants nothing twice; and what a refusal does write is a clock that stepped back by over 1 s, and
a conversion, for a bucket whose old rate is 0 would otherwise be refused for ever.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import NamedTuple

NEVER_US = 10**15
STEP_US = 1_000_000
MAX_UNITS = 2**52


class Terms(NamedTuple):
    """A budget: capacity and debt floor in whole tokens, rate in tokens per second."""

    capacity: int
    rate: Fraction
    max_debt: int = 0


Plan = tuple[tuple[bytes, Terms], ...]
Stored = tuple[int, int, int, int, int, int]
"""L, t, C, r, q, tau."""


@cache
def tick_of(terms: Terms) -> tuple[int, Fraction]:
    """Return the length of a tick in µs, and the tokens that flow in during one."""
    for exponent in range(7):
        tick_us = 10**exponent
        per_tick = terms.rate * Fraction(tick_us, 10**6)
        if (terms.capacity + terms.max_debt) * per_tick.denominator <= MAX_UNITS >= per_tick.numerator:
            return tick_us, per_tick
    most = MAX_UNITS // max(terms.capacity + terms.max_debt, math.ceil(terms.rate))
    return tick_of(terms._replace(rate=largest_below(terms.rate, most)))


def largest_below(value: Fraction, max_denominator: int) -> Fraction:
    """Return the largest fraction not above ``value`` with a denominator in bounds.

    It walks down the Stern-Brocot tree, many steps at a time.
    """
    a, b = math.floor(value), 1  # a/b <= value < c/d
    c, d = 1, 0
    while a != value * b:
        up = min((value * b - a) // (c - value * d), (max_denominator - b) // d if d else MAX_UNITS)
        a, b = a + up * c, b + up * d
        if a == value * b:
            break
        down = min(math.ceil((c - value * d) / (value * b - a)) - 1, (max_denominator - d) // b)
        c, d = c + down * a, d + down * b
        if up == down == 0:
            break
    return Fraction(a, b)


class OracleBucket:
    """One bucket: its terms, its level in tokens, and the tick up to which it has been refilled."""

    def __init__(self, terms: Terms, now_us: int) -> None:
        self.terms = terms
        self.tick_us, self.per_tick = tick_of(terms)
        self.level = Fraction(terms.capacity)
        self.tick = now_us // self.tick_us

    @property
    def stored(self) -> Stored:
        """The integers that an engine keeps of it."""
        unit = self.per_tick.denominator
        level = self.level * unit
        assert level.denominator == 1, f"{self.level} tokens are no whole number of units of 1/{unit}"
        return (int(level), self.tick, self.terms.capacity, self.per_tick.numerator, unit, self.tick_us)

    @property
    def full(self) -> bool:
        return self.level == self.terms.capacity

    def counts_as(self, terms: Terms) -> bool:
        """Return whether it counts under these very terms, or ones that come to the same numbers."""
        mine = (self.terms.capacity, self.terms.max_debt, self.tick_us, self.per_tick)
        return mine == (terms.capacity, terms.max_debt, *tick_of(terms))

    def refill(self, now_us: int) -> bool:
        """Bring it up to now; return whether the clock had stepped back so far that it is believed."""
        now = now_us // self.tick_us
        if now > self.tick:
            self.level = min(Fraction(self.terms.capacity), self.level + (now - self.tick) * self.per_tick)
            self.tick = now
        elif (self.tick - 1) * self.tick_us - now_us >= STEP_US:
            self.tick = now
            return True
        return False

    def convert(self, terms: Terms, now_us: int) -> int:
        """Take over other terms; what was used stays used. Return the tokens below the new floor: forgiven."""
        tokens = math.floor(self.level) + terms.capacity - self.terms.capacity
        held_us = max(now_us, self.tick * self.tick_us)
        self.terms = terms
        self.tick_us, self.per_tick = tick_of(terms)
        self.level = Fraction(min(max(tokens, -terms.max_debt), terms.capacity))
        self.tick = -(-held_us // self.tick_us)
        return max(0, -terms.max_debt - tokens)

    def charge(self, delta: int) -> int:
        """Take ``delta`` more tokens, or give them back; return how many fell below the floor, rounded up."""
        asked = self.level - delta
        self.level = min(max(asked, Fraction(-self.terms.max_debt)), Fraction(self.terms.capacity))
        return math.ceil(max(Fraction(0), self.level - asked))

    def wait_us(self, cost: int, now_us: int) -> int:
        """Return how long until it passes ``cost``: 0 is now, 10^15 is never."""
        if cost == 0:
            return 0
        return NEVER_US if cost > self.terms.capacity else self._reaches_us(cost, now_us)

    def full_in_us(self, now_us: int) -> int:
        """Return how long until it is full: 0 is now, 10^15 is never."""
        return self._reaches_us(self.terms.capacity, now_us)

    def _reaches_us(self, tokens: int, now_us: int) -> int:
        if self.level >= tokens:
            return 0
        if self.per_tick == 0:
            return NEVER_US
        ticks = math.ceil((tokens - self.level) / self.per_tick)
        return min(NEVER_US, (self.tick + ticks) * self.tick_us - now_us)


@dataclass(frozen=True)
class OracleOutcome:
    """What a reserve or a peek found, bucket by bucket in the order of the plan."""

    levels: tuple[int, ...]
    costs: tuple[int, ...]
    waits_us: tuple[int, ...]
    full_in_us: tuple[int, ...]

    @property
    def allowed(self) -> bool:
        return not any(self.waits_us)

    @property
    def retry_after_us(self) -> int:
        return max(self.waits_us, default=0)

    @property
    def binding(self) -> int:
        return -1 if self.allowed else self.waits_us.index(self.retry_after_us)


class _View(NamedTuple):
    """A copy of a bucket, brought up to now and to the terms of a plan."""

    bucket: OracleBucket
    stepped: bool
    converted: bool
    forgiven: int


class OracleTable:
    """Buckets by key, decided upon one operation at a time.

    Attributes:
        buckets: Those that were ever charged and not removed; one that is not here is full.
        forgiven: The tokens that fell below a floor, in all.
        clock_steps: How often a bucket met a clock that had stepped back by over 1 s.
    """

    def __init__(self) -> None:
        self.buckets: dict[bytes, OracleBucket] = {}
        self.forgiven = 0
        self.clock_steps = 0

    def stored(self, key: bytes) -> Stored | None:
        return self.buckets[key].stored if key in self.buckets else None

    def reserve(self, plan: Plan, costs: tuple[int, ...], now_us: int) -> OracleOutcome:
        """Take each bucket's cost from all buckets, or from none."""
        views = [self._view(key, terms, now_us) for key, terms in plan]
        for (key, _), view in zip(plan, views, strict=True):
            if view.stepped or view.converted:
                self._keep(key, view)
        buckets = [copy.copy(view.bucket) for view in views]
        waits = tuple(bucket.wait_us(cost, now_us) for bucket, cost in zip(buckets, costs, strict=True))
        if not any(waits):
            for (key, _), bucket, cost in zip(plan, buckets, costs, strict=True):
                if cost:
                    bucket.level -= cost
                    self.buckets[key] = bucket
        return _outcome(buckets, costs, waits, now_us)

    def settle(self, plan: Plan, deltas: tuple[int, ...], now_us: int) -> int:
        """Charge each bucket its delta, under the terms that it stands in; return what was forgiven."""
        forgiven = 0
        for (key, terms), delta in zip(plan, deltas, strict=True):
            if delta > 0 and key not in self.buckets:
                self.buckets[key] = OracleBucket(terms, now_us)
            if delta and key in self.buckets:
                self.clock_steps += self.buckets[key].refill(now_us)
                forgiven += self.buckets[key].charge(delta)
        self.forgiven += forgiven
        return forgiven

    def peek(self, plan: Plan, now_us: int) -> OracleOutcome:
        """Return the buckets as a reserve would find them, and change nothing."""
        buckets = [self._view(key, terms, now_us).bucket for key, terms in plan]
        nothing = (0,) * len(plan)
        return _outcome(buckets, nothing, nothing, now_us)

    def configure(self, key: bytes, terms: Terms, level: int | None, now_us: int) -> None:
        """Give a bucket other terms at once, and a level if there is one."""
        if key in self.buckets:
            self._keep(key, self._view(key, terms, now_us))
        if level is not None and (key in self.buckets or level < terms.capacity):
            bucket = self.buckets.setdefault(key, OracleBucket(terms, now_us))
            bucket.level = Fraction(level)

    def remove(self, key: bytes) -> None:
        self.buckets.pop(key, None)

    def _view(self, key: bytes, terms: Terms, now_us: int) -> _View:
        if key not in self.buckets:
            return _View(OracleBucket(terms, now_us), stepped=False, converted=False, forgiven=0)
        bucket = copy.copy(self.buckets[key])
        stepped = bucket.refill(now_us)
        converted = not bucket.counts_as(terms)
        forgiven = bucket.convert(terms, now_us) if converted else 0
        return _View(bucket, stepped, converted, forgiven)

    def _keep(self, key: bytes, view: _View) -> None:
        self.buckets[key] = view.bucket
        self.clock_steps += view.stepped
        self.forgiven += view.forgiven


def _outcome(
    buckets: list[OracleBucket], costs: tuple[int, ...], waits_us: tuple[int, ...], now_us: int
) -> OracleOutcome:
    return OracleOutcome(
        levels=tuple(math.floor(bucket.level) for bucket in buckets),
        costs=costs,
        waits_us=waits_us,
        full_in_us=tuple(bucket.full_in_us(now_us) for bucket in buckets),
    )
