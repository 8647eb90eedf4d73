"""The hop to the provider: a small interface, and httpx behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import httpx

from tokenguard.errors import UpstreamBusy, UpstreamError, UpstreamTimeout
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


class SyncUpstreamResponse(Protocol):
    """What ``UpstreamResponse`` is, for a thread."""

    status: int
    headers: Headers

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
        max_connections: How many at most.
        queue_timeout_s: For one of them to become free. No more calls wait for one than there are connections.
    """

    base_url: str
    connect_timeout_s: float
    read_timeout_s: float
    max_connections: int
    queue_timeout_s: float

    @cached_property
    def url(self) -> httpx.URL:
        """The base URL."""
        return httpx.URL(self.base_url.rstrip("/"))

    def describe(self) -> str:
        """Return the base URL, without what a URL can hide in it."""
        return str(self.url.copy_with(username=None, password=None, query=None))

    def limits(self) -> httpx.Limits:
        """Return what httpx may keep open; how many run at once is counted here."""
        # NOTE: httpx has a limit and a queue of its own, but looks at all that wait whenever one comes or goes.
        return httpx.Limits(max_keepalive_connections=self.max_connections, keepalive_expiry=KEEPALIVE_S)

    def busy(self) -> UpstreamBusy:
        """Return the error of a call that found no connection free."""
        return UpstreamBusy(
            f"all {self.max_connections} connections to the provider are in use, and as many calls wait for one "
            f"or none became free in {self.queue_timeout_s:g} s",
            sent=False,
        )

    def prepare(self, request: UpstreamRequest) -> httpx.Request:
        """Return the request as httpx wants it."""
        # The path is appended, not joined: a base URL with a query (Azure's api-version) keeps it.
        url = self.url
        base, _, query = url.raw_path.partition(b"?")
        path = base.rstrip(b"/") + request.path.encode() + (b"?" + query if query else b"")
        timeout = httpx.Timeout(self.read_timeout_s, connect=self.connect_timeout_s)
        return httpx.Request(
            request.method,
            url.copy_with(raw_path=path),
            headers=request.headers,
            content=request.body or None,
            extensions={"timeout": timeout.as_dict()},
        )


class HttpxUpstream:
    """A provider behind HTTP(S): one client, with a pool of connections, for the life of the app."""

    def __init__(self, hop: Hop) -> None:
        self._hop = hop
        self._client = httpx.AsyncClient(limits=hop.limits(), follow_redirects=False)
        self._free = asyncio.Semaphore(hop.max_connections)
        self._waiting = 0

    def describe(self) -> str:
        """Return the base URL."""
        return self._hop.describe()

    async def open(self, request: UpstreamRequest) -> HttpxResponse:
        """Send a request and wait for the head of its answer."""
        await self._take()
        try:
            with _mapped_to_open():
                response = await self._client.send(self._hop.prepare(request), stream=True)
            if (error := _unusable(response)) is not None:
                await response.aclose()
                raise error
        except BaseException:
            self._free.release()
            raise
        return HttpxResponse(response, self._free)

    async def _take(self) -> None:
        """Wait for a connection's turn."""
        if not self._free.locked():
            await self._free.acquire()  # at once
            return
        if self._waiting >= self._hop.max_connections:
            raise self._hop.busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._hop.queue_timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise self._hop.busy() from None
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class HttpxResponse:
    """An answer through httpx."""

    def __init__(self, response: httpx.Response, free: asyncio.Semaphore) -> None:
        self._response = response
        self._free: asyncio.Semaphore | None = free
        self.status = response.status_code
        self.headers = _headers(response)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        with _mapped():
            async for chunk in self._response.aiter_raw():
                yield chunk

    async def close(self) -> None:
        """Give the connection back."""
        free, self._free = self._free, None
        if free is None:
            return
        try:
            await self._response.aclose()
        finally:
            free.release()


class SyncHttpxUpstream:
    """The same for threads."""

    def __init__(self, hop: Hop) -> None:
        self._hop = hop
        self._client = httpx.Client(limits=hop.limits(), follow_redirects=False)
        self._free = threading.Semaphore(hop.max_connections)
        self._turns = threading.Semaphore(2 * hop.max_connections)

    def open(self, request: UpstreamRequest) -> SyncHttpxResponse:
        """Send a request and wait for the head of its answer."""
        self._take()
        try:
            with _mapped_to_open():
                response = self._client.send(self._hop.prepare(request), stream=True)
            if (error := _unusable(response)) is not None:
                response.close()
                raise error
        except BaseException:
            self._give_back()
            raise
        return SyncHttpxResponse(response, self._give_back)

    def _take(self) -> None:
        if not self._turns.acquire(blocking=False):
            raise self._hop.busy()
        if not self._free.acquire(timeout=self._hop.queue_timeout_s):
            self._turns.release()
            raise self._hop.busy()

    def _give_back(self) -> None:
        self._free.release()
        self._turns.release()


class SyncHttpxResponse:
    """An answer through httpx, for a thread."""

    def __init__(self, response: httpx.Response, give_back: Callable[[], None]) -> None:
        self._response = response
        self._give_back: Callable[[], None] | None = give_back
        self.status = response.status_code
        self.headers = _headers(response)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        with _mapped():
            yield from self._response.iter_raw()

    def close(self) -> None:
        """Give the connection back."""
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            self._response.close()
        finally:
            give_back()


def _headers(response: httpx.Response) -> Headers:
    return [(name.lower(), value) for name, value in response.headers.raw]


def _unusable(response: httpx.Response) -> UpstreamError | None:
    """Return why an answer cannot be passed on, if it cannot."""
    if 200 <= response.status_code <= 599:
        return None
    return UpstreamError(f"the provider answered with a status of {response.status_code}", sent=True)


@contextmanager
def _mapped_to_open() -> Iterator[None]:
    """Turn what httpx raises before the head of an answer has come into errors of ours."""
    with _mapped():
        try:
            yield
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise UpstreamError(f"the provider could not be reached ({_reason(error)})", sent=False) from error
        except httpx.ConnectTimeout as error:
            raise UpstreamTimeout("the provider could not be reached in time", sent=False) from error


@contextmanager
def _mapped() -> Iterator[None]:
    """Turn what httpx raises after a request may have been sent into errors of ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise UpstreamTimeout("the provider did not answer in time", sent=True) from error
    except httpx.HTTPError as error:
        raise UpstreamError(f"the provider's answer broke off ({_reason(error)})", sent=True) from error


def _reason(error: BaseException) -> str:
    """Return an error's kind and what the system said; not its own text, which may quote a URL or a header."""
    said: str | None = None
    cause: BaseException | None = error
    while cause is not None and not said:
        said = cause.strerror if isinstance(cause, OSError) else None
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
