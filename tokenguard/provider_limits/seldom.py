"""What happens to many calls alike is worth a line in the log once in a while."""

from __future__ import annotations

PERIOD_S = 60.0
"""For so long it is remembered that a line was written."""

MAX_LINES = 1024
"""Of so many lines it is."""


class Seldom:
    """Remembers which lines were written lately.

    Args:
        times: How often the same may be written in a period.
    """

    def __init__(self, times: int = 1) -> None:
        self._times = times
        self._written_s: dict[str, tuple[float, ...]] = {}

    def is_due(self, line: str, now_s: float) -> bool:
        """Return whether to write a line; then it counts as written.

        Args:
            line: What it is known by.
            now_s: The time; what was written later was so before the clock was set back, and is forgotten.
        """
        lately = tuple(at_s for at_s in self._written_s.get(line, ()) if 0 <= now_s - at_s < PERIOD_S)
        if len(lately) >= self._times:
            return False
        while len(self._written_s) >= MAX_LINES:
            self._written_s.pop(next(iter(self._written_s)), None)
        self._written_s[line] = (*lately, now_s)
        return True
