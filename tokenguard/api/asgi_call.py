"""A guarded call over ASGI: what comes of the caller, what is sent to it, and all that is in between.

It is compiled, as what it builds on: a chat completion goes through nothing else, and past Falcon (proxy.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from tokenguard import refusal
from tokenguard._heads import REQUEST_ID
from tokenguard.api.call import CALL, CallSoon, Guard, answer_to
from tokenguard.api.environ import CallerGone, check_body, check_length
from tokenguard.api.wire import GONE, request_id_of
from tokenguard.errors import BodyTimeout, TokenGuardError, UpstreamError
from tokenguard.model import Answer, Head, Headers
from tokenguard.upstream import Upstream, UpstreamResponse

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

CHAT_ROUTE = "/v1/chat/completions"
NONE, ODD = -1, -2
MAX_DIGITS = 18
"""Of a length that is read here; what is longer, or is no number, is odd."""

_LENGTH = b"content-length"
_TYPE = b"content-type"
_BODILESS = (204, 304)

_log = logging.getLogger("tokenguard")


class ConnectionCut(Exception):
    """The provider's answer broke off midway: the caller's connection must break off too, not end."""


class CallerStalled(Exception):
    """The caller does not take what is sent to it: it holds a connection to the provider."""


# --- what comes of a caller, and what goes to it --------------------------------------------------------------


class Patience:
    """How long a caller may take for one thing.

    Args:
        timeout_s: So long.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def too_late(self) -> Exception:
        """Return what is raised when it has taken longer."""
        raise NotImplementedError


class InTime:
    """Waits for a caller, but not for ever.

    PERF: what is waited for is stepped by hand: nearly always it is there at once, and no timer is to be set.

    Args:
        awaited: What is waited for.
        patience: How long, and what is raised then.
    """

    def __init__(self, awaited: Awaitable[Any], patience: Patience) -> None:
        self._awaited = awaited
        self._patience = patience
        self._task: asyncio.Task[Any] | None = None
        self._late = False

    def __await__(self) -> Generator[Any, None, Any]:
        steps: Any = self._awaited.__await__()
        timer = None
        try:
            future = next(steps)
            self._task = asyncio.current_task()
            timer = asyncio.get_running_loop().call_later(self._patience.timeout_s, self._give_up)
            while True:
                try:
                    yield future
                except BaseException as error:
                    future = steps.throw(error)
                else:
                    future = next(steps)
        except StopIteration as done:
            return done.value
        except asyncio.CancelledError:
            if self._late and self._task is not None and not self._task.uncancel():
                raise self._patience.too_late() from None
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _give_up(self) -> None:
        self._late = True
        if self._task is not None:
            self._task.cancel()


class Incoming(Patience):
    """What the caller sends: each piece of a body within a time limit, and nothing that is cut taken for whole.

    Args:
        receive: The server's.
        timeout_s: The limit.
    """

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._receive = receive
        self._complete = False

    def __call__(self) -> Awaitable[dict[str, Any]]:
        """Return the next event, for whoever awaits it.

        Raises:
            BodyTimeout: The caller sent nothing for too long.
            CallerGone: The caller hung up before it had sent the whole request.
        """
        return self._receive() if self._complete else self._piece()

    async def _piece(self) -> dict[str, Any]:
        event: dict[str, Any] = await InTime(self._receive(), self)
        if event["type"] == "http.disconnect":
            raise CallerGone
        self._complete = not event.get("more_body", False)
        return event

    def too_late(self) -> Exception:
        """Return what is raised when nothing came."""
        return BodyTimeout("body", f"nothing more of the body came for {self.timeout_s:g} s")


