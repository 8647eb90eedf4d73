"""The guarded proxy over ASGI: moves bytes between caller and provider, and asks the exchange what they mean."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

from falcon.asgi import Request, Response

from tokenguard import refusal
from tokenguard.api.wire import headers_of, read_body, set_headers, write
from tokenguard.errors import InvalidRequest, UpstreamError
from tokenguard.exchange import End, Exchange, Terms, forwarded_headers, returned_headers
from tokenguard.limiter import Limiter
from tokenguard.model import Answer, UpstreamRequest, checked_name
from tokenguard.upstream import Upstream, UpstreamResponse

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

CALL = "tokenguard.call"
"""Where in the ASGI scope a request's ``Call`` is."""

T = TypeVar("T")

_log = logging.getLogger("tokenguard")

_REDIRECTS = "OPENAI_BASE_URL may not be quite the provider's address"
_CREDENTIALS = "it may not accept our credentials"
_TELLING = {**dict.fromkeys((301, 302, 303, 307, 308), _REDIRECTS), **dict.fromkeys((401, 403), _CREDENTIALS)}
"""Answers that speak of our configuration rather than of the call."""


class ConnectionCut(Exception):
    """The provider's answer broke off midway: the caller's connection must break off too, not end."""


class CallerGone(Exception):
    """The caller hung up while we were waiting for the provider."""


