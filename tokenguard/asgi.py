"""The composition root of the ASGI app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import falcon.asgi

from tokenguard import logs
from tokenguard.api.asgi_call import Chat
from tokenguard.api.proxy import ChatCompletions, GuardedApp, GuardedRequest, Models
from tokenguard.api.wire import over_asgi
from tokenguard.backends import Backend
from tokenguard.config import Config, read_config
from tokenguard.engine import Engine, environment
from tokenguard.routes import furnish
from tokenguard.upstream import Upstream
from tokenguard.wiring import House, upstream_of


def create_app(
    config: Config | None = None, upstream: Upstream | None = None, backend: Backend | None = None
) -> GuardedApp:
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
    upstream = upstream or upstream_of(config)
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(request_type=GuardedRequest)
    chat = Chat(house.guard, upstream)
    furnish(house, app, over_asgi, ChatCompletions(chat), Models(upstream, house.terms))
    app.add_middleware(Lifespan(upstream, house))
    return GuardedApp(app, chat)


class Lifespan:
    """Opens and closes what is beyond this process: the connections to the provider, and to the buckets."""

    def __init__(self, upstream: Upstream, house: House) -> None:
        self._upstream = upstream
        self._house = house

    async def process_startup(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Open."""
        await self._house.start()

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Close."""
        await self._upstream.close()
        await self._house.stop()
