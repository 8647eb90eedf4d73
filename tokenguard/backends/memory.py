"""Buckets in this process's table, budgets in a dict beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from tokenguard._bucket import BucketTable, Handle, Outcome
from tokenguard.errors import BudgetNotFound
from tokenguard.model import BucketName, Budget, Scope


class MemoryBackend:
    """The embedded engine.

    Args:
        table: The table to use.
    """

    waits = False

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._budgets: dict[Scope, tuple[Budget, ...]] = {}
        self._lock = threading.Lock()
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

    def trouble(self) -> str | None:
        """Return nothing: what is in this process is there."""
        return None

    async def start(self) -> None:
        """Be ready at once."""

    async def stop(self) -> None:
        """Leave nothing open."""

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
        return self._budgets.get(scope, ())

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""
        budgets = [budget for on_scope in list(self._budgets.values()) for budget in on_scope]
        return sorted(budgets, key=lambda budget: budget.name.key)

    def prepare(self, budgets: Sequence[Budget], epoch: int | None = None) -> Handle:
        """Make a plan ready."""
        return self._table.prepare(((budget.name.key, budget.scale) for budget in budgets), epoch)

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget."""
        with self._changing(budget.name.scope) as before:
            others = [other for other in before if other.name != budget.name]
            self._budgets[budget.name.scope] = (*others, budget)
            self._table.configure(budget.name.key, budget.scale, level, now_us)

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget."""
        with self._changing(name.scope) as before:
            left = tuple(other for other in before if other.name != name)
            if len(left) == len(before):
                raise BudgetNotFound(f"there is no budget for {name}")
            self._budgets[name.scope] = left
            if default is None:
                self._table.remove(name.key)
            else:
                self._table.configure(name.key, default.scale, None, now_us)

    @contextmanager
    def _changing(self, scope: Scope) -> Iterator[tuple[Budget, ...]]:
        """Change a scope's budgets, or leave them as they were if the table refuses.

        The budgets are changed first and the epoch, inside the table, after: whoever reads the new epoch finds
        the new budget, and whoever found the old budget holds a handle of the old epoch.
        """
        with self._lock:
            before = self._budgets.get(scope, ())
            try:
                yield before
            except BaseException:
                self._budgets[scope] = before
                self._table.expire_handles()  # for a plan that saw what is taken back here
                raise
            finally:
                if not self._budgets.get(scope):
                    self._budgets.pop(scope, None)
