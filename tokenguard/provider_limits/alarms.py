"""What the operator has to be told of the provider: that it wants to be paid, and that somebody else spends."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from tokenguard._bucket import BucketTable
from tokenguard.backends.workers import state
from tokenguard.headroom import Headroom
from tokenguard.model import BucketName, Budget, Meter
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.provider_limits.learned import per_minute, window_of
from tokenguard.provider_limits.seldom import Seldom
from tokenguard.providers.limits import MINUTE_S, QUOTA_CODES

STALE_S = 300
"""An alarm that nothing confirms ends by itself after so long."""

LINES = 3
"""So often the log tells in a minute that an alarm begins, and that it ends."""

OTHERS = {
    Meter.TOKENS: b"provider_others_tokens_per_minute",
    Meter.REQUESTS: b"provider_others_requests_per_minute",
}
"""The tallies of each process's part in what others spend."""

NOTABLE = {Meter.TOKENS: 1000, Meter.REQUESTS: 10}
NOTABLE_PART = 0.1
"""What others spend is told of if it is so much at least, and such a part of the limit."""
LASTING_S = 30.0
"""How long that must have been so; twice as long where calls of several processes overtake each other."""
AVERAGED_S = 60.0, 600.0
"""Over what time it is averaged: of a limit for a minute, and for a day."""

_CLEARED = b"provider_alarm_cleared"
"""The tally of when a call was answered while an alarm stood."""

_log = logging.getLogger("tokenguard")


class Alarms:
    """The provider refuses calls until somebody pays, or raises a limit of the account's.

    The node's table has when a process was told so last, in ms since the epoch, and when a call was answered after
    that: whichever process sees the account come alive again, it does for all.

    Args:
        table: The table.

    Attributes:
        raised: Whether an alarm stands, as far as this process knows: then it wants to know of an answered call.
    """

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._lock = ForkedLock()
        self._lines = Seldom(LINES)
        self._unwritten: bool | None = None
        self._told_ms: int | None = None
        self.raised = False

    def sound(self, code: str, now_s: float) -> None:
        """The provider has said so; ``now_s`` is the time since the epoch."""
        if code not in QUOTA_CODES:
            code = "insufficient_quota"
        with self._lock:
            before = self.standing(now_s)
            self._told_ms = int(now_s * 1000)
            state(self._table, _name(code), self._told_ms)
            self.raised = True
            if code not in before:
                self._write(True, now_s)

    def clear(self, now_s: float) -> None:
        """A call has been answered."""
        with self._lock:
            if not self.standing(now_s):
                return
            state(self._table, _CLEARED, int(now_s * 1000))
            self.raised = False
            self._write(False, now_s)

    def look(self, now_s: float) -> None:
        """Write how things are, if that was not said when they became so: they did by themselves, or too often."""
        with self._lock:
            stands = bool(self.standing(now_s))
            if self._unwritten is stands:
                self._write(stands, now_s)
            if self._told_ms is not None and not stands:
                cleared = max(self._table.tallies().get(_CLEARED, ()), default=0) >= self._told_ms
                self._told_ms = None
                if not cleared:
                    _log.warning("the provider has not refused calls for want of money for %d s", STALE_S)

    def _write(self, stands: bool, now_s: float) -> None:
        """Log that calls are refused, or answered again: once in a while, if some are and others are not."""
        codes = ", ".join(self.standing(now_s))
        self._unwritten = None if self._lines.is_due(codes, now_s) else stands
        if self._unwritten is not None:
            return
        if stands:
            _log.error("the provider refuses calls until somebody sees to the account: %s", codes)
        else:
            _log.warning("the provider answers calls again")

    def standing(self, now_s: float) -> list[str]:
        """Return the codes that a process of the node was told lately, and since a call was answered.

        What was told in the future was so before the clock was set back: nobody knows when.
        """
        now_ms, tallies = int(now_s * 1000), self._table.tallies()
        cleared_ms = max((at_ms for at_ms in tallies.get(_CLEARED, ()) if at_ms <= now_ms), default=0)
        since_ms = max(cleared_ms, now_ms - STALE_S * 1000)
        found = [
            code
            for code in sorted(QUOTA_CODES)
            if any(since_ms < at_ms <= now_ms for at_ms in tallies.get(_name(code), ()))
        ]
        self.raised = bool(found)
        return found


