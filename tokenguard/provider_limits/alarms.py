"""What the operator has to be told of the provider: that it wants to be paid, and that somebody else spends."""

from __future__ import annotations

import logging
import math
import threading

from tokenguard._bucket import BucketTable
from tokenguard.backends.workers import state
from tokenguard.provider_limits.seldom import Seldom
from tokenguard.providers.limits import QUOTA_CODES

STALE_S = 300
"""An alarm that nothing confirms ends by itself after so long."""

LINES = 3
"""So often the log tells in a minute that an alarm begins, and that it ends."""

OTHERS = b"provider_others_tokens_per_minute"
"""The tally of each process's part in what others spend."""

MAX_MODELS = 256
"""Of so many models at most it is remembered what others spend."""

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
        self._lock = threading.Lock()
        self._lines = Seldom(LINES)
        self._unwritten: bool | None = None
        self.raised = False

    def sound(self, code: str, now_s: float) -> None:
        """The provider has said so; ``now_s`` is the time since the epoch."""
        if code not in QUOTA_CODES:
            code = "insufficient_quota"
        with self._lock:
            new = not self.standing(now_s)
            state(self._table, _name(code), int(now_s * 1000))
            self.raised = True
            if new:
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
        """Write how things are, if that was not said when they became so, for the same had just been said."""
        with self._lock:
            if self._unwritten is bool(self.standing(now_s)):
                self._write(self._unwritten, now_s)

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
    """Somebody else spends what the key is granted: less remains than is left of what went through here.

    How much is a lower bound: what calls here were charged beyond what the provider counted hides as much of it. A
    process sees its part: whichever process is told first that less remains lowers the level for all.

    Args:
        table: The node's table.

    Attributes:
        processes: Among how many processes the calls are spread.
    """

    AVERAGED_S = 60.0
    NOTABLE_TOKENS_PER_MINUTE = 1000.0
    NOTABLE_PART = 0.05
    LASTING_S = 20.0

    def __init__(self, table: BucketTable) -> None:
        self.processes = 1
        self._tally = table.tally(OTHERS)
        self._shown = 0
        self._lock = threading.Lock()
        self._models: dict[str, _Spending] = {}

    def spent(self, model: str, fewer: int, moved: int, limit: int, now_s: float) -> None:
        """Take in that our level of a model's bucket had to be lowered.

        What is given back afterwards was not spent by others: an answer that overtook another, perhaps.

        Args:
            model: The model.
            fewer: By how many tokens.
            moved: By how many it has been raised in all, ``fewer`` taken off already.
            limit: What the bucket holds.
            now_s: The time, by a clock that is never set.
        """
        with self._lock:
            spending = self._models.get(model)
            if spending is None:
                if len(self._models) >= MAX_MODELS:
                    self._models.clear()
                spending = self._models[model] = _Spending(moved + fewer, now_s)
            spending.add(spending.moved - moved, now_s, self.AVERAGED_S)
            spending.moved = moved
            spending.notable = max(self.NOTABLE_TOKENS_PER_MINUTE, self.NOTABLE_PART * limit)
            rate = spending.per_minute(now_s, self.AVERAGED_S) * self.processes
            lasting = now_s - spending.began_s >= self.LASTING_S
            if not spending.told and lasting and spending.in_all * self.processes >= spending.notable:
                spending.told = True
                _log.warning(
                    "somebody else uses the provider's key: of %s about %d tokens per minute are spent beside "
                    "what goes through here",
                    model,
                    rate,
                )
        self.look(now_s)

    def look(self, now_s: float) -> dict[str, int]:
        """Return the models of which others spend a notable amount, and about how many tokens per minute."""
        with self._lock:
            rates = {}
            for model, spending in list(self._models.items()):
                spending.add(0, now_s, self.AVERAGED_S)
                rate = spending.per_minute(now_s, self.AVERAGED_S) * self.processes
                if spending.told and rate >= spending.notable / 2:
                    rates[model] = round(rate)
                elif spending.told or abs(rate) < self.NOTABLE_TOKENS_PER_MINUTE / 100:
                    del self._models[model]
            shown = sum(rates.values()) // self.processes
            self._tally.add(shown - self._shown)
            self._shown = shown
            return rates


class _Spending:
    """Tokens per minute, averaged so that what is long past counts less and less."""

    def __init__(self, moved: int, now_s: float) -> None:
        self.moved = moved
        self.began_s = now_s
        self.told = False
        self.notable = 0.0
        self.in_all = 0.0
        self._at_s = now_s

    def add(self, tokens: int, now_s: float, averaged_s: float) -> None:
        """Take in what was spent just now."""
        self.in_all = self.in_all * math.exp(-(now_s - self._at_s) / averaged_s) + tokens
        self._at_s = now_s

    def per_minute(self, now_s: float, averaged_s: float) -> float:
        """Return how much was spent; of what began just now, as if it had always been so."""
        seen_s = averaged_s * -math.expm1(-(now_s - self.began_s) / averaged_s)
        return self.in_all * 60 / max(seen_s, 1.0)
