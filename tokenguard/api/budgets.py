"""``/config/budget``: set, list, show and remove budgets."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from falcon import Request, Response

from tokenguard.api.admin import AdminResource
from tokenguard.api.wire import write_json
from tokenguard.budgets import MAX_PAGE, Budgets, BudgetState, read_budget, read_name
from tokenguard.errors import InvalidRequest
from tokenguard.jsontext import read_object
from tokenguard.model import BucketName


class BudgetList(AdminResource):
    """``POST`` and ``GET /config/budget``.

    Args:
        budgets: The use cases.
    """

    max_body_bytes = 16_384

    def __init__(self, budgets: Budgets) -> None:
        self.waits = budgets.waits
        self._budgets = budgets

    def on_post(self, req: Request, resp: Response) -> None:
        """Set or change a budget."""
        budget, level = read_budget(read_object(req.context.body).members)
        write_json(resp, 200, shown(self._budgets.put(budget, level)))

    def on_get(self, req: Request, resp: Response) -> None:
        """List explicit budgets, page by page."""
        query = query_of(req, "limit", "after")
        page, more = self._budgets.page(_after(query.get("after")), _limit(query.get("limit")))
        following = None if more is None else base64.urlsafe_b64encode(more).decode()
        data = [shown(state) for state in page]
        write_json(resp, 200, {"object": "list", "data": data, "has_more": more is not None, "after": following})


class OneBudget(AdminResource):
    """``GET`` and ``DELETE /config/budget/{scope}/{id}``, with ``?meter=``, ``?model=`` and ``?source=``.

    Args:
        budgets: The use cases.
    """

    def __init__(self, budgets: Budgets) -> None:
        self.waits = budgets.waits
        self._budgets = budgets

    def on_get(self, req: Request, resp: Response, scope: str, scope_id: str | None = None) -> None:
        """Show the budget that holds for a scope, explicit or default."""
        write_json(resp, 200, shown(self._budgets.get(_name(req, scope, scope_id))))

    def on_delete(self, req: Request, resp: Response, scope: str, scope_id: str | None = None) -> None:
        """Remove an explicit budget; tell what holds now."""
        default = self._budgets.delete(_name(req, scope, scope_id))
        write_json(resp, 200, {"deleted": True, "default": None if default is None else shown(default)})


def shown(state: BudgetState) -> dict[str, Any]:
    """Return a budget as the API shows it."""
    return {
        "scope": state.scope,
        "id": state.id,
        "meter": state.meter,
        "model": state.model,
        "capacity": state.capacity,
        "refillPerSec": state.refill_per_sec,
        "maxDebt": state.max_debt,
        "level": state.level,
        "source": state.source,
    }


def _name(req: Request, scope: str, scope_id: str | None) -> BucketName:
    return read_name({"scope": scope, "id": scope_id, **query_of(req, "meter", "model", "source")})


def query_of(req: Request, *allowed: str) -> dict[str, str]:
    """Return the query's parameters; one that is misspelled must not act on another budget than was meant."""
    for name in req.params:
        if name not in allowed:
            raise InvalidRequest(name[:80], f"{name[:80]!r} is not a parameter; allowed are {', '.join(allowed)}")
        if isinstance(req.params[name], list):
            raise InvalidRequest(name, f"{name} is given more than once")
    return {name: str(req.get_param(name)) for name in req.params}


def _limit(value: str | None) -> int:
    if value is None:
        return 100
    if not value.isascii() or not value.isdigit() or len(value) > 4 or not 1 <= int(value) <= MAX_PAGE:
        raise InvalidRequest("limit", f"limit must be a whole number from 1 to {MAX_PAGE}, got {value!r}")
    return int(value)


def _after(value: str | None) -> bytes:
    try:
        return base64.b64decode(value or "", b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("after", f"after must be what a page gave as after, got {value!r}") from None
