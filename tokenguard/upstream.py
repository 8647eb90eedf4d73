"""The hop to the provider: a small interface, and httpx behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import httpx

from tokenguard.errors import UpstreamError, UpstreamTimeout
from tokenguard.model import Headers, UpstreamRequest

KEEPALIVE_S = 30.0
"""How long a connection is kept for the next call; a new one costs a TLS handshake."""


class UpstreamResponse(Protocol):
    """An answer whose head has come and whose body is coming."""

    status: int
    headers: Headers

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, not decoded.

        Raises:
            UpstreamError: It broke off, or took too long; the request had been sent.
        """

    async def close(self) -> None:
        """Give the connection back, or drop it if the body has not been read to its end."""


class Upstream(Protocol):
    """A provider."""

    def describe(self) -> str:
        """Return what it is, for the start-up line; no secrets."""

    async def open(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the head of its answer.

        Raises:
            UpstreamError: There was none; ``sent`` says whether the request may have been acted upon.
        """

    async def close(self) -> None:
        """Close all connections."""


class HttpxUpstream:
    """A provider behind HTTP(S): one client, with a pool of connections, for the life of the app.

    Args:
        base_url: Where the API begins, such as ``https://api.openai.com/v1``.
        connect_timeout_s: For a connection to come about, and for a free one to be found.
        read_timeout_s: For the answer to begin, and between two pieces of it.
        max_connections: How many at most.
    """

    def __init__(
        self, base_url: str, *, connect_timeout_s: float, read_timeout_s: float, max_connections: int
    ) -> None:
        self._base = httpx.URL(base_url.rstrip("/"))
        self._timeout = httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=connect_timeout_s)
        self._client = httpx.AsyncClient(
            timeout=self._timeout,
            limits=httpx.Limits(
                max_connections=max_connections,
                max_keepalive_connections=max_connections,
                keepalive_expiry=KEEPALIVE_S,
            ),
            follow_redirects=False,
        )

    def describe(self) -> str:
        """Return the base URL, without what a URL can hide in it."""
        return str(self._base.copy_with(username=None, password=None, query=None))

    async def open(self, request: UpstreamRequest) -> HttpxResponse:
        """Send a request and wait for the head of its answer."""
        # The path is appended, not joined: a base URL with a query (Azure's api-version) keeps it.
        url = self._base.copy_with(raw_path=self._path(request.path))
        prepared = httpx.Request(
            request.method,
            url,
            headers=request.headers,
            content=request.body or None,
            extensions={"timeout": self._timeout.as_dict()},
        )
        try:
            response = await self._client.send(prepared, stream=True)
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise UpstreamError(f"the provider could not be reached ({_reason(error)})", sent=False) from error
        except httpx.ConnectTimeout as error:
            raise UpstreamTimeout("the provider could not be reached in time", sent=False) from error
        except httpx.PoolTimeout as error:
            raise UpstreamTimeout("no connection to the provider became free in time", sent=False) from error
        except httpx.HTTPError as error:
            raise _broken(error) from error
        if not 200 <= response.status_code <= 599:
            await response.aclose()
            raise UpstreamError(f"the provider answered with a status of {response.status_code}", sent=True)
        return HttpxResponse(response)

    def _path(self, path: str) -> bytes:
        base, _, query = self._base.raw_path.partition(b"?")
        return base.rstrip(b"/") + path.encode() + (b"?" + query if query else b"")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class HttpxResponse:
    """An answer through httpx."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers: Headers = [(name.lower(), value) for name, value in response.headers.raw]

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except httpx.HTTPError as error:
            raise _broken(error) from error

    async def close(self) -> None:
        """Give the connection back."""
        await self._response.aclose()


def _broken(error: httpx.HTTPError) -> UpstreamError:
    """Return what went wrong after the request may have been sent."""
    if isinstance(error, httpx.TimeoutException):
        return UpstreamTimeout("the provider did not answer in time", sent=True)
    return UpstreamError(f"the provider's answer broke off ({_reason(error)})", sent=True)


def _reason(error: BaseException) -> str:
    """Return an error's kind and what the system said; not its own text, which may quote a URL or a header."""
    said: str | None = None
    cause: BaseException | None = error
    while cause is not None and not said:
        said = cause.strerror if isinstance(cause, OSError) else None
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
