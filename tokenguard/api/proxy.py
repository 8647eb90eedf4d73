"""The guarded proxy over ASGI: moves bytes between caller and provider, and asks the call what they mean."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from falcon.asgi import Request, Response

from tokenguard import refusal
from tokenguard._heads import REQUEST_ID, forwarded_headers, returned_headers
from tokenguard.api.call import CALL, CallSoon, Guard, path_of
from tokenguard.api.environ import CallerGone
from tokenguard.api.wire import GONE, headers_of, read_body, request_id_of, set_headers, write
from tokenguard.errors import BodyTimeout, UpstreamError
from tokenguard.exchange import Terms
from tokenguard.model import Answer, UpstreamRequest
from tokenguard.upstream import Upstream, UpstreamResponse

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

T = TypeVar("T")

_log = logging.getLogger("tokenguard")


class ConnectionCut(Exception):
    """The provider's answer broke off midway: the caller's connection must break off too, not end."""


class GuardedRequest(Request):
    """A request that lets its resource watch for the caller going away."""

    def __init__(self, scope: dict[str, Any], receive: Receive, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Falcon passes them
        super().__init__(scope, receive, *args, **kwargs)
        self.receive = receive


class ChatCompletions:
    """``POST /v1/chat/completions``.

    Args:
        guard: Guards the calls.
        upstream: The provider.
    """

    def __init__(self, guard: Guard, upstream: Upstream) -> None:
        self._guard = guard
        self._upstream = upstream

    async def on_post(self, req: GuardedRequest, resp: Response) -> None:
        """Guard and forward one call."""
        call = req.scope[CALL] = AsgiCall(self._guard, self._upstream, req.context.request_id)
        req.context.account = call.account
        body = await read_body(req, self._guard.max_body_bytes)
        forward = await call.begin_soon(headers_of(req), body)
        if isinstance(forward, Answer):
            return write(resp, forward)
        if call.exchange.stream:
            call.watch(req.receive)
        if (answer := await call.open(forward)) is not None:
            return write(resp, answer)
        resp.status = call.head.status
        set_headers(resp, call.head.headers)
        resp.stream = call
        return None


class AsgiCall(CallSoon):
    """A call that, after ``open``, is the stream of its response's body.

    A caller who hangs up ends a stream at once, and the provider's with it. A call that is not streamed runs
    on to its end, within the provider's time limits, to learn what it took; nobody but the provider is waiting.

    NOTE: a class with ``close`` and not an async generator, whose ``finally`` would run in another task, later.
    ``GuardedApp`` awaits ``close`` however the request ends.
    """

    def __init__(self, guard: Guard, upstream: Upstream, request_id: str) -> None:
        super().__init__(guard, request_id)
        self._upstream = upstream
        self._response: UpstreamResponse | None = None
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._waits = False
        self._caller_gone = False
        self._patience: asyncio.TimerHandle | None = None
        self._done = False
        self.stalled = False

    def watch(self, receive: Receive) -> None:
        """Stop waiting for the provider as soon as the caller goes away."""

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._caller_gone = True
            if self._waits and self._task is not None:
                self._task.cancel()

        self._watcher = asyncio.create_task(wait())

    async def open(self, request: UpstreamRequest) -> Answer | None:
        """Forward the request; return an answer of ours if there is none of the provider's to pass on."""
        try:
            response = self._response = await self._while_caller_waits(self._upstream.open(request))
        except UpstreamError as error:
            answer = self.failed(error)
            await self.settled()
            return answer
        except CallerGone:
            self.leave()
            return GONE
        self.head = self.answered(response.status, response.headers)
        self._chunks = response.chunks().__aiter__()
        return None

    def __aiter__(self) -> AsgiCall:
        return self

    async def __anext__(self) -> bytes:
        if self._patience is not None:
            self._patience.cancel()
        try:
            while not self._done:
                try:
                    chunk = await self._while_caller_waits(self._chunks.__anext__())
                    passed = self.feed(chunk)
                except StopAsyncIteration:
                    self._done = True
                    passed = self.finish()
                if passed:
                    await self.settled()
                    self._await_caller()
                    return passed
        except UpstreamError as error:
            self.failed(error)
            raise ConnectionCut from error
        except CallerGone:
            self.leave()
        self._done = True
        raise StopAsyncIteration

    async def close(self) -> None:
        """Settle what is not settled, first; then give the connection back, which may wait or fail."""
        for waiting in (self._watcher, self._patience):
            if waiting is not None:
                waiting.cancel()
        self._done = True
        self.leave()
        await self.settled()
        self.over()
        response, self._response = self._response, None
        if response is not None:
            await response.close()

    def _await_caller(self) -> None:
        """Give up a caller who does not take what was passed on: it holds a connection to the provider."""
        timeout_s = self._guard.caller_timeout_s

        def give_up() -> None:
            self.stalled = True
            self.account.failure = f"the caller took nothing for {timeout_s:g} s"
            if self._task is not None:
                self._task.cancel()

        self._patience = asyncio.get_running_loop().call_later(timeout_s, give_up)

    async def _while_caller_waits(self, answer: Awaitable[T]) -> T:
        """Wait for the provider; ``watch`` cancels the wait, and nothing but the wait, when the caller leaves."""
        if self._caller_gone:
            answer.close()  # type: ignore[attr-defined]  # a coroutine that is not to run
            raise CallerGone
        self._waits = True
        try:
            return await answer
        except asyncio.CancelledError:
            if self._caller_gone and self._task is not None and not self._task.uncancel():
                raise CallerGone from None
            raise
        finally:
            self._waits = False


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
        headers = forwarded_headers(headers_of(req), self._terms.credentials, req.context.request_id)
        response = await self._upstream.open(UpstreamRequest("GET", path_of(model), headers, b""))
        try:
            body = b"".join([chunk async for chunk in response.chunks()])
        finally:
            await response.close()
        resp.status = response.status
        set_headers(resp, returned_headers(response.headers, drop_length=True, drop_encoding=False))
        resp.data = body


