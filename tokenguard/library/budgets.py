"""Set, list and remove budgets from Python, as ``/config/budget`` does over HTTP."""

from __future__ import annotations

from tokenguard import budgets
from tokenguard.budgets import MAX_PAGE, BudgetState, read_budget, read_name
from tokenguard.errors import InvalidValue
from tokenguard.library.call import Desk
from tokenguard.model import BucketName

_OURS = {"refillPerSec": "refill_per_sec", "maxDebt": "max_debt"}
"""How Python calls what has another name over HTTP."""


class Budgets:
    """The budgets of all who share the limiter's buckets. A change binds the very next call.

    Every method waits for Redis, or for the disk, if there is one: from an event loop, ``asyncio.to_thread`` calls
    it. And every method may raise BackendDown: the budgets cannot be reached.

    Args:
        use_cases: What does it.
        desk: Where those wait for whom a budget may make room.
    """

    def __init__(self, use_cases: budgets.Budgets, desk: Desk) -> None:
        self._use_cases = use_cases
        self._desk = desk

    @property
    def _inner(self) -> budgets.Budgets:
        self._desk.check_open()
        return self._use_cases

    def set(
        self,
        scope: str,
        id: str | None = None,  # noqa: A002 - the API's word
        *,
        capacity: int,
        refill_per_sec: float,
        meter: str = "tokens",
        model: str | None = None,
        max_debt: int | None = None,
        level: int | None = None,
    ) -> BudgetState:
        """Set or change a budget. What was used stays used, unless a level is given.

        Args:
            scope: ``global``, ``team``, ``rolegroup``, ``role`` or ``user``.
            id: Whose, of that kind; left out for ``global``.
            capacity: The most that its bucket holds, 1 to 10^12 tokens or requests.
            refill_per_sec: What flows in, 0 to 10^12 a second; 0 is a fixed grant.
            meter: ``tokens`` or ``requests``.
            model: Of which model's calls; all models by default.
            max_debt: How far below zero the level may go; ten capacities by default.
            level: What is in it from now on.

        Returns:
            The budget, with its level and the rate in effect.

        Raises:
            InvalidValue: Something is out of bounds; nothing was changed.
            TableFull: There is no room for it; nothing was changed.
            StateUnwritable: It could not be put on the disk; nothing was changed.
        """
        members = {
            **_members(scope, id, meter, model),
            "capacity": capacity,
            "refillPerSec": refill_per_sec,
            "maxDebt": max_debt,
            "level": level,
        }
        try:
            budget, given = read_budget(members)
        except InvalidValue as error:
            ours = _OURS.get(error.field, error.field)
            raise InvalidValue(ours, str(error).replace(error.field, ours)) from None
        state = self._inner.put(budget, given)
        self._desk.line.stir()
        return state

    def get(
        self,
        scope: str,
        id: str | None = None,  # noqa: A002 - the API's word
        *,
        meter: str = "tokens",
        model: str | None = None,
        source: str | None = None,
    ) -> BudgetState:
        """Return the budget that holds for a scope, set or default, with its level.

        Args:
            scope: ``global``, ``team``, ``rolegroup``, ``role`` or ``user``.
            id: Whose, of that kind; left out for ``global``.
            meter: ``tokens`` or ``requests``.
            model: Of which model's calls; all models by default.
            source: Where it was learned of the provider, as ``list`` tells; by default it is one that was set.

        Raises:
            BudgetNotFound: There is none: it is unlimited.
            InvalidValue: It cannot be the name of one.
        """
        return self._inner.get(_name(scope, id, meter, model, source))

    def list(self) -> list[BudgetState]:
        """Return all budgets that were set, or learned of the provider, with their levels."""
        states, after = self._inner.page(b"", MAX_PAGE)
        while after is not None:
            page, after = self._inner.page(after, MAX_PAGE)
            states += page
        return states

    def delete(
        self,
        scope: str,
        id: str | None = None,  # noqa: A002 - the API's word
        *,
        meter: str = "tokens",
        model: str | None = None,
        source: str | None = None,
    ) -> BudgetState | None:
        """Remove a budget that was set or learned; return the default in its stead, or None if there is none.

        Takes what ``get`` takes.

        Raises:
            BudgetNotFound: There is none.
            InvalidValue: It cannot be the name of one.
            StateUnwritable: That could not be put on the disk; nothing was changed.
        """
        default = self._inner.delete(_name(scope, id, meter, model, source))
        self._desk.line.stir()
        return default


def _members(scope: str, scope_id: str | None, meter: str, model: str | None) -> dict[str, object]:
    return {"scope": scope, "id": scope_id, "meter": meter, "model": model}


def _name(scope: str, scope_id: str | None, meter: str, model: str | None, source: str | None) -> BucketName:
    return read_name({**_members(scope, scope_id, meter, model), "source": source})
