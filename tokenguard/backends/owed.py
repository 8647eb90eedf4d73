"""What Redis has not been told of yet: charges and refunds by bucket, for when it can be."""

from __future__ import annotations

from collections.abc import Iterable

from tokenguard._bucket import MAX_PLAN
from tokenguard.backends.batch import MAX_CALLS, Call, Kind, Ref

MAX_BUCKETS = 100_000
"""For how many buckets something may be owed; what comes after is dropped, and counted."""


class Owed:
    """Amounts add up by bucket, so that an outage of any length takes bounded memory.

    Refunds are settled before charges, whatever the order in which they came: a refund to a bucket that has filled
    up meanwhile is lost, and must not pay for what was spent.

    Attributes:
        dropped: How many tokens were not remembered for want of room.
    """

    def __init__(self) -> None:
        self._refunds: dict[Ref, int] = {}
        self._charges: dict[Ref, int] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._refunds) + len(self._charges)

    def add(self, refs: Iterable[Ref], amounts: Iterable[int]) -> None:
        """Remember deltas of either sign."""
        for ref, amount in zip(refs, amounts, strict=True):
            if not amount:
                continue
            owed = self._charges if amount > 0 else self._refunds
            if ref in owed or len(self) < MAX_BUCKETS:
                owed[ref] = owed.get(ref, 0) + amount
            else:
                self.dropped += abs(amount)

    def take(self) -> list[Call]:
        """Return as much as goes into one batch, as settlements, and remember it no more."""
        calls: list[Call] = []
        while len(calls) < MAX_CALLS and (owed := self._refunds or self._charges):
            some = [owed.popitem() for _ in range(min(MAX_PLAN, len(owed)))]
            calls.append(Call(Kind.SETTLE, tuple(ref for ref, _ in some), tuple(amount for _, amount in some)))
        return calls