class Incoming:
    """What the caller sends: each piece of a body within a time limit, and nothing that is cut taken for whole.

    Args:
        receive: The server's.
        timeout_s: The limit.
    """

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._complete = False

    async def __call__(self) -> dict[str, Any]:
        """Return the next event.

        Raises:
            BodyTimeout: The caller sent nothing for too long.
            CallerGone: The caller hung up before it had sent the whole request.
        """
        if self._complete:
            return await self._receive()
        event = await self._in_time()
        if event["type"] == "http.disconnect":
            raise CallerGone
        self._complete = not event.get("more_body", False)
        return event

    async def _in_time(self) -> dict[str, Any]:
        # PERF: asyncio.timeout takes ten times as long to set, and nearly every body is there already
        task, late = asyncio.current_task(), False

        def give_up() -> None:
            nonlocal late
            late = True
            if task is not None:
                task.cancel()

        patience = asyncio.get_running_loop().call_later(self._timeout_s, give_up)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if late and task is not None and not task.uncancel():
                raise BodyTimeout("body", f"nothing more of the body came for {self._timeout_s:g} s") from None
            raise
        finally:
            patience.cancel()


class GuardedApp:
    """The outermost layer: however a request ends, its call is settled in the request's own task.

    Args:
        app: The app inside.
        guard: How long a caller may take to send the next piece of a body, and who counts.

    Attributes:
        guard: Likewise.
    """

    def __init__(self, app: Asgi, guard: Guard) -> None:
        self._app = app
        self.guard = guard

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            await self._app(scope, Incoming(receive, self.guard.caller_timeout_s), send)
        except (ConnectionCut, CallerGone):
            pass  # the server closes a connection whose answer was not completed
        except BodyTimeout as error:  # nothing at all came of the body, so that no resource was asked
            await self._send(scope, send, refusal.error_answer(error))
        except asyncio.CancelledError:
            await self._cancelled(scope, send)
        finally:
            if (call := scope.get(CALL)) is not None:
                await call.close()
        return None

    async def _cancelled(self, scope: dict[str, Any], send: Send) -> None:
        """The caller stalled, or the server stops and has waited long enough."""
        call: AsgiCall | None = scope.get(CALL)
        if call is not None and call.stalled:
            account = call.account
            _log.warning("%s; its connection was closed (request %s)", account.failure, account.request_id)
            return
        with suppress(RuntimeError):  # an answer had begun: that one is cut
            await self._send(scope, send, refusal.stopping())

    async def _send(self, scope: dict[str, Any], send: Send, answer: Answer) -> None:
        """Answer what no resource has answered."""
        call: AsgiCall | None = scope.get(CALL)
        request_id = request_id_of(scope["headers"]) if call is None else call.account.request_id
        own = [(REQUEST_ID, request_id.encode()), (b"content-length", b"%d" % len(answer.body))]
        await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, *own]})
        self.guard.metrics.answered(None, answer.status)
        if call is not None:
            call.account.status = answer.status
        await send({"type": "http.response.body", "body": answer.body})
