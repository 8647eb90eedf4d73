"""Set, list and remove budgets: the use cases, and the checks of what people type."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tokenguard import arithmetic
from tokenguard._bucket import MAX_PLAN
from tokenguard.backends import Backend
from tokenguard.errors import BudgetNotFound, InvalidRequest
from tokenguard.headroom import Headroom
from tokenguard.jsontext import shown, whole_number
from tokenguard.model import (
    EVERYBODY,
    GLOBAL,
    GLOBAL_ID,
    SCOPE_KINDS,
    SETTABLE_METERS,
    BucketName,
    Budget,
    Meter,
    Scope,
    Source,
    checked_name,
)
from tokenguard.plan import Plans

MAX_PAGE = 1000

_FIELDS = ("scope", "id", "capacity", "refillPerSec", "meter", "model", "maxDebt", "level")


class BudgetState(NamedTuple):
    """A budget and what its bucket holds now.

    Attributes:
        budget: The budget.
        explicit: Whether somebody set it; else it is a default.
        level: Whole tokens or requests, rounded down; below 0 is debt.
    """

    budget: Budget
    explicit: bool
    level: int

    def __repr__(self) -> str:
        level = f"{self.level}/{self.capacity}, {self.refill_per_sec:g}/s"
        return f"<BudgetState {self.budget.name}: {level}, {self.source}>"

    @property
    def scope(self) -> str:
        """The kind of scope that is limited: ``global``, ``team``, ``rolegroup``, ``role`` or ``user``."""
        return self.budget.name.scope.kind

    @property
    def id(self) -> str:
        """Whose it is, of that kind: ``*`` for ``global``."""
        return self.budget.name.scope.id

    @property
    def meter(self) -> Meter:
        """What is counted."""
        return self.budget.name.meter

    @property
    def model(self) -> str | None:
        """Of which model's calls; None means all models."""
        return self.budget.name.model

    @property
    def capacity(self) -> int:
        """The most that the bucket holds, in tokens or requests."""
        return self.budget.scale.capacity

    @property
    def refill_per_sec(self) -> float:
        """The rate in effect, in tokens or requests per second."""
        return self.budget.scale.per_sec

    @property
    def max_debt(self) -> int:
        """How far below zero the level may go."""
        return self.budget.scale.debt

    @property
    def source(self) -> str:
        """Where it comes from: ``explicit``, ``default``, or where a limit of the provider's was learned."""
        return self.budget.name.source or ("explicit" if self.explicit else "default")


class Budgets:
    """The use cases. Wherever ``now_us`` is None, the time is now.

    Args:
        backend: Where the budgets live.
        plans: What knows the defaults.

    Attributes:
        waits: Whether a change waits for somebody else or a disk, so that an event loop must not run these.
    """

    def __init__(self, backend: Backend, plans: Plans) -> None:
        self.waits = backend.changes_wait
        self._backend = backend
        self._plans = plans

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> BudgetState:
        """Set or change a budget; what was used stays used, unless a level is given.

        Raises:
            TableFull: A level was given and there is no room for a bucket; nothing was changed.
            BackendDown: The budgets cannot be reached; it may be set or not.
        """
        self._backend.put(budget, level, now_us)
        return self._state(budget, explicit=True, now_us=now_us)

    def put_soon(self, budget: Budget, level: int, now_us: int | None = None) -> asyncio.Future[bool] | bool:
        """Set a budget that need not outlive a crash, unless there is one; see ``Backend.put_soon``."""
        return self._backend.put_soon(budget, level, now_us)

    def find(self, name: BucketName) -> Budget | None:
        """Return the explicit budget of a name, as far as this process has heard."""
        return next((budget for budget in self._backend.on(name.scope) if budget.name == name), None)

    def get(self, name: BucketName, now_us: int | None = None) -> BudgetState:
        """Return the budget that holds for a scope, explicit or default.

        Raises:
            BudgetNotFound: Neither is there: it is unlimited.
            BackendDown: The budgets cannot be reached.
        """
        self._backend.refresh()
        if (budget := self.find(name)) is not None:
            return self._state(budget, explicit=True, now_us=now_us)
        if (default := self._plans.default(name)) is not None:
            return self._state(default, explicit=False, now_us=now_us)
        raise BudgetNotFound(f"there is no budget for {name}: {self._instead(name)}")

    def delete(self, name: BucketName, now_us: int | None = None) -> BudgetState | None:
        """Remove an explicit budget; return the default that holds in its stead, if there is one.

        Raises:
            BudgetNotFound: There is no explicit one.
            BackendDown: The budgets cannot be reached; it may be removed or not.
        """
        default = self._plans.default(name)
        self._backend.drop(name, default, now_us)
        return None if default is None else self._state(default, explicit=False, now_us=now_us)

    def page(self, after: bytes, limit: int, now_us: int | None = None) -> tuple[list[BudgetState], bytes | None]:
        """Return explicit budgets in the order of their keys, and the key to go on after if there are more.

        Args:
            after: The key behind which to begin; empty for the first page.
            limit: How many at most.
            now_us: The time.

        Raises:
            BackendDown: The budgets cannot be reached.
        """
        self._backend.refresh()
        budgets = [budget for budget in self._backend.budgets() if budget.name.key > after]
        page: list[BudgetState] = []
        for at in range(0, min(limit, len(budgets)), MAX_PLAN):
            page += self._states(budgets[at : min(limit, at + MAX_PLAN)], now_us)
        return page, budgets[limit - 1].name.key if len(budgets) > limit else None

    def learned(self, now_us: int | None = None) -> list[BudgetState]:
        """Return the budgets of the global scope that were learned of the provider, in the order of their keys.

        Raises:
            BackendDown: The budgets cannot be reached.
        """
        self._backend.refresh()
        found = [budget for budget in self._backend.on(EVERYBODY) if budget.name.source is not None]
        found.sort(key=lambda budget: budget.name.key)
        parts = (found[at : at + MAX_PLAN] for at in range(0, len(found), MAX_PLAN))
        return [state for part in parts for state in self._states(part, now_us)]

    def _instead(self, name: BucketName) -> str:
        """Return what limits a scope that has no budget of this name."""
        sources = [source for source in Source if self.find(name._replace(source=source)) is not None]
        if name.source is not None or not sources:
            return "it is unlimited"
        return f"but what the provider tells limits it, with source={' and source='.join(sources)}"

    def followed(self) -> list[tuple[Budget, Headroom]]:
        """Return the limits of the provider whose count this process has followed, and what it knows of that."""
        current = {budget.name: budget for budget in self._backend.on(EVERYBODY)}
        return [(current[name], room) for name, room in self._plans.rooms() if name in current]

    def _state(self, budget: Budget, *, explicit: bool, now_us: int | None) -> BudgetState:
        (state,) = self._states([budget], now_us)
        return state._replace(explicit=explicit)

    def _states(self, budgets: Sequence[Budget], now_us: int | None) -> list[BudgetState]:
        """Return explicit budgets, no more than go into one plan, with their levels."""
        seen = self._backend.peek(self._backend.prepare(budgets), now_us)
        return [BudgetState(budget, True, seen.level(i)) for i, budget in enumerate(budgets)]


