"""Buckets and budgets in the node's table, which all its processes may share."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tokenguard._bucket import BucketTable, Handle, Outcome
from tokenguard.backends.keeper import Keeper
from tokenguard.backends.mirror import NOTHING, Mirror, read_records, record_of
from tokenguard.backends.state import StateFile
from tokenguard.backends.workers import changing, leave
from tokenguard.errors import BudgetNotFound, StateUnwritable, TableFull
from tokenguard.model import BucketName, Budget, Scale, Scope

_RESERVE_BYTES = 2048
"""Room in the log for removing budgets, and for changing them to what takes no more room: a few records."""


class MemoryBackend:
    """The embedded engine.

    The explicit budgets are in the table's log of changes; each process reads on where it stopped, when the epoch
    has moved. A change is on the disk before it is in the log, and in the log before anybody is told.

    Args:
        table: The table to use.
        file: Where the state is kept; None to keep none.
        shared: Where others find the table; None if only processes forked off this one share it.
    """

    waits = False

    def __init__(self, table: BucketTable, file: StateFile | None = None, shared: Path | None = None) -> None:
        self.table = table
        self._file = file
        self._shared = shared
        self._lock = threading.Lock()
        self._known = NOTHING, 0
        self._keeper = Keeper(table, self._budgets, file)
        self.changes_wait = self._keeper.keeps
        self.reserve = table.reserve  # PERF: no frame in between; row "Limiter" of test_bench_bucket
        self.settle = table.settle
        self.peek = table.peek
        _backends.add(self)

    @property
    def epoch(self) -> int:
        """The table's epoch."""
        return self.table.epoch

    def describe(self) -> str:
        """Return what this backend is."""
        stats = self.table.stats()
        kept = f", state in {self._file.path}" if self._file else ""
        shared = f", shared in {self._shared}" if self._shared else ""
        return f"memory ({stats['buckets']} buckets, {stats['region_bytes'] / 2**20:.0f} MiB{shared}{kept})"

    def stats(self) -> dict[str, int]:
        """Return the table's counters."""
        return self.table.stats()

    def trouble(self) -> str | None:
        """Return what is wrong with the state on the disk, or with siblings."""
        return self._keeper.trouble

    def open(self) -> None:
        """Begin to save, and to look for siblings."""
        self._keeper.start()

    def close(self) -> None:
        """Save a last time."""
        self._keeper.stop()
        leave(self.table)
        if self._file is not None:
            self._file.close()

    async def start(self) -> None:
        """Do what ``open`` does."""
        self.open()

    async def stop(self) -> None:
        """Do what ``close`` does."""
        await asyncio.to_thread(self.close)

    def claim(self, what: str, for_s: float, now_s: float) -> bool:
        """Return whether it is for this process of the node to do something now."""
        name, now_ms = f"claimed\x1f{what}".encode(), int(now_s * 1000)
        with changing(self.table):
            claimed = self.table.tallies().get(name, ())
            if any(now_ms - for_s * 1000 < at_ms <= now_ms for at_ms in claimed):  # later, the clock was set back
                return False
            self.table.tally(name).set(now_ms)
            return True

    def share(self, what: str, numbers: Mapping[str, int], for_s: float) -> list[tuple[str, int]]:  # noqa: ARG002 - there is no other node
        """Return what other nodes tell: nothing."""
        return []

    def refresh(self) -> None:
        """Know the budgets already."""

    async def reserve_soon(self, handle: Handle, costs: tuple[int, ...], now_us: int | None = None) -> Outcome:
        """Reserve at once."""
        return self.reserve(handle, costs, now_us)

    def settle_soon(
        self, handle: Handle, deltas: tuple[int, ...], now_us: int | None = None
    ) -> asyncio.Future[int]:
        """Settle at once."""
        settled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        settled.set_result(self.settle(handle, deltas, now_us))
        return settled

    def on(self, scope: Scope) -> Collection[Budget]:
        """Return the explicit budgets of a scope."""
        return self._budgets().budgets.get(scope, ())

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""
        return self._budgets().all

    def prepare(self, budgets: Sequence[Budget], epoch: int | None = None) -> Handle:
        """Make a plan ready."""
        return self.table.prepare(((budget.name.key, budget.scale) for budget in budgets), epoch)

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget.

        Raises:
            StateUnwritable: It could not be put on the disk; nothing was changed.
            TableFull: There is no room for it, or for its level; nothing was changed.
            TableBusy: Others have been changing budgets for over ten seconds; nothing was changed.
        """
        name, scale = budget
        with changing(self.table):
            self._change(name, scale, lambda record: self.table.configure(name.key, scale, level, now_us, record))
            if level is not None:
                with suppress(
                    StateUnwritable
                ):  # the budget is there; its level is, within a second, or it is said
                    self._keeper.save(self._budgets())

    def put_soon(self, budget: Budget, level: int, now_us: int | None = None) -> bool:
        """Set an explicit budget, unless there is one, at once; on the disk it is with the levels.

        Raises:
            TableFull: There is no room for it, or for its level; nothing was changed.
            TableBusy: Others have been changing budgets for over ten seconds; nothing was changed.
        """
        name, scale = budget
        with changing(self.table):
            if self._budgets().find(name) is not None:
                return False
            record = self._fitting_record(name, scale)
            self.table.configure(name.key, scale, level, now_us, record)
            return True

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget.

        Raises:
            BudgetNotFound: There is none.
            StateUnwritable: That could not be put on the disk; nothing was changed.
            TableBusy: Others have been changing budgets for over ten seconds; nothing was changed.
        """
        with changing(self.table):
            if self._budgets().find(name) is None:
                raise BudgetNotFound(f"there is no budget for {name}")
            if default is None:
                self._change(name, None, lambda record: self.table.remove(name.key, record))
            else:
                scale = default.scale
                self._change(
                    name, None, lambda record: self.table.configure(name.key, scale, None, now_us, record)
                )

    def _change(self, name: BucketName, scale: Scale | None, apply: Callable[[bytes], None]) -> None:
        """Put a change on the disk, then into the table; nobody else changes anything meanwhile."""
        record = self._fitting_record(name, scale)
        before = self._budgets()
        self._keeper.save(before.changed(None, [(name, scale)]))
        try:
            apply(record)
        except BaseException:
            with suppress(StateUnwritable):
                self._keeper.save(before)
            raise

    def _fitting_record(self, name: BucketName, scale: Scale | None) -> bytes:
        """Return a change as the log takes it; make room for it."""
        record = record_of(name, scale)
        if self.table.log_room - len(record) < _RESERVE_BYTES:
            before = self._budgets()
            self.table.rewrite(before.records)
            self._check_room(before, name, record)
        return record

    def _check_room(self, before: Mirror, name: BucketName, record: bytes) -> None:
        """Refuse to let the budgets grow into what is kept for removing them."""
        set_before = before.find(name)
        grows = len(record) - (len(record_of(*set_before)) if set_before else 0)
        room = self.table.log_room
        if len(record) > room or (grows > 0 and room - grows < _RESERVE_BYTES):
            raise TableFull(f"the table has no room for more than the {len(before.all)} budgets that are set")

    def _budgets(self) -> Mirror:
        """Return the explicit budgets as they are now."""
        mirror, read_to = self._known
        if mirror.epoch == self.table.epoch:
            return mirror
        with self._lock:
            mirror, read_to = self._known
            epoch = self.table.epoch  # before the budgets: if one changes now, they are read again
            read_to, whole, records = self.table.changes(read_to)
            mirror = (NOTHING if whole else mirror).changed(epoch, read_records(records))
            self._known = mirror, read_to  # at once: a process may be forked off at any time
            return mirror


_backends: weakref.WeakSet[MemoryBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend._lock = threading.Lock()  # noqa: SLF001 - of this module
        backend._keeper.forked()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)
