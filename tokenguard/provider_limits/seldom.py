"""What happens to many calls alike is worth a line in the log once in a while."""

from __future__ import annotations

import math

SILENCE_S = 60.0
"""How long after a line there is no other of the same."""

MAX_LINES = 1024
"""Of so many lines it is remembered when they were written."""


class Seldom:
    """Remembers which lines were written lately."""

    def __init__(self) -> None:
        self._written_s: dict[str, float] = {}

    def is_due(self, line: str, now_s: float) -> bool:
        """Return whether to write a line; from now on it has been.

        Args:
            line: What it is known by.
            now_s: The time; of a clock that was set back, nothing is known.
        """
        if 0 <= now_s - self._written_s.get(line, -math.inf) < SILENCE_S:
            return False
        while len(self._written_s) >= MAX_LINES:
            self._written_s.pop(next(iter(self._written_s)), None)
        self._written_s[line] = now_s
        return True