def read_budget(members: dict[str, Any]) -> tuple[Budget, int | None]:
    """Read a budget, and the level to set if there is one, as ``POST /config/budget`` takes them.

    Raises:
        InvalidValue: A field is unknown, missing or out of bounds; the message says which.
    """
    for field in members:
        if field not in _FIELDS:
            allowed = ", ".join(_FIELDS)
            raise InvalidRequest(field[:80], f"{field[:80]!r} is not a field of a budget; allowed are {allowed}")
    name = read_name(members, SETTABLE_METERS)
    capacity = whole_number(members, "capacity", 1, arithmetic.MAX_CAPACITY)
    rate = _rate(members)
    debt_bound = arithmetic.MAX_UNITS - capacity
    max_debt = arithmetic.DEFAULT_DEBT * capacity
    if members.get("maxDebt") is not None:
        max_debt = whole_number(members, "maxDebt", 0, debt_bound)
    scale = arithmetic.scale(capacity, arithmetic.read_rate(rate), max_debt)
    level = None
    if members.get("level") is not None:
        level = whole_number(members, "level", -max_debt, capacity)
    return Budget(name, scale), level


def read_name(members: dict[str, Any], meters: Collection[Meter] = tuple(Meter)) -> BucketName:
    """Read what a budget limits: ``scope``, ``id`` and, if given, ``meter``, ``model`` and ``source``.

    Args:
        members: What is given.
        meters: What it may count.

    Raises:
        InvalidValue: A field is missing or out of bounds; the message says which.
    """
    kind = members.get("scope")
    if kind not in SCOPE_KINDS:
        raise InvalidRequest(
            "scope", f"scope must be one of {', '.join(SCOPE_KINDS)}, got {shown(members, 'scope')}"
        )
    id_ = members.get("id")
    if id_ is None and kind == GLOBAL:
        id_ = GLOBAL_ID
    if not isinstance(id_, str):
        raise InvalidRequest("id", f"id must be a string, got {shown(members, 'id')}")
    if kind == GLOBAL and id_ != GLOBAL_ID:
        raise InvalidRequest("id", f'id of scope global must be "{GLOBAL_ID}" (or left out), got {id_!r}')
    meter, model, source = members.get("meter"), members.get("model"), members.get("source")
    if meter is not None and meter not in meters:
        raise InvalidRequest("meter", f"meter must be one of {', '.join(meters)}, got {shown(members, 'meter')}")
    if source is not None and source not in tuple(Source):
        raise InvalidRequest(
            "source", f"source must be one of {', '.join(Source)}, got {shown(members, 'source')}"
        )
    if model is not None and not isinstance(model, str):
        raise InvalidRequest("model", f"model must be a string, got {shown(members, 'model')}")
    scope = Scope(kind, checked_name("id", id_))
    return BucketName(
        scope,
        Meter(meter or Meter.TOKENS),
        None if model is None else checked_name("model", model),
        None if source is None else Source(source),
    )


def _rate(members: dict[str, Any]) -> float:
    value: Any = members.get("refillPerSec")
    if type(value) not in (int, float) or not 0 <= value <= arithmetic.MAX_RATE:
        raise InvalidRequest(
            "refillPerSec",
            f"refillPerSec must be a number from 0 to 10^12, got {shown(members, 'refillPerSec')}",
        )
    return float(value)
