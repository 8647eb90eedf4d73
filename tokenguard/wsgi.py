"""The composition root of the WSGI app."""

from __future__ import annotations

import atexit
from typing import Any

import falcon

from tokenguard.api.wire import over_wsgi
from tokenguard.api.wsgi_proxy import GuardedWsgi, WsgiChatCompletions, WsgiModels
from tokenguard.backends import Backend
from tokenguard.config import Config
from tokenguard.upstream import SyncUpstream
from tokenguard.upstream.httpx_hop import SyncHttpxUpstream
from tokenguard.wiring import House, provider


def create_app(
    config: Config | None = None, upstream: SyncUpstream | None = None, backend: Backend | None = None
) -> GuardedWsgi:
    """Build the app and wire everything.

    Args:
        config: What to go by; the environment and ``.env`` by default.
        upstream: The provider; the one that the configuration names by default.
        backend: Where the buckets live; likewise.

    Raises:
        InvalidSetting: The environment cannot be used, or there is no key for the provider.
    """
    house = House(config, backend)
    upstream = upstream or SyncHttpxUpstream(provider(house.config))
    atexit.register(house.close)
    app: falcon.App[Any, Any] = falcon.App()
    house.furnish(app, over_wsgi, WsgiChatCompletions(house.guard, upstream), WsgiModels(upstream, house.terms))
    return GuardedWsgi(app, house.open)
