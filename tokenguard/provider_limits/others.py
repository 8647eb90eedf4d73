"""Finds that somebody else spends what the provider's key is granted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b

from tokenguard._bucket import BucketTable
from tokenguard.backends import Backend
from tokenguard.backends.workers import living
from tokenguard.errors import BackendDown
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

SUSPECTED_PART = 0.25
"""Of so much of what is notable, all are asked what they find."""

MAX_SHARED = 32
"""Of so many limits they tell each other what they find."""

SHARED = "others"
"""What nodes say of it is known by this name."""
SHARED_S = 30.0
"""How long that holds; it is said anew more often."""

_FOUND, _TELLS = b"provider_others_found\x1f", b"provider_others_told\x1f"
"""The tallies of each process's part in what others spend of a limit, and of whether it tells of that."""

_log = logging.getLogger("tokenguard")


class Others:
    """Somebody else spends what the key is granted: the provider counts more than what went through here.

    How much is a lower bound: what calls here were charged beyond what the provider counted hides as much of it,
    and what flows into a full bucket is lost unseen. Who counts in windows looks like somebody who spends.

    A process finds what was counted between its own calls. Of a limit of which one suspects something, all who
    share the budgets tell what they find, and each adds that up: all say the same, and a node logs it once.

    Args:
        backend: Shares the budgets.

    Attributes:
        found: Of which models others spend a notable amount, and about how much per minute.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = ForkedLock()
        self._spending: dict[BucketName, _Spending] = {}
        self._elsewhere: _Parts = {}
        self.found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}

    def look(self, followed: Iterable[tuple[Budget, Headroom]], now_s: float) -> dict[Meter, dict[str, int]]:
        """Look at what others spend; it may take a while. Return what was found.

        Args:
            followed: The provider's limits, and what is known of its counts.
            now_s: The time, by a clock that is never set.
        """
        with self._lock:
            found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}
            parts = dict.fromkeys(OTHERS, 0.0)
            crew = _Crew(self._backend.table, self._elsewhere)
            before, self._spending = self._spending, {}
            for budget, room in followed:
                if not room.known or room.drift.in_windows:
                    continue
                name = budget.name
                spending = self._spending[name] = before.get(name) or _Spending(budget, room.drift.missed, now_s)
                part = spending.add(room.drift.missed, now_s)
                rate = crew.add_up(name, part, SUSPECTED_PART * _notable(budget))
                was_told, is_told = spending.told, spending.is_told(budget, rate, now_s, crew.lasting_s)
                is_first = crew.tell(name, is_told)
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
            crew.forget_all_but(self._spending)
            for meter, part in parts.items():
                crew.put(OTHERS[meter], round(part))
            self.found = found
            self._elsewhere = self._shared(crew.found_here)
        return found

    def _shared(self, here: dict[bytes, int]) -> _Parts:
        """Tell other nodes what this one finds; return what they do."""
        text = " ".join(f"{short.decode()}={part}" for short, part in here.items())
        try:
            said = self._backend.share(SHARED, text, SHARED_S)
        except BackendDown:
            return {}
        elsewhere: _Parts = {}
        for word in " ".join(said).split():
            short, _, part = word.partition("=")
            with suppress(ValueError):
                elsewhere.setdefault(short.encode(), []).append(int(part))
        return elsewhere


_Parts = dict[bytes, list[int]]
"""What others find of limits, by what a limit is known by."""


class _Crew:
    """What those who share the budgets tell each other of what they find, as it is now.

    Args:
        table: What the processes of this node share.
        elsewhere: What other nodes found.

    Attributes:
        lasting_s: For how long they must find it.
        found_here: What this node finds and other nodes are to know.
    """

    def __init__(self, table: BucketTable, elsewhere: _Parts) -> None:
        self._table = table
        self._told = table.tallies()
        self._beside = living(table).keys() - {table.held_row}
        self._elsewhere = elsewhere
        self.lasting_s = 3 * LASTING_S if self._beside or elsewhere else LASTING_S
        self.found_here: dict[bytes, int] = {}

    def add_up(self, name: BucketName, part: float, suspected: float) -> float:
        """Return what all find of a limit, of which this process finds a part; who does not tell finds as much.

        Args:
            name: The limit.
            part: The part.
            suspected: So much is worth asking all.
        """
        short = _short(name)
        here = self._here(_FOUND + short, part, suspected)
        if len(self.found_here) < MAX_SHARED and (here >= suspected or short in self._elsewhere):
            self.found_here[short] = round(here)
        return here + sum(self._elsewhere.get(short, ()))

    def _here(self, found: bytes, part: float, suspected: float) -> float:
        """Return what the processes of this node find."""
        alike = part * (len(self._beside) + 1)
        if found not in self._told and self._beside and alike >= suspected:
            self._begin(found)
        if found not in self._told:
            return alike
        self.put(found, round(part))
        return part + sum(self._told[found][row] for row in self._beside)

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
        return rows is None or not any(rows[row] for row in self._beside)

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
    """Return what a limit is known by, whose name may be too long."""
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
