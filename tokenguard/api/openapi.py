"""``GET /openapi.json``: the description of this API."""

from __future__ import annotations

import json
from importlib.resources import files

from falcon import Request, Response

from tokenguard._version import __version__
from tokenguard.api.wire import Resource, write_json


class Description(Resource):
    """``GET /openapi.json``."""

    def __init__(self) -> None:
        self._description = json.loads((files("tokenguard.api") / "openapi.json").read_bytes())
        self._description["info"]["version"] = __version__

    def on_get(self, req: Request, resp: Response) -> None:
        """Tell it."""
        write_json(resp, 200, self._description)
