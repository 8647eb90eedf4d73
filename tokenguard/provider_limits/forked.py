"""A lock that is free in a process that was forked off: whoever had it is not there."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class ForkedLock:
    """A lock for a thread at a time, of each process by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


_all: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_all):
        lock._lock = threading.Lock()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)
