"""What the provider counts beyond our charges: by that it shows that somebody else spends what its key is granted.

Each answer tells what remained when the provider counted a call; our level at the same moment of the same call is
known. How far apart they are changes with what the provider counted and we did not charge, and with nothing else,
as long as neither bucket was full: what flows into a full bucket is lost, here and there not at the same time.

We charge what a provider may count at most. OpenAI counts less, and what somebody else spends would hide in that.
So calls next to each other are looked at, whether they are counted for the least that any provider counts.

The calls of all processes of a node are one sequence here: what must be known of each other's is shared.
"""

from __future__ import annotations

from tokenguard._bucket import Shared

_AMPLE = 2**52
_REMEMBERED = 64
"""So many calls are remembered until the answer of the next one comes."""
_CLOSE = 4
"""Calls with more than so many between them are not next to each other."""
_NEAR = 8
_TRANSIT = 6000
"""What flows in within 10 ms, as a part of a minute's limit: by so much calls differ in how long they travel."""
_FITS = 4
_BELIEVED = 64
"""What is shown so often is believed. A pair that fits shows more than several that do not: others may have been
counted in between, or calls have overtaken each other."""

_TURNS, _FULL_AT, _SURPLUS, _SHOWN = range(4)
"""The numbers that are shared: how many calls were charged, which was the latest that found the bucket full, by
how much all were charged more than the least that counts, and how well it is shown that this counts."""


class Charge:
    """What a call was charged of a bucket of the provider's.

    Attributes:
        turn: The call's number.
        number: The call's number, of those of this process.
        level: What the charge left in our bucket.
        cost: What was charged.
        moved: By how much our level had been raised by then, on the provider's word.
        surplus: By how much this call and all before it were charged more than the least that counts.
        full_at: The number of the latest call by then that found our bucket full.
        above: By how much the provider's bucket was above ours, had ours never been raised; the answer tells it.
    """

    def __init__(
        self, turn: int, number: int, level: int, cost: int, moved: int, surplus: int, full_at: int
    ) -> None:
        self.turn = turn
        self.number = number
        self.level = level
        self.cost = cost
        self.moved = moved
        self.surplus = surplus
        self.full_at = full_at
        self.above = 0


class Drift:
    """Of one bucket, as one process sees it.

    Args:
        shared: What all processes of a node know of it.

    Attributes:
        missed: How many tokens the provider counted beyond our charges, in all; what it did not count of those is
            taken off.
        heard: The latest call of this process whose answer told what remained.
        in_windows: Whether the provider counts in windows, and has no bucket that fills all the time: then none of
            this holds.
    """

    def __init__(self, shared: Shared) -> None:
        self.missed = 0
        self.heard: Charge | None = None
        self.in_windows = False
        self._shared = shared
        self._limit = _AMPLE
        self._number = 0
        self._answered: list[Charge | None] = [None] * _REMEMBERED

    def hold(self, limit: int) -> None:
        """Take in what the bucket holds."""
        if limit != self._limit:
            self._limit = limit
            # what the level is from now on has nothing to do with what it was
            self._shared.set(_FULL_AT, self._shared.get(_TURNS) + 1)

    def charge(self, level: int, cost: int, moved: int) -> Charge:
        """Take in a call that has just been charged; see ``Charge``."""
        self._number += 1
        turn = self._shared.add(_TURNS, 1)
        full_at = self._shared.get(_FULL_AT)
        if level + cost >= self._limit and turn > full_at:
            full_at = turn
            self._shared.set(_FULL_AT, turn)
        return Charge(turn, self._number, level, cost, moved, self._shared.get(_SURPLUS), full_at)

    def expect(self, charge: Charge, least: int) -> None:
        """Take in for how many tokens the provider counts a call at least."""
        charge.surplus = self._shared.add(_SURPLUS, max(0, charge.cost - least))

    def told(self, remaining: int, charge: Charge, in_windows: bool) -> None:
        """Take in what remained when the provider counted a call; see ``Headroom.told``."""
        self.in_windows = in_windows
        charge.above = remaining - charge.level + charge.moved
        heard = self.heard
        full = remaining + charge.cost >= self._limit
        shown = self._shared.get(_SHOWN)
        if shown < _BELIEVED:
            self._compare(charge, full, shown)
        if heard is not None and charge.turn < heard.turn:
            return  # what is told of a call after which another was heard of is of the past
        if heard is not None and self._shared.get(_FULL_AT) <= heard.turn and not full:
            self.missed += heard.above - charge.above
            if shown >= _BELIEVED:
                self.missed += charge.surplus - heard.surplus
        self.heard = charge

    def _compare(self, charge: Charge, full: bool, shown: int) -> None:
        """Look at whether the provider counts the least: once that is believed, it is for good."""
        self._answered[charge.number % _REMEMBERED] = charge
        before = self._answered[(charge.number - 1) % _REMEMBERED]
        if before is None or before.number != charge.number - 1 or charge.turn - before.turn > _CLOSE:
            return
        if charge.full_at > before.turn or full:
            return
        surplus = charge.surplus - before.surplus
        near = _NEAR + surplus // 32 + self._limit // _TRANSIT
        if surplus > 4 * near:
            fits = abs(charge.above - before.above - surplus) <= near
            self._shared.set(_SHOWN, max(0, shown + (_FITS if fits else -1)))
