"""The hop to the provider: a small interface, and where the provider is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from tokenguard.errors import UpstreamBusy, UpstreamError
from tokenguard.model import Headers, UpstreamRequest

KEEPALIVE_S = 30.0
"""How long a connection is kept for the next call; a new one costs a TLS handshake."""


class UpstreamResponse(Protocol):
    """An answer whose head has come and whose body is coming."""

    @property
    def status(self) -> int:
        """The status: 200 to 599."""

    @property
    def headers(self) -> Headers:
        """The fields, the names in lower case."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, not decoded.

        Raises:
            UpstreamError: It broke off, or took too long; the request had been sent.
        """

    async def close(self) -> None:
        """Give the connection back, or drop it if the body has not been read to its end."""


class Upstream(Protocol):
    """A provider. Whoever waits for it may be cancelled: no connection is lost by that."""

    def describe(self) -> str:
        """Return what it is, for the start-up line; no secrets."""

    async def open(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the head of its answer.

        Raises:
            UpstreamError: There was none; ``sent`` says whether the request may have been acted upon.
        """

    async def close(self) -> None:
        """Close all connections."""


class SyncUpstreamResponse(Protocol):
    """What ``UpstreamResponse`` is, for a thread."""

    @property
    def status(self) -> int:
        """The status: 200 to 599."""

    @property
    def headers(self) -> Headers:
        """The fields, the names in lower case."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes, not decoded."""

    def close(self) -> None:
        """Give the connection back, or drop it if the body has not been read to its end."""


class SyncUpstream(Protocol):
    """What ``Upstream`` is, for a thread."""

    def open(self, request: UpstreamRequest) -> SyncUpstreamResponse:
        """Send a request and wait for the head of its answer."""


@dataclass(frozen=True)
class Hop:
    """Where the provider is, and how patient we are.

    Attributes:
        base_url: Where the API begins, such as ``https://api.openai.com/v1``.
        connect_timeout_s: For a connection to come about.
        read_timeout_s: For the answer to begin, and between two pieces of it.
        total_timeout_s: For the whole of an answer, however steadily it comes.
        max_connections: How many at most.
        queue_timeout_s: For one of them to become free. No more calls wait for one than there are connections.
        ca_file: Whose certificates vouch for the provider; None for those of certifi, or of ``ca_dir``.
        ca_dir: Likewise, a folder of them.
    """

    base_url: str
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float
    max_connections: int
    queue_timeout_s: float
    ca_file: str | None = None
    ca_dir: str | None = None

    @cached_property
    def url(self) -> SplitResult:
        """The base URL, in its parts."""
        return urlsplit(self.base_url)

    @property
    def host(self) -> str:
        """The host's name or address."""
        return self.url.hostname or ""

    @property
    def tls(self) -> bool:
        """Whether the provider is to prove who it is."""
        return self.url.scheme == "https"

    @property
    def port(self) -> int:
        """The port."""
        return self.url.port or (443 if self.tls else 80)

    @property
    def authority(self) -> str:
        """The host, and the port if it is not the scheme's own, as the field ``host`` names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port != (443 if self.tls else 80) else host

    def target(self, path: str) -> str:
        """Return the path of a request; a base URL with a query (Azure's api-version) keeps it."""
        query = f"?{self.url.query}" if self.url.query else ""
        return self.url.path.rstrip("/") + path + query

    def describe(self) -> str:
        """Return the base URL, without what a URL can hide in it."""
        return f"{self.url.scheme}://{self.authority}{self.url.path.rstrip('/')}"

    def busy(self) -> UpstreamBusy:
        """Return the error of a call that found no connection free."""
        return UpstreamBusy(
            f"all {self.max_connections} connections to the provider are in use, and as many calls wait for one "
            f"or none became free in {self.queue_timeout_s:g} s",
            sent=False,
        )


def usable(status: int) -> bool:
    """Return whether an answer of a status can be passed on."""
    return 200 <= status <= 599


def unusable(status: int) -> UpstreamError:
    """Return why an answer of a status cannot be passed on."""
    return UpstreamError(f"the provider answered with a status of {status}", sent=True)