def _name(code: str) -> bytes:
    return b"provider_alarm\x1f" + code.encode()


class Others:
    """Somebody else spends what the key is granted: the provider counts more than what went through here.

    How much is a lower bound: what calls here were charged beyond what the provider counted hides as much of it,
    and what flows into a full bucket is lost unseen. Who counts in windows looks like somebody who spends.

    Args:
        table: The node's table.
    """

    def __init__(self, table: BucketTable) -> None:
        self._tallies = {meter: table.tally(name) for meter, name in OTHERS.items()}
        self._parts = dict.fromkeys(OTHERS, 0)
        self._found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}
        self._lock = ForkedLock()
        self._spending: dict[BucketName, _Spending] = {}

    def look(
        self, followed: Iterable[tuple[Budget, Headroom]], processes: int, now_s: float
    ) -> dict[Meter, dict[str, int]]:
        """Return of which models others spend a notable amount, and about how much per minute.

        Args:
            followed: The provider's limits, and what is known of its counts.
            processes: How many share what they find out.
            now_s: The time, by a clock that is never set.
        """
        found: dict[Meter, dict[str, int]] = {meter: {} for meter in OTHERS}
        with self._lock:
            before, self._spending = self._spending, {}
            for budget, room in followed:
                if not room.known or room.drift.in_windows:
                    continue
                name = budget.name
                spending = self._spending[name] = before.get(name) or _Spending(budget, room.drift.missed, now_s)
                rate = spending.add(room.drift.missed, now_s)
                if spending.is_told(budget, rate, now_s, LASTING_S if processes == 1 else 2 * LASTING_S):
                    found[name.meter][name.model or ""] = round(rate * processes)
            for meter, rates in found.items():
                for model in rates.keys() - self._found[meter].keys():
                    _log.warning(
                        "somebody else uses the provider's key: of %s about %d %s per minute are spent beside "
                        "what goes through here",
                        model,
                        rates[model],
                        meter,
                    )
                part = round(sum(rates.values()) / processes)
                self._tallies[meter].add(part - self._parts[meter])
                self._parts[meter] = part
            self._found = found
        return found


class _Spending:
    """What others spend of one limit, averaged so that what is long past counts less and less."""

    def __init__(self, budget: Budget, missed: int, now_s: float) -> None:
        self._averaged_s = AVERAGED_S[window_of(budget) > MINUTE_S]
        self._missed = missed
        self._began_s = self._at_s = now_s
        self._in_all = 0.0
        self._notable_s: float | None = None
        self._told = False

    def add(self, missed: int, now_s: float) -> float:
        """Take in what the provider has counted beyond our charges; return the rate per minute.

        What began just now counts as if it had always been so.
        """
        fading = math.exp(-(now_s - self._at_s) / self._averaged_s)
        self._in_all = self._in_all * fading + (missed - self._missed) * math.sqrt(fading)  # since half the time
        self._missed, self._at_s = missed, now_s
        seen_s = self._averaged_s * -math.expm1(-(now_s - self._began_s) / self._averaged_s)
        return self._in_all * 60 / max(seen_s, 1.0)

    def is_told(self, budget: Budget, rate: float, now_s: float, lasting_s: float) -> bool:
        """Return whether it is worth telling: what is notable has to last, for calls overtake each other."""
        notable = NOTABLE_PART * per_minute(budget)
        if rate < (notable / 2 if self._told else notable) or self._in_all < NOTABLE[budget.name.meter]:
            self._notable_s, self._told = None, False
        elif self._notable_s is None:
            self._notable_s = now_s
        self._told = self._told or (self._notable_s is not None and now_s - self._notable_s >= lasting_s)
        return self._told
