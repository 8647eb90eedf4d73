"""What is done beside the calls: at once, or when its time has come, in a thread of its own."""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from itertools import count

PATIENCE_S = 2.0
"""How long who stops waits for what is under way, which may be an answer of the provider's."""

_log = logging.getLogger("tokenguard")


class Background:
    """Does one thing after the other, in a thread that begins with the first. Each sees to its own errors."""

    def __init__(self) -> None:
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def soon(self, work: Callable[[], None]) -> None:
        """Do something as soon as can be."""
        self.after(0.0, work)

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Do something in some seconds."""
        with self._changed:
            if self._stopping:
                return
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tokenguard-provider", daemon=True)
                self._thread.start()
            self._changed.notify()

    def stop(self) -> None:
        """Do nothing more; what is under way has a moment to end."""
        with self._changed:
            self._stopping = True
            self._due.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(PATIENCE_S)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                _log.exception("what was learned of the provider's limits is lost")

    def _next(self) -> Callable[[], None] | None:
        """Wait for what is due; return None when nothing is to be done any more."""
        with self._changed:
            while not self._stopping:
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait_s)
        return None


_all: weakref.WeakSet[Background] = weakref.WeakSet()


def _after_fork() -> None:
    for background in list(_all):
        background._begin()  # noqa: SLF001 - of this module; threads are not forked


os.register_at_fork(after_in_child=_after_fork)
