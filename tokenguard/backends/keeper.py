"""What a process sees to now and then: the state on the disk, and siblings that share nothing with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import chain, repeat

from tokenguard._bucket import BucketTable
from tokenguard.backends.mirror import Mirror
from tokenguard.backends.state import StateFile, taken
from tokenguard.backends.workers import changing, unshared
from tokenguard.errors import StateUnwritable, TableBusy

PERIOD_S = 0.5
"""How often it looks. What is on the disk is at most two periods old."""

LOOKS_S = (1.0, 3.0, 30.0)
"""How long it waits before it looks for siblings, and looks again; the last of these over and over.

One is told of that was there twice, for it may only just be starting.
"""

FAILURES = b"state_failures"
"""What counts the times that the state could not be written."""

_log = logging.getLogger("tokenguard")


class Keeper:
    """Sees to it, in a thread of its own.

    Args:
        table: The table.
        budgets: Returns the explicit budgets as they are now.
        file: Where the state is kept; None to keep none.
    """

    def __init__(self, table: BucketTable, budgets: Callable[[], Mirror], file: StateFile | None) -> None:
        self._table = table
        self._budgets = budgets
        self._file = file
        self._saved_turn: int | None = None
        self._failure: str | None = None
        self._failures = table.tally(FAILURES)
        self._unshared: list[int] = []
        self._suspects: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def keeps(self) -> bool:
        """Whether there is a state to keep."""
        return self._file is not None

    @property
    def trouble(self) -> str | None:
        """What is wrong, if anything is."""
        found = [self._failure] if self._failure else []
        if self._unshared:
            found.append(_unshared_text(self._unshared))
        return "; ".join(found) or None

    # --- its thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look, if it does not yet."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tokenguard-keeper", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Save a last time, and look no more."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._begin()
        self._look_after_state(at_once=True)

    def forked(self) -> None:
        """Go on in a process that was forked off: threads are not."""
        if self._thread is not None:
            self._begin()
            self.start()

    def _run(self) -> None:
        looks = chain(LOOKS_S, repeat(LOOKS_S[-1]))
        look_s = time.monotonic() + next(looks)
        while not self._stopping.wait(PERIOD_S if self.keeps else look_s - time.monotonic()):
            try:
                self._look_after_state(at_once=False)
                if time.monotonic() >= look_s:
                    look_s = time.monotonic() + next(looks)
                    self._look_for_siblings()
            except Exception:
                _log.exception("the keeper failed inside TokenGuard")

    # --- the state --------------------------------------------------------------------------------------------

    def save(self, budgets: Mirror) -> None:
        """Put budgets on the disk, and the buckets as they are. Whoever does must hold the lock of changes.

        Raises:
            StateUnwritable: They are not there.
        """
        if self._file is None:
            return
        state = taken(self._table, budgets.records)
        try:
            self._file.write(state)
        except StateUnwritable as error:
            self._failures.add()
            if self._failure is None:
                _log.error("%s; until it can, a restart would go back to the last state written", error)
            self._failure = str(error)
            raise
        if self._failure is not None:
            _log.warning("the state can be written again")
        self._failure = None
        self._saved_turn = self._table.saved_turn = state.turn

    def _look_after_state(self, *, at_once: bool) -> None:
        """Save what changed, unless a sibling has just done so."""
        if self._file is None:
            return
        if self._failure is None:
            just_saved = not at_once and 0 <= time.time() - self._file.written_s() < PERIOD_S
            if just_saved or self._table.turn == self._saved_turn:
                return
        try:
            with changing(self._table):
                self.save(self._budgets())
        except StateUnwritable:
            pass  # it is said, and tried again
        except TableBusy as error:
            _log.warning("the state is not written: %s", error)

    # --- siblings ---------------------------------------------------------------------------------------------

    def _look_for_siblings(self) -> None:
        suspects = set(unshared(self._table))
        found = sorted(suspects & self._suspects)
        if found and not self._unshared:
            _log.error("%s", _unshared_text(found))
        self._unshared, self._suspects = found, suspects


def _unshared_text(pids: list[int]) -> str:
    return (
        f"other processes ({', '.join(map(str, pids[:8]))}) serve the same socket with buckets of their own, so "
        "that every budget counts once for each: set TOKENGUARD_TABLE, the same for all, or REDIS_URL"
    )
