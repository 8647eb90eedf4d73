"""Finds that somebody else spends what the provider's key is granted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from hashlib import blake2b

from tokenguard._bucket import BucketTable
from tokenguard.backends.workers import living
from tokenguard.headroom import Headroom
from tokenguard.model import BucketName, Budget, Meter
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.provider_limits.learned import per_minute, window_of
from tokenguard.providers.limits import MINUTE_S

OTHERS = {
    Meter.TOKENS: b"provider_others_tokens_per_minute",
    Meter.REQUESTS: b"provider_others_requests_per_minute",
}
"""The tallies of each process's part in what others spend."""

NOTABLE = {Meter.TOKENS: 1000, Meter.REQUESTS: 10}
NOTABLE_PART = 0.1
"""What others spend is told of if it is so much at least, and such a part of the limit."""
LASTING_S = 30.0
"""How long that must have been so; thrice as long where calls of several processes overtake each other."""
AVERAGED_S = 60.0, 600.0
"""Over what time it is averaged: of a limit for a minute, and for a day."""

MAX_SHARED = 32
"""Of so many limits processes tell each other what they find."""

_FOUND, _TELLS = b"provider_others_found\x1f", b"provider_others_told\x1f"
"""The tallies of each process's part in what others spend of a limit, and of whether it tells of that."""

_log = logging.getLogger("tokenguard")


class Others:
    """Somebody else spends what the key is granted: the provider counts more than what went through here.

    How much is a lower bound: what calls here were charged beyond what the provider counted hides as much of it,
    and what flows into a full bucket is lost unseen. Who counts in windows looks like somebody who spends.

    A process finds what was counted between its own calls. Of a limit of which one suspects something, all that
    share the table tell what they find, and each adds that up: they say the same, and one writes it to the log.

    Args:
        table: The node's table.
    """

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._lock = ForkedLock()
        self._spending: dict[BucketName, _Spending] = {}

    def look(self, followed: Iterable[tuple[Budget, Headroom]], now_s: float) -> dict[Meter, dict[str, int]]:
        """Return of which models others spend a notable amount, and about how much per minute.

        Args:
            followed: The provider's limits, and what is known of its counts.
            now_s: The time, by a clock that is never set.
        """
        found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}
        parts = dict.fromkeys(OTHERS, 0.0)
        with self._lock:
            node = _Node(self._table)
            lasting_s = LASTING_S if node.processes == 1 else 3 * LASTING_S
            before, self._spending = self._spending, {}
            for budget, room in followed:
                if not room.known or room.drift.in_windows:
                    continue
                name = budget.name
                spending = self._spending[name] = before.get(name) or _Spending(budget, room.drift.missed, now_s)
                part = spending.add(room.drift.missed, now_s)
                rate = node.add_up(name, part, is_suspected=part * node.processes >= _notable(budget) / 2)
                was_told, is_told = spending.told, spending.is_told(budget, rate, now_s, lasting_s)
                is_first = node.tell(name, is_told)
                if is_told:
                    found[name.meter][name.model or ""] = round(rate)
                    parts[name.meter] += part
                if is_told and not was_told and is_first:
                    _log.warning(
                        "somebody else uses the provider's key: of %s about %d %s per minute are spent beside "
                        "what goes through here",
                        name.model,
                        rate,
                        name.meter,
                    )
            node.forget_all_but(self._spending)
            for meter, part in parts.items():
                node.put(OTHERS[meter], round(part))
        return found


class _Node:
    """What the processes that share a table tell each other of what they find, as it is now.

    Attributes:
        processes: How many they are.
    """

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._told = table.tallies()
        self._others = living(table).keys() - {table.held_row}
        self.processes = len(self._others) + 1

    def add_up(self, name: BucketName, part: float, *, is_suspected: bool) -> float:
        """Return what all find of a limit, of which this process finds a part; what is not told is alike."""
        found = _FOUND + _short(name)
        if found not in self._told and is_suspected and self.processes > 1:
            self._begin(found)
        if found not in self._told:
            return part * self.processes
        self.put(found, round(part))
        return part + sum(self._told[found][row] for row in self._others)

    def _begin(self, found: bytes) -> None:
        """Have all tell what they find of a limit, if there is room."""
        if sum(name.startswith(_FOUND) for name in self._told) < MAX_SHARED:
            self._table.tally(found)
            self._told = self._table.tallies()

    def tell(self, name: BucketName, is_told: bool) -> bool:
        """Say whether this process tells of a limit; return whether no other one does, as far as is known."""
        short = _short(name)
        if _FOUND + short not in self._told:
            return True
        self.put(_TELLS + short, int(is_told))
        rows = self._told.get(_TELLS + short)
        return rows is None or not any(rows[row] for row in self._others)

    def forget_all_but(self, kept: Iterable[BucketName]) -> None:
        """Find nothing of other limits."""
        short = {_short(name) for name in kept}
        for name in self._told:
            if name.startswith((_FOUND, _TELLS)) and name.partition(b"\x1f")[2] not in short:
                self.put(name, 0)

    def put(self, name: bytes, number: int) -> None:
        """Have this process's tally tell a number."""
        tally = self._table.tally(name)
        if name not in self._told:
            self._told = self._table.tallies()
        if (rows := self._told.get(name)) is not None:
            tally.add(number - rows[self._table.held_row])
            rows[self._table.held_row] = number


def _short(name: BucketName) -> bytes:
    """Return what a tally knows a limit by, whose name may be too long."""
    return blake2b(name.key, digest_size=16).hexdigest().encode()


class _Spending:
    """What others spend of one limit, averaged so that what is long past counts less and less.

    Attributes:
        told: Whether it was worth telling when that was asked last.
    """

    def __init__(self, budget: Budget, missed: int, now_s: float) -> None:
        self._averaged_s = AVERAGED_S[window_of(budget) > MINUTE_S]
        self._missed = missed
        self._began_s = self._at_s = now_s
        self._in_all = 0.0
        self._seen_s = 0.0
        self._notable_s: float | None = None
        self.told = False

    def add(self, missed: int, now_s: float) -> float:
        """Take in what the provider has counted beyond our charges; return the rate per minute.

        What began just now counts as if it had always been so.
        """
        fading = math.exp(-(now_s - self._at_s) / self._averaged_s)
        self._in_all = self._in_all * fading + (missed - self._missed) * math.sqrt(fading)  # since half the time
        self._missed, self._at_s = missed, now_s
        self._seen_s = max(1.0, self._averaged_s * -math.expm1(-(now_s - self._began_s) / self._averaged_s))
        return self._in_all * 60 / self._seen_s

    def is_told(self, budget: Budget, rate: float, now_s: float, lasting_s: float) -> bool:
        """Return whether a rate is worth telling: what is notable has to last, for calls overtake each other."""
        notable = _notable(budget) / 2 if self.told else _notable(budget)
        if rate < notable or rate / 60 * self._seen_s < NOTABLE[budget.name.meter]:
            self._notable_s, self.told = None, False
        elif self._notable_s is None:
            self._notable_s = now_s
        self.told = self.told or (self._notable_s is not None and now_s - self._notable_s >= lasting_s)
        return self.told


def _notable(budget: Budget) -> float:
    return NOTABLE_PART * per_minute(budget)
