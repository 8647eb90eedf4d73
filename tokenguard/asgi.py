"""The composition root of the ASGI app."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import falcon
import falcon.asgi
from dotenv import dotenv_values

from tokenguard._bucket import BucketTable
from tokenguard.api.admin import AdminRule
from tokenguard.api.budgets import BudgetList, OneBudget
from tokenguard.api.health import Health
from tokenguard.api.proxy import ChatCompletions, GuardedApp, GuardedRequest, Models
from tokenguard.api.wire import on_http_error, on_tokenguard_error, on_unexpected_error
from tokenguard.backends import Backend
from tokenguard.backends.memory import MemoryBackend
from tokenguard.budgets import Budgets
from tokenguard.config import Config, read_config
from tokenguard.errors import InvalidSetting, TokenGuardError
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.model import Headers
from tokenguard.plan import Plans
from tokenguard.upstream import HttpxUpstream, Upstream


def environment() -> Mapping[str, str]:
    """Return the environment, and what ``.env`` in the working directory adds to it.

    Raises:
        InvalidSetting: ``.env`` is not text.
    """
    try:
        written = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise InvalidSetting(".env", f".env must be UTF-8: {error}") from None
    return {**{name: value for name, value in written.items() if value is not None}, **os.environ}


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
    if config is None:
        config = read_config(environment())
    upstream = upstream or provider(config)
    backend = backend or buckets(config)
    plans = Plans(backend, config.defaults)
    terms = Terms(credentials(config), Estimator(), config.ask_for_usage)
    budgets = Budgets(backend, plans)
    admin = AdminRule(config.admin_token, config.admin_allow)
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(request_type=GuardedRequest, middleware=[admin])
    app.add_middleware(Lifespan(upstream))
    app.add_error_handler(Exception, on_unexpected_error)
    app.add_error_handler(falcon.HTTPError, on_http_error)
    app.add_error_handler(TokenGuardError, on_tokenguard_error)
    app.add_route("/", Health(backend))
    limiter = Limiter(backend, plans)
    app.add_route("/v1/chat/completions", ChatCompletions(limiter, upstream, terms, config.max_body_bytes))
    models = Models(upstream, terms)
    app.add_route("/v1/models", models)
    app.add_route("/v1/models/{model:path}", models)
    app.add_route("/config/budget", BudgetList(budgets))
    one = OneBudget(budgets)
    app.add_route("/config/budget/{scope}", one)
    app.add_route("/config/budget/{scope}/{scope_id:path}", one)
    return GuardedApp(app)


class Lifespan:
    """Closes the connections to the provider when the server stops."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Close them."""
        await self._upstream.close()


def buckets(config: Config) -> MemoryBackend:
    """Return the backend that the configuration names."""
    return MemoryBackend(BucketTable(config.buckets))


def provider(config: Config) -> HttpxUpstream:
    """Return the provider that the configuration names.

    Raises:
        InvalidSetting: There is no key for it.
    """
    if config.openai_api_key is None:
        raise InvalidSetting(
            "OPENAI_API_KEY",
            "OPENAI_API_KEY is not set: set it in the environment or in .env, or run `tokenguard demo`, which "
            "needs none",
        )
    return HttpxUpstream(
        config.openai_base_url,
        connect_timeout_s=config.connect_timeout_s,
        read_timeout_s=config.read_timeout_s,
        max_connections=config.max_connections,
    )


def credentials(config: Config) -> Headers:
    """Return the header fields that authenticate us to the provider."""
    fields = {
        b"authorization": config.openai_api_key and f"Bearer {config.openai_api_key}",
        b"openai-organization": config.openai_organization,
        b"openai-project": config.openai_project,
    }
    return [(name, value.encode()) for name, value in fields.items() if value]
