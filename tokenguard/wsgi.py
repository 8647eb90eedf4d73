"""The composition root of the WSGI app."""

from __future__ import annotations

import atexit
from typing import Any

import falcon

from tokenguard import logs
from tokenguard.api.wire import over_wsgi
from tokenguard.api.wsgi_proxy import GuardedWsgi, WsgiChatCompletions, WsgiModels
from tokenguard.backends import Backend
from tokenguard.config import Config, read_config
from tokenguard.engine import Engine, environment
from tokenguard.routes import furnish
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
    config = config or read_config(environment())
    logs.set_up(as_json=config.log_json)
    house = House(Engine(config, backend))
    upstream = upstream or SyncHttpxUpstream(provider(config))
    atexit.register(house.close)
    app: falcon.App[Any, Any] = falcon.App()
    furnish(house, app, over_wsgi, WsgiChatCompletions(house.guard, upstream), WsgiModels(upstream, house.terms))
    return GuardedWsgi(app, house.open)
