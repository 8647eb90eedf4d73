"""What the operator has to see to: that the provider wants to be paid."""

from __future__ import annotations

import logging

from tokenguard._bucket import BucketTable
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.provider_limits.seldom import Seldom
from tokenguard.providers.limits import QUOTA_CODES

STALE_S = 300
"""An alarm that nothing confirms ends by itself after so long."""

LINES = 3
"""So often the log tells in a minute that an alarm begins, and that it ends."""

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
            self._table.tally(_name(code)).set(self._told_ms)
            self.raised = True
            if code not in before:
                self._write(True, now_s)

    def clear(self, now_s: float) -> None:
        """A call has been answered."""
        with self._lock:
            if not self.standing(now_s):
                return
            self._table.tally(_CLEARED).set(int(now_s * 1000))
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
