"""What the nodes of one realm share in Redis, and what one node knows of it: names of keys, and budgets."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from tokenguard._bucket import BucketTable, Handle
from tokenguard.backends.batch import RedisHandle, Ref, read_scale, scale_text
from tokenguard.backends.mirror import Change, Mirror
from tokenguard.backends.scripts import BUDGETS, PUBLISH, Script
from tokenguard.model import BucketName, Budget, Scale, Scope

_log = logging.getLogger("tokenguard")

NO_EPOCH = ""
"""What a node goes by that has not seen any budgets yet."""


UNKNOWN = Mirror(NO_EPOCH, {})


def revision(mirror: Mirror) -> int:
    """Return how many changes led to a mirror; -1 if nothing is known.

    Its epoch is ``revision:digits``: a number that grows, and random digits that tell two histories apart.
    """
    return int(mirror.epoch.partition(":")[0]) if mirror.epoch else -1


class Realm:
    """Names the keys, and keeps the mirror of the budgets.

    All keys of a realm have one hash tag, so that in a cluster all buckets of a call are in one place.

    Args:
        name: The realm's.

    Attributes:
        epoch_key: The key of the budgets' epoch.
        budgets_keys: The keys of the budgets: their epoch, the budgets, the last changes.
        mirror: What is known of the budgets; replaced as a whole.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._prefix = f"tg:{{{name}}}:".encode()
        self._bucket_prefix = self._prefix + b"b:"
        self.epoch_key = self._prefix + b"epoch"
        self.budgets_keys = (self.epoch_key, self._prefix + b"budgets", self._prefix + b"changes")
        self.mirror = UNKNOWN

    def record_key(self, lane: str) -> bytes:
        """Return the key of a lane's record."""
        return self._prefix + b"lane:" + lane.encode()

    def claim_key(self, what: str) -> bytes:
        """Return the key under which something is claimed."""
        return self._prefix + b"claim:" + what.encode()

    def share_key(self, what: str) -> bytes:
        """Return the key under which nodes tell each other numbers."""
        return self._prefix + b"share:" + what.encode()

    def bucket_key(self, name: BucketName) -> bytes:
        """Return the key of a bucket."""
        return self._bucket_prefix + name.key

    def on(self, scope: Scope) -> Collection[Budget]:
        """Return the explicit budgets of a scope, as they are known."""
        return self.mirror.budgets.get(scope, ())

    async def refresh(self, run: Callable[[Script, Sequence[bytes], Sequence[Any]], Awaitable[Any]]) -> None:
        """Bring the mirror up to date; publish it where Redis is empty or behind.

        Args:
            run: Runs a script and returns what it returns, or raises.
        """
        for _ in range(2):
            mine = self.mirror
            found, whole, *fields = await run(BUDGETS, self.budgets_keys, (mine.epoch,))
            epoch = found.decode()
            if epoch and epoch == mine.epoch:
                return
            theirs = (UNKNOWN if whole else mine).changed(epoch, read_changes(fields))
            if epoch and revision(theirs) >= revision(mine):
                self.mirror = theirs
                return
            if mine.budgets:
                _log.warning("Redis has lost budgets: this node publishes the %d that it knows", len(mine.all))
            if not mine.epoch:
                mine = Mirror(f"0:{secrets.token_hex(8)}", {})
            if await run(PUBLISH, self.budgets_keys, (epoch, mine.epoch, *told(mine))):
                self.mirror = mine
                return

    def prepare(self, table: BucketTable, budgets: Sequence[Budget], epoch: str | None) -> RedisHandle:
        """Make a plan ready."""
        epoch = self.mirror.epoch if epoch is None else epoch
        refs = tuple(Ref(self.bucket_key(budget.name), scale_text(budget.scale)) for budget in budgets)
        return RedisHandle(epoch, refs, tuple(budgets), embedded(table, budgets))


def embedded(table: BucketTable, budgets: Iterable[Budget], scales: Iterable[Scale] | None = None) -> Handle:
    """Return a plan for the embedded engine, with the budgets' scales or others."""
    budgets = list(budgets)
    scales = [budget.scale for budget in budgets] if scales is None else scales
    return table.prepare((budget.name.key, scale) for budget, scale in zip(budgets, scales, strict=True))


def read_changes(fields: Sequence[bytes]) -> Iterator[Change]:
    """Yield what Redis told: name, scale, name, scale, and so on; a scale that is empty is none."""
    for name, scale in zip(fields[::2], fields[1::2], strict=True):
        yield BucketName.from_key(name), read_scale(scale.decode()) if scale else None


def told(mirror: Mirror) -> list[str | bytes]:
    """Return a mirror as ``lua/publish.lua`` takes it: name, scale, name, scale, and so on."""
    return [part for budget in mirror.all for part in (budget.name.key, scale_text(budget.scale))]
