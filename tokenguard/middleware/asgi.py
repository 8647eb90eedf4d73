"""A guard in front of an ASGI app."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tokenguard.api.environ import CallerGone, check_body
from tokenguard.errors import TokenGuardError
from tokenguard.library import Limiter
from tokenguard.library.call import Call
from tokenguard.middleware.asking import CALL, Asking, Cost, IdentifySoon, Request, by_headers
from tokenguard.middleware.ending import Ending, error_answer, fields_of, refuse
from tokenguard.model import Answer, Decision

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADS = {"http.response.start": 200, "websocket.http.response.start": 200, "websocket.accept": 101}
"""How an answer begins, and its status if it does not tell one."""

_BODIES = (
    "http.response.body",
    "http.response.pathsend",
    "http.response.zerocopysend",
    "websocket.http.response.body",
)
_PLAIN = (tuple, str, type(None))
"""PERF: to ask whether something is awaitable takes as long as to reserve; row "ASGI, ASGIGuard"."""

_GONE = ("http.disconnect", "websocket.disconnect")
_REFUSED = 403
"""What a WebSocket comes to that the app closes and has not accepted."""

_TRY_AGAIN_LATER = 1013
"""How a WebSocket is closed that is refused, where the server cannot answer it by HTTP."""


class ASGIGuard:
    """Lets a request through to an ASGI app if every budget on its path has room for it.

    A refused request is answered by the same 429 as the proxy's. The app finds the request's ``Call`` in its scope
    as ``"tokenguard.call"``, and may settle it at what the request really took, until it returns. If it does not,
    the request has taken what was reserved; one that the app fails, by an exception before anything of the body is
    out or by a status of 500 and more, costs no tokens, unless its caller hung up first. WebSockets are guarded
    when they are opened.

    Args:
        app: The app.
        limiter: Reserves and settles.
        identify: Returns who a request is of: an identity, the id of a user, or None to let it pass unguarded. It
            may be ``async``. By default the headers say so, as the proxy reads them.
        cost: Tokens that a request takes: a number, a function of the request, or ``FromBody()``.

    Raises:
        InvalidValue: ``cost`` is a number out of bounds.

    Source: docs/middleware.md
    """

    def __init__(self, app: App, limiter: Limiter, identify: IdentifySoon = by_headers, cost: Cost = 1) -> None:
        self._app = app
        self._identify = identify
        self._asking = Asking(limiter, cost)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        client = scope.get("client")
        request = Request(scope.get("method", "GET"), scope["path"], str(client[0]) if client else "", scope)
        try:
            who = self._identify(request)
            if not isinstance(who, _PLAIN) and inspect.isawaitable(who):
                who = await who
            if who is not None:
                if self._asking.body is not None and scope["type"] == "http":
                    request.body = await _body(receive, self._asking.body.max_bytes)
                    receive = _Again(receive, request.body)
                call = await self._asking.call(who, request).attempt_soon()
        except TokenGuardError as error:
            return await _answer(scope, send, error_answer(error))
        except CallerGone:
            return None
        if who is None:
            return await self._app(scope, receive, send)
        if isinstance(call, Decision):
            return await _answer(scope, send, refuse(call))
        return await self._guarded(call, scope, receive, send)

    async def _guarded(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        ending = Ending(call, reads_usage=self._asking.body is not None)

        async def watched() -> Message:
            message = await receive()
            if message["type"] in _GONE:
                ending.leave()
            return message

        async def passed(message: Message) -> None:
            kind = message["type"]
            if kind in _HEADS:
                headers = list(message.get("headers", ()))
                headers += ending.answered(message.get("status", _HEADS[kind]), headers)
                message = {**message, "headers": headers}
                ending.began = ending.began or kind == "websocket.accept"
            elif kind in _BODIES:
                ending.feed(message.get("body", b""))
                if not message.get("more_body", False):
                    ending.ended()
                    await call.settled()  # whoever has the answer may look
            elif kind == "websocket.close":
                ending.answered(_REFUSED, [])  # unless it was accepted before
                ending.began = True
            try:
                await send(message)
            except OSError:  # what servers raise once the caller has hung up
                ending.leave()
                raise

        try:
            await self._app({**scope, CALL: call}, watched, passed)
        except asyncio.CancelledError:
            ending.leave()
            raise
        finally:
            ending.over()
            await call.settled()


class _Again:
    """Receives a request whose body has been read, as if it had not been."""

    def __init__(self, receive: Receive, body: bytes) -> None:
        self._receive = receive
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


async def _body(receive: Receive, max_bytes: int) -> bytes:
    """Return the whole body of a request.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
        CallerGone: The caller hung up before it had sent it.
    """
    pieces = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > max_bytes:
            check_body(b"".join(pieces), max_bytes)
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _answer(scope: Scope, send: Send, answer: Answer) -> None:
    """Answer instead of the app."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})
        kind = "websocket.http.response"
    body = b"" if scope.get("method") == "HEAD" else answer.body
    await send({"type": f"{kind}.start", "status": answer.status, "headers": fields_of(answer)})
    return await send({"type": f"{kind}.body", "body": body})