class GuardedRequest(Request):
    """A request that lets its resource watch for the caller going away."""

    def __init__(self, scope: dict[str, Any], receive: Receive, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Falcon passes them
        super().__init__(scope, receive, *args, **kwargs)
        self.receive = receive


class ChatCompletions:
    """``POST /v1/chat/completions``.

    Args:
        limiter: Guards the calls.
        upstream: The provider.
        terms: What is the same for all exchanges.
        max_body_bytes: A longer body is refused with 413.
    """

    def __init__(self, limiter: Limiter, upstream: Upstream, terms: Terms, max_body_bytes: int) -> None:
        self._limiter = limiter
        self._upstream = upstream
        self._terms = terms
        self._max_body_bytes = max_body_bytes

    async def on_post(self, req: GuardedRequest, resp: Response) -> None:
        """Guard and forward one call."""
        body = await read_body(req, self._max_body_bytes)
        exchange = Exchange(self._terms)
        asked = exchange.begin(headers_of(req), body)
        if isinstance(asked, Answer):
            return write(resp, asked)
        call = req.scope[CALL] = Call(exchange, self._limiter, self._upstream)  # from here on it will be closed
        forward = exchange.reserved(self._limiter.reserve(*asked))
        if isinstance(forward, Answer):
            return write(resp, forward)
        if exchange.stream:
            call.watch(req.receive)
        if (answer := await call.open(forward)) is not None:
            return write(resp, answer)
        resp.status = call.head.status
        set_headers(resp, call.head.headers)
        resp.stream = call
        return None


class Call:
    """The I/O of one exchange; after ``open`` it is the stream of the response's body.

    A caller who hangs up ends a stream at once, and the provider's with it. A call that is not streamed runs
    on to its end, within the provider's time limits, to learn what it took; nobody but the provider is waiting.

    NOTE: a class with ``close`` and not an async generator, whose ``finally`` would run in another task, later.
    ``GuardedApp`` awaits ``close`` however the request ends.
    """

    def __init__(self, exchange: Exchange, limiter: Limiter, upstream: Upstream) -> None:
        self._exchange = exchange
        self._limiter = limiter
        self._upstream = upstream
        self._response: UpstreamResponse | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._caller_gone = False
        self._ended = False

    def watch(self, receive: Receive) -> None:
        """Stop waiting for the provider as soon as the caller goes away."""

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._caller_gone = True
            if self._waiting is not None:
                self._waiting.cancel()

        self._watcher = asyncio.create_task(wait())

    async def open(self, request: UpstreamRequest) -> Answer | None:
        """Forward the request; return an answer of ours if there is none of the provider's to pass on."""
        try:
            response = self._response = await self._while_caller_waits(self._upstream.open(request))
        except UpstreamError as error:
            _log.warning("%s", error)
            return await self._break_off(error)
        except CallerGone:
            await self._break_off(None)
            return Answer(499, [], b"")
        if response.status in _TELLING:
            _log.warning("the provider answered %d: %s", response.status, _TELLING[response.status])
        self.head = self._exchange.answered(response.status, response.headers)
        self._chunks = response.chunks().__aiter__()
        return None

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> bytes:
        try:
            while not self._ended:
                try:
                    chunk = await self._while_caller_waits(self._chunks.__anext__())
                    passed = self._exchange.feed(chunk)
                except StopAsyncIteration:
                    passed = self._end(self._exchange.finish())
                if passed:
                    return passed
        except UpstreamError as error:
            await self._break_off(error)
            raise ConnectionCut(str(error)) from error
        except CallerGone:
            await self._break_off(None)
        raise StopAsyncIteration

    async def close(self) -> None:
        """Settle, whatever happened, and give the connection back."""
        await self._break_off(None)

    async def _while_caller_waits(self, answer: Awaitable[T]) -> T:
        """Wait for the provider; ``watch`` cancels the wait, and nothing but the wait, when the caller leaves."""
        task = self._waiting = asyncio.current_task()
        try:
            if self._caller_gone:
                answer.close()  # type: ignore[attr-defined]  # a coroutine that is not to run
                raise CallerGone
            return await answer
        except asyncio.CancelledError:
            if self._caller_gone and task is not None and task.uncancel() == 0:
                raise CallerGone from None
            raise
        finally:
            self._waiting = None

    async def _break_off(self, error: UpstreamError | None) -> Answer | None:
        """Settle what is not settled, first; then close, which may wait or fail."""
        end = self._exchange.abort(error)
        self._end(end)
        response, self._response = self._response, None
        if response is not None:
            await response.close()
        return end.answer

    def _end(self, end: End) -> bytes:
        self._ended = True
        if self._watcher is not None:
            self._watcher.cancel()
        if end.settlement is not None:
            end.settlement.apply(self._limiter)
        return end.rest


class Models:
    """``GET /v1/models`` and ``/v1/models/{id}``: passed through, uncharged.

    Args:
        upstream: The provider.
        terms: What is the same for all exchanges.
    """

    def __init__(self, upstream: Upstream, terms: Terms) -> None:
        self._upstream = upstream
        self._terms = terms

    async def on_get(self, req: Request, resp: Response, model: str | None = None) -> None:
        """Pass one request through."""
        path = "/models" if model is None else f"/models/{_path_of(model)}"
        headers = forwarded_headers(headers_of(req), self._terms.credentials)
        response = await self._upstream.open(UpstreamRequest("GET", path, headers, b""))
        try:
            body = b"".join([chunk async for chunk in response.chunks()])
        finally:
            await response.close()
        resp.status = response.status
        set_headers(resp, returned_headers(response.headers, drop_length=True, drop_encoding=False))
        resp.data = body


def _path_of(model: str) -> str:
    """Return a model's id as a path that stays where it is put: our key must not open other doors."""
    if not {"", ".", ".."}.isdisjoint(model.split("/")):
        raise InvalidRequest("model", f"model must be the id of a model, got {model!r}")
    return quote(checked_name("model", model), safe="/:")


async def _send(send: Send, answer: Answer) -> None:
    length = (b"content-length", b"%d" % len(answer.body))
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.body})


class GuardedApp:
    """The outermost layer: however a request ends, its call is settled in the request's own task.

    Args:
        app: The app inside.
    """

    def __init__(self, app: Asgi) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await self._app(scope, receive, send)
        except ConnectionCut as cut:  # the server closes a connection whose answer was not completed
            _log.warning("%s; the caller's connection was closed", cut)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if scope["type"] == "http":
                with suppress(RuntimeError):  # an answer had begun: that one is cut
                    await _send(send, refusal.stopping())
        finally:
            if (call := scope.get(CALL)) is not None:
                await call.close()
