"""Where buckets and budgets live. Every backend decides alike, to the unit."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from tokenguard._bucket import BucketTable, Outcome
from tokenguard.model import BucketName, Budget, Scope

Handle = Any
"""A plan made ready by a backend: its own business."""


def loop_runs() -> bool:
    """Return whether an event loop runs in this thread, which whoever waits would hold up."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Backend(Protocol):
    """What the use cases ask of a place where buckets and budgets live.

    Times are µs of wall-clock time; None is now, by the backend's own clock.
    """

    waits: bool
    """Whether it waits for somebody else: then an event loop must use what ends in ``_soon``."""
    changes_wait: bool
    """Whether budgets are changed only once somebody else, or a disk, has heard of it."""
    table: BucketTable
    """The node's own table, in which all its processes count."""

    @property
    def epoch(self) -> object:
        """What moves with every change of a budget; only equality says anything."""

    def describe(self) -> str:
        """Return what this backend is, for the start-up line and health."""

    def trouble(self) -> str | None:
        """Return what is wrong, if anything is."""

    def stats(self) -> Mapping[str, int]:
        """Return its counters."""

    def open(self) -> None:
        """Be ready, in a process without an event loop."""

    def close(self) -> None:
        """Let what is under way end, likewise, and leave nothing open."""

    async def start(self) -> None:
        """Be ready; what cannot be had yet does not keep it from starting."""

    async def stop(self) -> None:
        """Let what is under way end, and close what is open."""

    def claim(self, what: str, for_s: float, now_s: float) -> bool:
        """Return whether it is for this process, of all that share the budgets, to do something now.

        Args:
            what: What.
            for_s: How long nobody else is to do it.
            now_s: The time since the epoch.

        Raises:
            BackendDown: Nobody can be asked.
        """

    def share(self, what: str, numbers: Mapping[str, int], for_s: float) -> list[tuple[str, int]]:
        """Let other nodes that share the budgets know some numbers for a while; return theirs, with their names.

        Args:
            what: What they are about.
            numbers: By name, each in place of what this node told of it before; others still hold.
            for_s: How long they hold.

        Raises:
            BackendDown: Nobody can be told.
        """

    def refresh(self) -> None:
        """Know the budgets as they are now, whoever changed them.

        Raises:
            BackendDown: They cannot be reached.
        """

    def on(self, scope: Scope) -> Collection[Budget]:
        """Return the explicit budgets of a scope."""

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""

    def prepare(self, budgets: Sequence[Budget], epoch: Any = None) -> Handle:  # noqa: ANN401 - its own epochs
        """Make a plan ready, whose budgets were read under ``epoch`` (None: now's)."""

    def reserve(self, handle: Handle, costs: tuple[int, ...], now_us: int | None = None) -> Outcome:
        """Take each cost from all buckets of the plan, or from none; the outcome's handle is to settle it with.

        Raises:
            StaleHandle: A budget changed since ``epoch``.
            TableFull: There is no room for a new bucket.
            TableBusy: The table's lock was not to be had.
            BackendDown: The buckets cannot be reached.
        """

    def settle(self, handle: Handle, deltas: tuple[int, ...], now_us: int | None = None) -> int:
        """Charge each bucket its delta, of either sign; return how many tokens were forgiven."""

    async def reserve_soon(self, handle: Handle, costs: tuple[int, ...], now_us: int | None = None) -> Outcome:
        """Do what ``reserve`` does; if it is cancelled, nothing is taken."""

    def settle_soon(
        self, handle: Handle, deltas: tuple[int, ...], now_us: int | None = None
    ) -> asyncio.Future[int]:
        """Do what ``settle`` does, whether anybody waits for it or not."""

    def peek(self, handle: Handle, now_us: int | None = None) -> Outcome:
        """Return the buckets as a reserve would find them."""

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget, and its bucket's level if given; it holds for the next call."""

    def put_soon(self, budget: Budget, level: int, now_us: int | None = None) -> asyncio.Future[bool] | bool:
        """Set an explicit budget that need not outlive a crash, unless there is one, as fast as can be.

        Returns:
            Whether it was set; where an event loop runs that must not wait, what tells so once it holds for all.

        Raises:
            TableFull: There is no room for it; nothing was changed.
            TableBusy: Others have been changing budgets for over ten seconds; nothing was changed.
            BackendDown: The budgets cannot be reached.
        """

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget; ``default`` is what holds in its stead.

        Raises:
            BudgetNotFound: There is none.
        """
