"""``GET /metrics``: counters for Prometheus."""

from __future__ import annotations

from falcon import Request, Response

from tokenguard.api.wire import Resource
from tokenguard.metrics import Metrics


class Exposition(Resource):
    """``GET /metrics``.

    Args:
        metrics: What to expose.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_get(self, req: Request, resp: Response) -> None:
        """Tell all metrics as they are now."""
        resp.content_type, resp.data = self._metrics.exposition(req.get_header("accept"))
