"""A small house to test in: a limiter and budgets over a table of their own, and numbers easy to reckon with."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from tokenguard import arithmetic
from tokenguard._bucket import BucketTable
from tokenguard.backends.memory import MemoryBackend
from tokenguard.budgets import Budgets
from tokenguard.exchange import Settlement
from tokenguard.limiter import Limiter, Refusal, Reservation
from tokenguard.model import GLOBAL, GLOBAL_ID, BucketName, Budget, Decision, Identity, Meter, Scale, Scope
from tokenguard.plan import Plans

S = 1_000_000
"""One second in µs."""
NOW_US = 1_700_000_000 * S

ALICE = Identity("alice", team="red", role="dev", rolegroup="staff")
MODEL = "gpt-4o"


def grant(capacity: int, rate: float | Fraction = 0, max_debt: int | None = None) -> Scale:
    """Return a budget's scale: a fixed grant, unless it refills at ``rate`` a second."""
    return arithmetic.scale(capacity, Fraction(rate), 10 * capacity if max_debt is None else max_debt)


def named(scope: str, meter: Meter = Meter.TOKENS, model: str | None = None) -> BucketName:
    """Return the name of a bucket of ``kind:id`` (or ``global``)."""
    kind, _, scope_id = scope.partition(":")
    return BucketName(Scope(kind, GLOBAL_ID if kind == GLOBAL else scope_id), meter, model)


def told(reserved: Reservation | Refusal) -> Reservation | Decision:
    """Return what came of reserving as callers are told of it."""
    return reserved.decision if isinstance(reserved, Refusal) else reserved


class House:
    """A limiter, budgets, and all below them.

    Args:
        defaults: Kinds of scopes to their default scales.
        buckets: How many buckets the table holds.
    """

    def __init__(self, defaults: Mapping[str, Scale] | None = None, buckets: int = 64) -> None:
        self.table = BucketTable(buckets, seed=b"house")
        self.backend = MemoryBackend(self.table)
        self.plans = Plans(self.backend, defaults or {})
        self.limiter = Limiter(self.backend, self.plans)
        self.budgets = Budgets(self.backend, self.plans)

    def set(self, scope: str, scale: Scale, meter: Meter = Meter.TOKENS, model: str | None = None) -> None:
        """Set a budget at the time at which tests begin."""
        self.backend.put(Budget(named(scope, meter, model), scale), None, NOW_US)

    def reserve(
        self, tokens: int, *, who: Identity = ALICE, prompt: int = 0, model: str = MODEL, now_us: int = NOW_US
    ) -> Any:
        """Ask for a reservation of ``tokens`` in all; return it, or the decision that refuses it."""
        return told(self.limiter.reserve(who, model, prompt, tokens, now_us=now_us))

    def taken(self, tokens: int, **asked: Any) -> Reservation:
        """Return a reservation, which must not be refused."""
        reserved = self.reserve(tokens, **asked)
        assert isinstance(reserved, Reservation), reserved
        return reserved

    def carry_out(self, settlement: Settlement) -> None:
        """Do with a reservation what an exchange says."""
        if settlement.tokens is None:
            settlement.keep()
        else:
            settlement.settled(self.limiter.settle(settlement.reservation, settlement.tokens))

    def levels(self, who: Identity = ALICE, model: str = MODEL, now_us: int = NOW_US) -> dict[str, int]:
        """Return the level of every bucket on a caller's path, by the bucket's name."""
        return {str(state.name): state.level for state in self.limiter.peek(who, model, now_us)}

    def stored(self, *scopes: str) -> list[Any]:
        """Return the tokens' buckets of some scopes as the table keeps them."""
        return [self.table.state(named(scope).key) for scope in scopes]
