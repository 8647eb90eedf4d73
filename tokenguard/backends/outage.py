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

    Attributes:
        plan: The plan in the node's own table.
        redis: The plan that it stands for.
    """

    __slots__ = ("plan", "redis")

    def __init__(self, plan: Handle, redis: RedisHandle) -> None:
        self.plan = plan
        self.redis = redis

    def __len__(self) -> int:
        return len(self.redis)


class Policy(Protocol):
    """Decides on calls while Redis is down.

    Attributes:
        name: As the setting has it.
    """

    name: str

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:
        """Decide on a call; its outcome's handle says how to settle it.

        Raises:
            BackendDown: It is not decided upon here.
        """

    def settle(self, handle: OwnHandle, deltas: tuple[int, ...]) -> int:
        """Settle what was taken here; return the tokens forgiven."""


class Watch:
    """Logs once that Redis is lost and once that it is back, however many of a node's lanes find out.

    Args:
        policy: The name of what decides meanwhile.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._lost: set[object] = set()

    def lost(self, lane: object, trouble: str) -> None:
        """A lane has lost Redis."""
        with self._lock:
            if not self._lost:
                _log.error("Redis is not to be had: %s; until it is back, the policy is %r", trouble, self._policy)
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

    name = "closed"

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:  # noqa: ARG002 - as every policy's
        """Decide on nothing."""
        raise BackendDown("The shared budgets cannot be reached", trouble)

    def settle(self, handle: OwnHandle, deltas: tuple[int, ...]) -> int:  # noqa: ARG002 - as every policy's
        """Settle nothing: nothing was taken."""
        return 0


class Share:
    """Each of N nodes goes by an Nth of every budget, in a table of its own.

    Its levels live on between outages, so that a Redis that comes and goes grants nothing anew. Over an outage all
    nodes together admit at most what one budget would, C + R·t, beside the C + R·t that Redis did.

    Args:
        table: The node's own.
        nodes: How many nodes there are.
    """

    name = "share"

    def __init__(self, table: BucketTable, nodes: int) -> None:
        self._table = table
        self._nodes = nodes

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:
        """Decide by the node's share."""
        if handle.epoch == NO_EPOCH:
            raise BackendDown("The shared budgets cannot be reached, and this node has never seen them", trouble)
        if handle.share is None:
            handle.share = embedded(
                self._table, handle.budgets, [self._part(b.scale, trouble) for b in handle.budgets]
            )
        outcome = self._table.reserve(handle.share, costs)
        if outcome.retry_after_us >= NEVER_US:
            self._check_never(handle, costs, trouble)
        outcome.handle = OwnHandle(handle.share, handle)
        return outcome

    def settle(self, handle: OwnHandle, deltas: tuple[int, ...]) -> int:
        """Settle in the node's own table."""
        return self._table.settle(handle.plan, deltas)

    def _part(self, scale: Scale, trouble: str) -> Scale:
        try:
            return arithmetic.scale(scale.capacity // self._nodes, scale.rate / self._nodes, scale.debt)
        except InvalidValue:
            raise BackendDown(
                f"The shared budgets cannot be reached, and a capacity of {scale.capacity} cannot be shared by "
                f"{self._nodes} nodes",
                trouble,
            ) from None

    def _check_never(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> None:
        """Let a "never" stand only where the whole budget would say so too."""
        if not any(cost > budget.scale.capacity for cost, budget in zip(costs, handle.budgets, strict=True)):
            raise BackendDown(
                "The shared budgets cannot be reached, and this node's share of them does not suffice", trouble
            )


class Open:
    """Every call passes, and is counted.

    Args:
        table: Where calls are counted until Redis can be told.
    """

    name = "open"

    def __init__(self, table: BucketTable) -> None:
        self._table = table

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], trouble: str) -> Outcome:  # noqa: ARG002 - as every policy's
        """Admit it."""
        self._table.settle(handle.plan, costs)
        outcome = self._table.peek(handle.plan)
        outcome.handle = OwnHandle(handle.plan, handle)
        return outcome

    def settle(self, handle: OwnHandle, deltas: tuple[int, ...]) -> int:
        """Count what was used."""
        return self._table.settle(handle.plan, deltas)
