"""What both composition roots build, whichever way requests come in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

import falcon
from dotenv import dotenv_values

from tokenguard import logs
from tokenguard.api.admin import AdminRule
from tokenguard.api.budgets import BudgetList, OneBudget
from tokenguard.api.call import Guard
from tokenguard.api.health import Health
from tokenguard.api.metrics import Exposition
from tokenguard.api.openapi import Description
from tokenguard.api.provider_limits import ProviderSync
from tokenguard.api.wire import Resource, Tracing, add_error_handlers
from tokenguard.backends import Backend
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.node import Node, open_node
from tokenguard.backends.outage import Closed, Open, Policy, Share
from tokenguard.backends.workers import join
from tokenguard.budgets import Budgets
from tokenguard.config import Config, read_config
from tokenguard.errors import InvalidSetting
from tokenguard.estimate import Estimator
from tokenguard.exchange import Terms
from tokenguard.limiter import Limiter
from tokenguard.metrics import Metrics
from tokenguard.model import Headers
from tokenguard.plan import Plans
from tokenguard.provider_limits import ProviderLimits
from tokenguard.provider_limits.source import ProviderAccount, ProviderSource
from tokenguard.upstream import Hop, Upstream
from tokenguard.upstream._pool import PooledUpstream

PROVIDER_TIMEOUT_S = 10.0
"""For the provider to tell its limits: whoever asked for them waits."""


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


def node_of(config: Config) -> Node:
    """Open what the processes of this node share, as the configuration says.

    Raises:
        InvalidSetting: It cannot be had.
    """
    return open_node(config.buckets, config.table, config.state)


def buckets(config: Config, node: Node | None = None) -> Backend:
    """Return the backend that the configuration names.

    Args:
        config: The configuration.
        node: What the processes of this node share; opened here by default.

    Raises:
        InvalidSetting: It cannot be opened.
    """
    node = node or node_of(config)
    table = node.table
    if config.redis is None:
        return MemoryBackend(*node)
    from tokenguard.backends.redis import RedisBackend  # whoever has none need not load it

    policy: Policy = Closed()
    if config.redis_down == "open":
        policy = Open(table)
    elif config.redis_down == "share" and config.nodes is not None:
        policy = Share(table, config.nodes)
    return RedisBackend(config.redis, config.realm, policy, table, config.redis_timeout_s)


def provider(config: Config) -> Hop:
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
    return Hop(
        config.openai_base_url,
        connect_timeout_s=config.connect_timeout_s,
        read_timeout_s=config.read_timeout_s,
        total_timeout_s=config.total_timeout_s,
        max_connections=config.max_connections,
        queue_timeout_s=config.queue_timeout_s,
        ca_file=os.environ.get("SSL_CERT_FILE"),
        ca_dir=os.environ.get("SSL_CERT_DIR"),
    )


def upstream_of(config: Config) -> Upstream:
    """Return the way to the provider: our own, or httpx's where a proxy of HTTP stands in the way.

    Raises:
        InvalidSetting: There is no key for the provider.
    """
    hop = provider(config)
    if _is_proxied(hop):
        from tokenguard.upstream.httpx_hop import HttpxUpstream  # whoever goes straight there need not load it

        return HttpxUpstream(hop)
    return PooledUpstream(hop)


def _is_proxied(hop: Hop) -> bool:
    """Return whether the environment leads to the provider through a proxy, by the rules that curl knows too."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return False
    from urllib.request import (  # type: ignore[attr-defined]  # typeshed lacks it; much is loaded for them
        getproxies_environment,
        proxy_bypass_environment,
    )

    proxies = getproxies_environment()
    return not {hop.url.scheme, "all"}.isdisjoint(proxies) and not proxy_bypass_environment(hop.authority, proxies)


class House:
    """Everything that does not depend on how requests come in.

    Args:
        config: What to go by; the environment and ``.env`` by default.
        backend: Where the buckets live; the one that the configuration names by default.

    Attributes:
        config: The configuration.
        backend: Where the buckets live.
        provider_limits: Heeds the provider's own limits; None if nobody does.
        guard: Guards calls.
        terms: What is the same for all exchanges.

    Raises:
        InvalidSetting: The environment cannot be used.
    """

    def __init__(self, config: Config | None, backend: Backend | None) -> None:
        self.config = config = config or read_config(environment())
        logs.set_up(as_json=config.log_json)
        self.backend = backend = backend or buckets(config)
        join(backend.table)
        self._plans = Plans(backend, config.defaults)
        self._metrics = Metrics(backend)
        self._budgets = Budgets(backend, self._plans)
        self.provider_limits = self._limits() if config.provider_limits else None
        self.terms = Terms(_credentials(config), Estimator(), config.ask_for_usage)
        self.guard = Guard(
            Limiter(backend, self._plans),
            self.terms,
            self._metrics,
            logs.log_call if config.log_calls else None,
            config.max_body_bytes,
            config.caller_timeout_s,
            self.provider_limits,
        )

    def _limits(self) -> ProviderLimits:
        config = self.config
        account = ProviderAccount(
            config.openai_base_url, _credentials(config), config.openai_admin_key, config.openai_project
        )
        source = ProviderSource(account, min(config.read_timeout_s, PROVIDER_TIMEOUT_S))
        return ProviderLimits(
            self.backend, self._budgets, source, self._metrics.provider_told, config.sync_interval_s
        )

    def open(self) -> None:
        """Begin what goes on beside the calls, in a process without an event loop."""
        self.backend.open()
        if self.provider_limits is not None:
            self.provider_limits.start()

    def close(self) -> None:
        """End it."""
        if self.provider_limits is not None:
            self.provider_limits.stop()
        self.backend.close()

    async def start(self) -> None:
        """Do what ``open`` does, for an event loop."""
        await self.backend.start()
        if self.provider_limits is not None:
            self.provider_limits.start()

    async def stop(self) -> None:
        """Do what ``close`` does, likewise."""
        if self.provider_limits is not None:
            await asyncio.to_thread(self.provider_limits.stop)
        await self.backend.stop()

    def furnish(
        self, app: falcon.App[Any, Any], over: Callable[[Resource], object], chat: object, models: object
    ) -> None:
        """Give an app its middleware, its error handlers and its routes.

        Args:
            app: The app, of either driver.
            over: Makes a resource ready for the driver.
            chat: The resource of chat completions, which are the driver's own.
            models: Likewise.
        """
        config = self.config
        app.add_middleware([Tracing(self._metrics), AdminRule(config.admin_token, config.admin_allow)])
        add_error_handlers(app)
        app.add_route("/v1/chat/completions", chat)
        app.add_route("/v1/models", models)
        app.add_route("/v1/models/{model:path}", models)
        one = over(OneBudget(self._budgets))
        app.add_route("/config/budget", over(BudgetList(self._budgets)))
        app.add_route("/config/budget/{scope}", one)
        app.add_route("/config/budget/{scope}/{scope_id:path}", one)
        app.add_route("/sync/openai-limits", over(ProviderSync(self.provider_limits)))
        app.add_route("/", over(Health(self.backend, self.provider_limits)))
        app.add_route("/metrics", over(Exposition(self._metrics)))
        app.add_route("/openapi.json", over(Description()))


def _credentials(config: Config) -> Headers:
    """Return the header fields that authenticate us to the provider."""
    fields = {
        b"authorization": config.openai_api_key and f"Bearer {config.openai_api_key}",
        b"openai-organization": config.openai_organization,
        b"openai-project": config.openai_project,
    }
    return [(name, value.encode()) for name, value in fields.items() if value]
