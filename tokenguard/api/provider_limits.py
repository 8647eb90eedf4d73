"""``/sync/openai-limits``: read the provider's own limits now, and apply them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from falcon import Request, Response

from tokenguard.api.admin import AdminResource
from tokenguard.api.budgets import query_of
from tokenguard.api.wire import write_json
from tokenguard.errors import InvalidRequest
from tokenguard.model import Budget, Meter
from tokenguard.provider_limits import Entry, ProviderLimits
from tokenguard.provider_limits.learned import per_minute, window_of

_SWITCH = {"1": True, "true": True, "0": False, "false": False}


class ProviderSync(AdminResource):
    """``GET`` and ``POST /sync/openai-limits``, with ``?dry_run=`` and ``?probe=``.

    Args:
        limits: The use cases; None if the provider's limits are not heeded.
    """

    max_body_bytes = 1024  # so that whoever sends one is told that it does nothing
    waits = True

    def __init__(self, limits: ProviderLimits | None) -> None:
        self._limits = limits

    def on_get(self, req: Request, resp: Response) -> None:
        """Read the limits, apply them, and tell what they are and what changed."""
        query = query_of(req, "dry_run", "probe")
        if req.context.body:
            raise InvalidRequest("body", "the body must be empty: dry_run and probe go into the query")
        dry_run = _switch(query.get("dry_run"))
        if self._limits is None:
            raise InvalidRequest(
                "TOKENGUARD_PROVIDER_LIMITS",
                "the provider's limits are not heeded: TOKENGUARD_PROVIDER_LIMITS is off",
            )
        entries = self._limits.sync(dry_run=dry_run, probe=query.get("probe"))
        data = [
            _model(model or "", list(of_model))
            for model, of_model in groupby(entries, lambda entry: entry.name.model)
        ]
        write_json(resp, 200, {"object": "provider_limits", "dryRun": dry_run, "data": data})

    on_post = on_get


def _switch(value: str | None) -> bool:
    if value is not None and value not in _SWITCH:
        raise InvalidRequest("dry_run", f"dry_run must be 1 or 0, got {value!r}")
    return value is not None and _SWITCH[value]


def _model(model: str, entries: list[Entry]) -> dict[str, Any]:
    return {
        "model": model,
        "requestsPerMinute": _tightest(entries, Meter.REQUESTS),
        "tokensPerMinute": _tightest(entries, Meter.TOKENS),
        "limits": [_limit(entry) for entry in entries],
    }


def _tightest(entries: Iterable[Entry], meter: Meter) -> float | None:
    paces = [
        per_minute(entry.state.budget)
        for entry in entries
        if entry.state is not None and entry.name.meter is meter
    ]
    return _plain(min(paces)) if paces else None


def _limit(entry: Entry) -> dict[str, Any]:
    state, change = entry.state, entry.change
    shown: dict[str, Any] = {"meter": entry.name.meter, "source": entry.name.source}
    shown |= _budget(state and state.budget) or {"limit": None, "windowS": None, "refillPerSec": None}
    shown["level"] = None if state is None else state.level
    shown["ageS"] = None if entry.age_s is None else round(entry.age_s, 3)
    shown["changed"] = change and {"from": _budget(change.before), "to": _budget(change.after)}
    return shown


def _budget(budget: Budget | None) -> dict[str, Any] | None:
    if budget is None:
        return None
    return {
        "limit": budget.scale.capacity,
        "windowS": window_of(budget),
        "refillPerSec": budget.scale.per_sec,
    }


def _plain(number: float) -> float:
    return int(number) if number.is_integer() else round(number, 6)