class Outgoing(Patience):
    """What is sent to the caller, each piece within a time limit.

    Args:
        send: The server's.
        timeout_s: The limit.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._send = send

    def __call__(self, event: dict[str, Any]) -> Awaitable[None]:
        """Send an event, once that is awaited.

        Raises:
            CallerStalled: The caller took nothing for too long.
        """
        return InTime(self._send(event), self)

    def too_late(self) -> Exception:
        """Return what is raised when nothing was taken."""
        return CallerStalled(f"the caller took nothing for {self.timeout_s:g} s")


# --- the call -------------------------------------------------------------------------------------------------


class AsgiCall(CallSoon):
    """A call that, once it was asked, is the stream of its response's body.

    A caller who hangs up ends a stream at once, and the provider's with it. A call that is not streamed runs
    on to its end, within the provider's time limits, to learn what it took; nobody but the provider is waiting.

    NOTE: a class with ``close`` and not an async generator, whose ``finally`` would run in another task, later.
    ``GuardedApp`` awaits ``close`` however the request ends.

    Attributes:
        head: The head to pass on.
        ended: Whether the piece that came last is known to be the last one.
    """

    def __init__(self, guard: Guard, upstream: Upstream, request_id: str) -> None:
        CallSoon.__init__(self, guard, request_id)
        self._upstream = upstream
        self._response: UpstreamResponse | None = None
        self._chunks: Any = None
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._waits = False
        self._caller_gone = False
        self._done = False
        self.head: Head
        self.ended = False

    async def ask(self, headers: Headers, body: bytes, receive: Receive) -> Answer | None:
        """Reserve, forward the request, and wait for the head of what the provider answers.

        Returns:
            An answer of ours, if there is none of the provider's to pass on.
        """
        guard = self._guard
        forward = await self.begin_soon(headers, body) if guard.limiter.waits else self.begin(headers, body)
        if isinstance(forward, Answer):
            return forward
        opening = self._upstream.open(forward)
        try:
            if self.exchange.stream:
                self._watch(receive)
                response = await self._while_caller_waits(opening)
            else:
                response = await opening
        except UpstreamError as error:
            answer = self.failed(error)
            await self.settled()
            return answer
        except CallerGone:
            self.leave()
            return GONE
        self._response = response
        self.head = self.answered(response.status, response.headers)
        self._chunks = response.chunks().__aiter__()
        return None

    def __aiter__(self) -> AsgiCall:
        return self

    async def __anext__(self) -> bytes:
        try:
            while not self._done:
                try:
                    more = self._chunks.__anext__()
                    chunk = await (more if self._watcher is None else self._while_caller_waits(more))
                    passed = self.feed(chunk)
                    self.ended = self.exchange.complete
                except StopAsyncIteration:
                    self._done = True
                    passed = self.finish()
                if passed:
                    if self.settling is not None:
                        await self.settling
                    return passed
        except UpstreamError as error:
            self.failed(error)
            raise ConnectionCut from error
        except CallerGone:
            self.leave()
        self._done = True
        raise StopAsyncIteration

    def count(self, status: int) -> None:
        """Count the request as answered."""
        self._guard.metrics.answered(CHAT_ROUTE, status)
        self.account.status = status

    async def close(self) -> None:
        """Settle what is not settled, first; then give the connection back, which may wait or fail."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._done = True
        self.leave()
        if self.settling is not None:
            await self.settling
        self.over()
        response, self._response = self._response, None
        if response is not None:
            await response.close()

    def _watch(self, receive: Receive) -> None:
        """Stop waiting for the provider as soon as the caller goes away."""
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._until_caller_leaves(receive))

    async def _until_caller_leaves(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._caller_gone = True
        if self._waits and self._task is not None:
            self._task.cancel()

    async def _while_caller_waits(self, answer: Any) -> Any:  # noqa: ANN401 - whatever is waited for
        """Wait for the provider; the watcher cancels the wait when the caller leaves, and nothing but it."""
        if self._caller_gone:
            answer.close()  # a coroutine that is not to run
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


# --- the request ----------------------------------------------------------------------------------------------


class Chat:
    """Answers chat completions without Falcon, whatever is not odd about them.

    Args:
        guard: Guards the calls.
        upstream: The provider.
    """

    def __init__(self, guard: Guard, upstream: Upstream) -> None:
        self.guard = guard
        self.upstream = upstream

    def takes(self, scope: dict[str, Any]) -> bool:
        """Return whether a request is one; what else comes under that path is Falcon's to sort out."""
        return (
            scope["path"] == CHAT_ROUTE
            and scope["method"] == "POST"
            and bool(scope.get("query_string", b"").isascii())
            and _length_of(scope["headers"]) != ODD
        )

    async def answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Guard and forward one call, and answer it; ``GuardedApp`` closes it."""
        event = await receive()
        headers = scope["headers"]
        call = scope[CALL] = AsgiCall(self.guard, self.upstream, request_id_of(headers))
        try:
            body = await _body(event, receive, _length_of(headers), self.guard.max_body_bytes)
            answer = await call.ask(headers, body, receive)
        except CallerGone:
            answer = GONE
        except TokenGuardError as error:
            answer = answer_to(error, call.account.request_id)
        except Exception as error:
            _log.exception("POST %s failed (request %s)", CHAT_ROUTE, call.account.request_id, exc_info=error)
            answer = refusal.failed()
        if answer is not None:
            call.count(answer.status)
            await send_answer(send, answer, call.account.request_id)
            return
        head = call.head
        call.count(head.status)
        await send(_start(head.status, head.headers, call.account.request_id))
        async for piece in call:
            await send({"type": "http.response.body", "body": piece, "more_body": not call.ended})
        if not call.ended:
            await send({"type": "http.response.body"})


async def send_answer(send: Send, answer: Answer, request_id: str) -> None:
    """Send a whole answer of ours."""
    start = _start(answer.status, answer.headers, request_id)
    start["headers"].append((_LENGTH, b"%d" % len(answer.body)))
    await send(start)
    await send({"type": "http.response.body", "body": answer.body})


def _start(status: int, headers: Headers, request_id: str) -> dict[str, Any]:
    """Return the event that an answer begins with; a field given twice is there once, as a list."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        fields[name] = b"%b, %b" % (fields[name], value) if name in fields else value
    fields[REQUEST_ID] = request_id.encode()
    if _TYPE not in fields and status not in _BODILESS:
        fields[_TYPE] = b"application/json"
    return {"type": "http.response.start", "status": status, "headers": list(fields.items())}


def _length_of(headers: Headers) -> int:
    """Return what content-length tells: ``NONE`` if nothing does, ``ODD`` if that is no plain number."""
    length = NONE
    for name, value in headers:
        if name == _LENGTH:
            if length != NONE or not value.isdigit() or len(value) > MAX_DIGITS:
                return ODD
            length = int(value)
    return length


async def _body(event: dict[str, Any], receive: Receive, length: int, max_bytes: int) -> bytes:
    """Return the whole body of a request, of which the first event has come.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
    """
    if length == NONE:
        length = max_bytes + 1
    else:
        check_length(length, max_bytes)
    piece = event.get("body", b"")
    if not event.get("more_body", False):
        return check_body(piece[:length], max_bytes)
    body = bytearray(piece)
    while len(body) < length and event.get("more_body", False):
        event = await receive()
        body += event.get("body", b"")
    return check_body(bytes(body[:length]), max_bytes)
