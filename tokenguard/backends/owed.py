"""What Redis has not been told of yet: charges and refunds by bucket, for when it can be."""

from __future__ import annotations

from collections.abc import Iterable

from tokenguard._bucket import MAX_PLAN
from tokenguard.backends.batch import MAX_CALLS, Call, Kind, Ref

MAX_BUCKETS = 100_000
"""For how many buckets something may be owed; what comes after is dropped, and counted."""


class Owed:
    """Amounts add up by bucket, so that an outage of any length takes bounded memory.

    A refund makes what is owed less. What it exceeds that by gives back what Redis was told of; it is settled
    before the charges that came after it: had the bucket been full then, it would have been lost, and it must not
    pay for what was spent since.

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
            if amount > 0:
                self._remember(self._charges, ref, amount)
            elif amount < 0:
                self._refund(ref, -amount)

    def _refund(self, ref: Ref, amount: int) -> None:
        charged = self._charges.pop(ref, 0)
        if charged > amount:
            self._charges[ref] = charged - amount
        elif charged < amount:
            self._remember(self._refunds, ref, charged - amount)

    def _remember(self, owed: dict[Ref, int], ref: Ref, amount: int) -> None:
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
