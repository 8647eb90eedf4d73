"""Finds that somebody else spends what the provider's key is granted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

from tokenguard.backends import Backend
from tokenguard.backends.workers import TELLS, changing, living
from tokenguard.drift import Drift
from tokenguard.errors import BackendDown, TableBusy
from tokenguard.headroom import Headroom
from tokenguard.model import BucketName, Budget, Meter
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.provider_limits.learned import per_minute, window_of
from tokenguard.providers.limits import MINUTE_S

OTHERS = {
    Meter.TOKENS: b"provider_others_tokens_per_minute",
    Meter.REQUESTS: b"provider_others_requests_per_minute",
}
"""The tallies of what each process makes of what others spend."""

NOTABLE = {Meter.TOKENS: 1000, Meter.REQUESTS: 10}
NOTABLE_PART = 0.1
"""What others spend is told of if it is so much at least, and such a part of the limit."""
LASTING_S = 40.0
"""How long that must have been so; thrice as long where calls of several nodes overtake each other."""
AVERAGED_S = 60.0, 600.0
"""Over what time it is averaged: of a limit for a minute, and for a day."""

SUSPECTED_PART = 0.25
"""Of so much of what is notable, the other nodes are told."""

MAX_LIMITS = 32
"""Of so many limits; and of so many the processes of a node tell each other."""

TOPIC = "others"
"""What nodes say of it is known by this name."""
TOPIC_S = 60.0
"""How long that holds; it is said anew every time that something is heard of."""

_log = logging.getLogger("tokenguard")


class Others:
    """Somebody else spends what the key is granted: the provider counts more than what went through here.

    How much is a lower bound: what calls here were charged beyond what the provider counted hides as much of it,
    and what flows into a full bucket is lost unseen. Who counts in windows looks like somebody who spends.

    All processes of a node find it, and one logs it. Nodes that share the budgets find a part each: of what they
    suspect they tell each other, and add it up.

    Args:
        backend: Shares the budgets.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = ForkedLock()
        self._spending: dict[BucketName, _Spending] = {}
        self._elsewhere: dict[str, int] = {}
        self._found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}

    def look(self, followed: Iterable[tuple[Budget, Headroom]], now_s: float) -> dict[Meter, dict[str, int]]:
        """Look at what others spend; it may take a while.

        Args:
            followed: The provider's limits, and what is known of its counts.
            now_s: The time, by a clock that is never set.

        Returns:
            Of which models they spend a notable amount, and about how much per minute.
        """
        with self._lock:
            found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}
            before, self._spending, here = self._spending, {}, {}
            for budget, room in followed:
                if room.drift.heard is None or room.drift.in_windows:
                    continue
                name, known_by = budget.name, budget.name.digest.hex()
                spending = self._spending[name] = before.get(name) or _Spending(budget, room.drift, now_s)
                part, elsewhere = spending.add(room.drift, now_s), self._elsewhere.get(known_by)
                rate = self._judge(budget, spending, part, elsewhere, now_s)
                if rate is not None:
                    found[name.meter][name.model or ""] = rate
                is_suspected = elsewhere is not None or part >= SUSPECTED_PART * _notable(budget)
                if spending.is_news and is_suspected:  # else another process of the node may know more
                    here[known_by] = round(part)
            for name in before.keys() - self._spending.keys():
                if before[name].told:
                    self._say(name, 0)
            for meter, rates in found.items():
                self._backend.table.tally(OTHERS[meter]).set(sum(rates.values()))
            self._found = found
            self._elsewhere = self._exchanged(dict(islice(here.items(), MAX_LIMITS)))
        return found

    def _judge(
        self, budget: Budget, spending: _Spending, part: float, elsewhere: int | None, now_s: float
    ) -> int | None:
        """Return what others spend of a limit, if that is worth telling; whoever finds so first logs it.

        Args:
            budget: The limit.
            spending: What is known of it.
            part: What this node finds.
            elsewhere: What other nodes do; None if they tell nothing.
            now_s: The time.
        """
        rate, lasting_s = part + (elsewhere or 0), LASTING_S if elsewhere is None else 3 * LASTING_S
        was_told, is_told = spending.told, spending.is_told(budget, rate, now_s, lasting_s)
        if not is_told:
            if was_told:
                self._say(budget.name, 0)
            return None
        is_first = self._say(budget.name, max(1, round(rate)))
        if is_first and not was_told:
            _log.warning(
                "somebody else uses the provider's key: of %s about %d %s per minute are spent beside "
                "what goes through here",
                budget.name.model,
                rate,
                budget.name.meter,
            )
        return round(rate)

    def told(self, names: Iterable[BucketName]) -> dict[Meter, dict[str, int]]:
        """Return what was found last: by any process of the node, of these limits; by this one, of all.

        Args:
            names: The learned limits.
        """
        told = {meter: dict(rates) for meter, rates in self._found.items()}
        tallies, rows = self._backend.table.tallies(), living(self._backend.table)
        for name in names:
            numbers = tallies.get(_tells(name))
            if numbers is not None and name.meter in told:
                rate = max((numbers[row] for row in rows), default=0)
                if rate:
                    told[name.meter].setdefault(name.model or "", rate)
        return told

    def _say(self, name: BucketName, rate: int) -> bool:
        """Say what this process tells of a limit, 0 for nothing; return whether no other one of the node does."""
        table, tells = self._backend.table, _tells(name)
        with suppress(TableBusy), changing(table):  # of two who say so at once, one is first
            tallies = table.tallies()
            if tells in tallies or sum(one.startswith(TELLS) for one in tallies) < MAX_LIMITS:
                table.tally(tells).set(rate)
                rows = tallies.get(tells)
                return rows is None or not any(rows[row] for row in living(table).keys() - {table.held_row})
        return True

    def _exchanged(self, here: dict[str, int]) -> dict[str, int]:
        """Tell other nodes what this one finds; return what they do, all together."""
        elsewhere: dict[str, int] = {}
        if self._spending:
            with suppress(BackendDown):
                for known_by, part in self._backend.share(TOPIC, here, TOPIC_S):
                    elsewhere[known_by] = elsewhere.get(known_by, 0) + part
        return elsewhere


