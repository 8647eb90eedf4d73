"""What guards calls over HTTP, put together: the same for whoever serves, and for a client of one's own."""

from __future__ import annotations

import asyncio
import os

from tokenguard import logs
from tokenguard.api.call import Guard
from tokenguard.config import Config
from tokenguard.engine import Engine
from tokenguard.errors import InvalidSetting
from tokenguard.exchange import Terms
from tokenguard.metrics import Metrics
from tokenguard.model import Headers
from tokenguard.provider_limits import ProviderLimits
from tokenguard.provider_limits.source import ProviderAccount, ProviderSource
from tokenguard.upstream import Hop, Upstream
from tokenguard.upstream._pool import PooledUpstream

PROVIDER_TIMEOUT_S = 10.0
"""For the provider to tell its limits: whoever asked for them waits."""


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
    """What guards calls over HTTP, however they come in.

    Args:
        engine: What decides.

    Attributes:
        config: The configuration.
        backend: Where the buckets live.
        budgets: Sets, lists and removes budgets.
        metrics: Counts.
        provider_limits: Heeds the provider's own limits; None if nobody does.
        guard: Guards calls.
        terms: What is the same for all exchanges.
    """

    def __init__(self, engine: Engine) -> None:
        self.config = config = engine.config
        self.backend = engine.backend
        self.budgets = engine.budgets
        self.metrics = Metrics(engine.backend)
        self.provider_limits = self._limits() if config.provider_limits else None
        self.terms = Terms(_credentials(config), engine.estimator, config.ask_for_usage)
        self.guard = Guard(
            engine.limiter,
            self.terms,
            self.metrics,
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
            self.backend, self.budgets, source, self.metrics.provider_told, config.sync_interval_s
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


def _credentials(config: Config) -> Headers:
    """Return the header fields that authenticate us to the provider."""
    fields = {
        b"authorization": config.openai_api_key and f"Bearer {config.openai_api_key}",
        b"openai-organization": config.openai_organization,
        b"openai-project": config.openai_project,
    }
    return [(name, value.encode()) for name, value in fields.items() if value]
