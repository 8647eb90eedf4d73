"""What a node does with a call while Redis is not to be had: one policy each."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from tokenguard import arithmetic
from tokenguard._bucket import BucketTable, Handle, Outcome
from tokenguard.backends.batch import RedisHandle
from tokenguard.backends.realm import NO_EPOCH, embedded
from tokenguard.errors import BackendDown, InvalidValue
from tokenguard.model import NEVER_US, Scale

_log = logging.getLogger("tokenguard")


class OwnHandle:
    """A plan under which a node decided on its own; what was taken so is settled so.

    Args:
        table: The node's own.
        plan: The plan in that.
        taken: What was taken there.
        redis: The plan that it stands for; an attribute too.
        costs: What Redis will be charged; an attribute too.
    """

    def __init__(
        self,
        table: BucketTable,
        plan: Handle,
        taken: tuple[int, ...],
        redis: RedisHandle,
        costs: tuple[int, ...],
    ) -> None:
        self._table = table
        self._plan = plan
        self._taken = taken
        self.redis = redis
        self.costs = costs

    def __len__(self) -> int:
        return len(self.redis)

    def settle(self, deltas: tuple[int, ...]) -> int:
        """Settle in the node's own table, to what Redis will be charged; return the tokens forgiven."""
        parts = zip(deltas, self.costs, self._taken, strict=True)
        return self._table.settle(self._plan, tuple(delta + cost - taken for delta, cost, taken in parts))


class Policy(Protocol):
    """Decides on calls while Redis is down.

    Attributes:
        means: What it does, in words.
    """

    means: str

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:
        """Decide on a call; its outcome's handle says how to settle it.

        Raises:
            BackendDown: It is not decided upon here.
        """


class Watch:
    """Logs once that Redis is lost and once that it is back, however many of a node's lanes find out.

    Args:
        meanwhile: What is done meanwhile, in words.

    Attributes:
        outages: How often it was lost.
    """

    def __init__(self, meanwhile: str) -> None:
        self._meanwhile = meanwhile
        self._lock = threading.Lock()
        self._lost: set[object] = set()
        self.outages = 0

    def lost(self, lane: object, trouble: str) -> None:
        """A lane has lost Redis."""
        with self._lock:
            if not self._lost:
                self.outages += 1
                _log.error("Redis is unavailable: %s; until it is back, %s", trouble, self._meanwhile)
            self._lost.add(lane)

    def back(self, lane: object) -> None:
        """A lane has Redis again."""
        with self._lock:
            if self._lost == {lane}:
                _log.warning("Redis is back: budgets are shared again")
            self._lost.discard(lane)

    def ended(self, lane: object) -> None:
        """A lane is no more."""
        with self._lock:
            self._lost.discard(lane)


class Closed:
    """No Redis, no calls."""

    means = "calls are answered 503"

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:  # noqa: ARG002 - as every policy's
        """Decide on nothing."""
        raise BackendDown("The shared budgets cannot be reached", trouble)


class Share:
    """Each of N nodes goes by an Nth of every budget, in a table of its own.

    Its levels live on between outages, so that a Redis that comes and goes grants nothing anew. Over an outage all
    nodes together reserve at most what one budget would, C + R·t, beside the C + R·t that Redis did. A call that
    asks for more than the share reserves all of it; what it uses beyond becomes debt, here and in Redis.

    Args:
        table: The node's own.
        nodes: How many nodes there are.
    """

    def __init__(self, table: BucketTable, nodes: int) -> None:
        self.means = f"this node goes by one part in {nodes} of every budget"
        self._table = table
        self._nodes = nodes

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:
        """Decide by the node's share."""
        if handle.epoch == NO_EPOCH:
            raise BackendDown("The shared budgets cannot be reached, and this node has never seen them", trouble)
        if handle.share is None:
            parts = [self._part(budget.scale, trouble) for budget in handle.budgets]
            handle.share = embedded(self._table, handle.budgets, parts)
        taken = tuple(
            cost if cost > budget.scale.capacity else min(cost, budget.scale.capacity // self._nodes)
            for cost, budget in zip(costs, handle.budgets, strict=True)
        )
        outcome = self._table.reserve(handle.share, taken)
        if outcome.retry_after_us >= NEVER_US and taken[outcome.binding] <= outcome.limit(outcome.binding):
            # A grant's share is used up, but who knows of the grant?
            raise BackendDown("The shared budgets cannot be reached, and this node's share is used up", trouble)
        outcome.handle = OwnHandle(self._table, handle.share, taken, handle, costs)
        return outcome

    def _part(self, scale: Scale, trouble: str) -> Scale:
        try:
            return arithmetic.scale(scale.capacity // self._nodes, scale.rate / self._nodes, scale.debt)
        except InvalidValue:
            raise BackendDown(
                f"The shared budgets cannot be reached, and a capacity of {scale.capacity} cannot be shared by "
                f"{self._nodes} nodes",
                trouble,
            ) from None


class Open:
    """Every call passes, and is counted.

    Args:
        table: Where calls are counted until Redis can be told.
    """

    means = "every call passes"

    def __init__(self, table: BucketTable) -> None:
        self._table = table

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:  # noqa: ARG002 - as every policy's
        """Admit it."""
        self._table.settle(handle.plan, costs)
        outcome = self._table.peek(handle.plan)
        outcome.handle = OwnHandle(self._table, handle.plan, costs, handle, costs)
        return outcome
