"""Buckets in this process's table, budgets in a dict beside it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tokenguard._bucket import BucketTable, Handle
from tokenguard.errors import BudgetNotFound
from tokenguard.model import BucketName, Budget


class MemoryBackend:
    """The embedded engine.

    Args:
        table: The table to use.
    """

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._budgets: dict[BucketName, Budget] = {}
        self._changing = threading.Lock()
        self.reserve = table.reserve  # PERF: no frame in between; row "Limiter" of test_bench_bucket
        self.settle = table.settle
        self.peek = table.peek

    @property
    def epoch(self) -> int:
        """The table's epoch."""
        return self._table.epoch

    def describe(self) -> str:
        """Return what this backend is."""
        stats = self._table.stats()
        return f"memory ({stats['buckets']} buckets, {stats['region_bytes'] // 2**20} MiB)"

    def stats(self) -> dict[str, int]:
        """Return the table's counters."""
        return self._table.stats()

    def find(self, name: BucketName) -> Budget | None:
        """Return the explicit budget of that name."""
        return self._budgets.get(name)

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""
        with self._changing:
            return sorted(self._budgets.values(), key=lambda budget: budget.name.key)

    def prepare(self, budgets: Sequence[Budget], epoch: int | None = None) -> Handle:
        """Make a plan ready."""
        return self._table.prepare(((budget.name.key, budget.scale) for budget in budgets), epoch)

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget."""
        with self._changing:
            before = self._budgets.get(budget.name)
            # The budget first, the epoch (inside the table) after: whoever reads the new epoch finds the new
            # budget, and whoever found the old budget holds a handle of the old epoch.
            self._budgets[budget.name] = budget
            try:
                self._table.configure(budget.name.key, budget.scale, level, now_us)
            except BaseException:
                self._restore(budget.name, before)
                raise

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget."""
        with self._changing:
            before = self._budgets.pop(name, None)
            if before is None:
                raise BudgetNotFound(f"there is no budget for {name}")
            try:
                if default is None:
                    self._table.remove(name.key)
                else:
                    self._table.configure(name.key, default.scale, None, now_us)
            except BaseException:
                self._restore(name, before)
                raise

    def _restore(self, name: BucketName, before: Budget | None) -> None:
        if before is None:
            del self._budgets[name]
        else:
            self._budgets[name] = before