class _Spending:
    """What others spend of one limit, averaged so that what is long past counts less and less.

    Attributes:
        is_news: Whether an answer was heard of between the last two looks.
        told: Whether it was worth telling when that was asked last.
    """

    def __init__(self, budget: Budget, drift: Drift, now_s: float) -> None:
        self._averaged_s = AVERAGED_S[window_of(budget) > MINUTE_S]
        self._missed = drift.missed
        self._heard = drift.heard
        self._began_s = self._at_s = now_s
        self._in_all = 0.0
        self._seen_s = 0.0
        self._notable_s: float | None = None
        self.is_news = False
        self.told = False

    def add(self, drift: Drift, now_s: float) -> float:
        """Take in what the provider has counted beyond our charges; return the rate per minute.

        What began just now counts as if it had always been so. What is heard of after a while was spent all the
        while: to a process that has few calls, an answer tells what minutes have brought.
        """
        passed = (now_s - self._at_s) / self._averaged_s
        in_all = self._in_all * math.exp(-passed)
        self.is_news = drift.heard is not self._heard and passed > 0
        if self.is_news:
            in_all += (drift.missed - self._missed) * -math.expm1(-passed) / passed
            self._in_all, self._at_s, self._missed, self._heard = in_all, now_s, drift.missed, drift.heard
        self._seen_s = max(1.0, self._averaged_s * -math.expm1(-(now_s - self._began_s) / self._averaged_s))
        return in_all * 60 / self._seen_s

    def is_told(self, budget: Budget, rate: float, now_s: float, lasting_s: float) -> bool:
        """Return whether a rate is worth telling: what is notable has to last, for calls overtake each other."""
        notable = _notable(budget) / 2 if self.told else _notable(budget)
        if rate < notable or rate / 60 * self._seen_s < NOTABLE[budget.name.meter]:
            self._notable_s, self.told = None, False
        elif self._notable_s is None:
            self._notable_s = now_s
        self.told = self.told or (self._notable_s is not None and now_s - self._notable_s >= lasting_s)
        return self.told


def _tells(name: BucketName) -> bytes:
    """Return the name of the tally of what each process tells of a limit."""
    return TELLS + name.digest.hex().encode()


def _notable(budget: Budget) -> float:
    return NOTABLE_PART * per_minute(budget)
