"""``GET /``: is it alive, and what is it."""

from __future__ import annotations

from datetime import UTC, datetime

from falcon import Request, Response

from tokenguard._version import __version__
from tokenguard.api.wire import Resource, write_json
from tokenguard.backends import Backend
from tokenguard.backends.workers import living
from tokenguard.provider_limits import ProviderLimits


class Health(Resource):
    """``GET /``.

    Args:
        backend: Where the buckets live.
        limits: What is known of the provider's own limits; None if nobody heeds them.
    """

    def __init__(self, backend: Backend, limits: ProviderLimits | None = None) -> None:
        self._backend = backend
        self._limits = limits

    def on_get(self, req: Request, resp: Response) -> None:
        """Tell what is running, and the time."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        limits = self._limits
        found = (self._backend.trouble(), limits.trouble() if limits else None)
        trouble = "; ".join(what for what in found if what is not None) or None
        state = {
            "name": "tokenguard",
            "version": __version__,
            "status": "ok" if trouble is None else "degraded",
            "backend": self._backend.describe(),
            "workers": len(living(self._backend.table)) or 1,
            **({} if trouble is None else {"trouble": trouble}),
            **({} if limits is None else {"provider": limits.shown()}),
        }
        write_json(resp, 200, {**state, "time": now})

    on_head = on_get
