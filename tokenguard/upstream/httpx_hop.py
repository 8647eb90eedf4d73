"""The hop to the provider through httpx: for threads, and for where a proxy of HTTP stands in the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import ModuleType
from typing import TypeVar

import anyio
import httpx

from tokenguard.errors import UpstreamError, UpstreamTimeout
from tokenguard.model import Headers, UpstreamRequest
from tokenguard.upstream import KEEPALIVE_S, Hop, unusable, usable

T = TypeVar("T")


def _limits(hop: Hop) -> httpx.Limits:
    """Return what httpx may keep open; how many run at once is counted here."""
    # NOTE: httpx has a limit and a queue of its own, but looks at all that wait whenever one comes or goes.
    return httpx.Limits(max_keepalive_connections=hop.max_connections, keepalive_expiry=KEEPALIVE_S)


def _prepare(hop: Hop, request: UpstreamRequest) -> httpx.Request:
    """Return the request as httpx wants it."""
    timeout = httpx.Timeout(hop.read_timeout_s, connect=hop.connect_timeout_s)
    return httpx.Request(
        request.method,
        httpx.URL(hop.base_url).copy_with(raw_path=hop.target(request.path).encode()),
        headers=request.headers,
        content=request.body or None,
        extensions={"timeout": timeout.as_dict()},
    )


async def _shielded(work: Awaitable[T]) -> T:
    """Wait for something of httpx's; whoever waits may be cancelled.

    NOTE: httpx shields from a scope of anyio's, and not from a cancelled task, what gives a connection back: half
    given back, it would be lost.
    """
    scope = anyio.CancelScope()

    async def inside() -> T:
        with scope:
            return await work
        raise asyncio.CancelledError

    task = asyncio.ensure_future(inside())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        scope.cancel()
        await asyncio.wait([task])
        if (
            not task.cancelled()
            and task.exception() is None
            and isinstance(answer := task.result(), httpx.Response)
        ):
            await answer.aclose()  # it came all the same
        raise


class HttpxUpstream:
    """A provider behind HTTP(S): one client, with a pool of connections, for the life of the app."""

    def __init__(self, hop: Hop) -> None:
        self._hop = hop
        self._client = httpx.AsyncClient(limits=_limits(hop), follow_redirects=False)
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
                response = await _shielded(self._client.send(_prepare(self._hop, request), stream=True))
            if not usable(response.status_code):
                await response.aclose()
                raise unusable(response.status_code)
        except BaseException:
            self._free.release()
            raise
        return HttpxResponse(response, self._free, self._hop)

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

    def __init__(self, response: httpx.Response, free: asyncio.Semaphore, hop: Hop) -> None:
        self._response = response
        self._until = monotonic() + hop.total_timeout_s
        self._free: asyncio.Semaphore | None = free
        self.status = response.status_code
        self.headers = _headers(response)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        pieces = self._response.aiter_raw()
        with _mapped():
            while True:
                try:
                    chunk = await _shielded(anext(pieces))
                except StopAsyncIteration:
                    return
                _check_time(self._until)
                yield chunk

    async def close(self) -> None:
        """Give the connection back."""
        free, self._free = self._free, None
        if free is None:
            return
        try:
            await _shielded(self._response.aclose())
        finally:
            free.release()


class SyncHttpxUpstream:
    """The same for threads."""

    def __init__(self, hop: Hop) -> None:
        self._hop = hop
        self._client = httpx.Client(limits=_limits(hop), follow_redirects=False)
        self._free = threading.Semaphore(hop.max_connections)
        self._turns = threading.Semaphore(2 * hop.max_connections)

    def open(self, request: UpstreamRequest) -> SyncHttpxResponse:
        """Send a request and wait for the head of its answer."""
        self._take()
        try:
            with _mapped_to_open():
                response = self._client.send(_prepare(self._hop, request), stream=True)
            if not usable(response.status_code):
                response.close()
                raise unusable(response.status_code)
        except BaseException:
            self._give_back()
            raise
        return SyncHttpxResponse(response, self._give_back, self._hop)

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

    def __init__(self, response: httpx.Response, give_back: Callable[[], None], hop: Hop) -> None:
        self._response = response
        self._until = monotonic() + hop.total_timeout_s
        self._give_back: Callable[[], None] | None = give_back
        self.status = response.status_code
        self.headers = _headers(response)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        with _mapped():
            for chunk in self._response.iter_raw():
                _check_time(self._until)
                yield chunk

    def close(self) -> None:
        """Give the connection back."""
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            self._response.close()
        finally:
            give_back()


def _check_time(until: float) -> None:
    """Give up an answer that comes steadily, and does not come to its end."""
    if monotonic() > until:
        raise UpstreamTimeout("the provider did not end its answer in time", sent=True)


def _headers(response: httpx.Response) -> Headers:
    return [(name.lower(), value) for name, value in response.headers.raw]


@contextmanager
def _mapped_to_open() -> Iterator[None]:
    """Turn what httpx raises before the head of an answer has come into errors of ours."""
    try:
        yield
    except httpx.HTTPError as error:
        raise unanswered(error) from error


@contextmanager
def _mapped() -> Iterator[None]:
    """Turn what httpx raises after a request may have been sent into errors of ours."""
    try:
        yield
    except httpx.HTTPError as error:
        raise broken_off(error) from error


def unanswered(error: Exception, kin: ModuleType = httpx) -> UpstreamError:
    """Return what httpx, or its kin, raised before the head of an answer had come as an error of ours."""
    if isinstance(error, kin.ConnectTimeout | kin.PoolTimeout):
        return UpstreamTimeout("the provider could not be reached in time", sent=False)
    if isinstance(error, kin.ConnectError | kin.ProxyError | kin.UnsupportedProtocol):
        return UpstreamError(f"the provider could not be reached ({_reason(error)})", sent=False)
    return broken_off(error, kin)


def broken_off(error: Exception, kin: ModuleType = httpx) -> UpstreamError:
    """Return what httpx, or its kin, raised after a request may have been sent as an error of ours."""
    if isinstance(error, kin.TimeoutException):
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
