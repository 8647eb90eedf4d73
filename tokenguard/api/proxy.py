"""The guarded proxy over ASGI: what is outermost, and what Falcon is told of the provider's paths."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from falcon.asgi import Request, Response

from tokenguard import refusal
from tokenguard._heads import forwarded_headers, returned_headers
from tokenguard.api.asgi_call import (
    AsgiCall,
    CallerStalled,
    Chat,
    ConnectionCut,
    Incoming,
    Outgoing,
    Receive,
    Send,
    send_answer,
)
from tokenguard.api.call import CALL, path_of
from tokenguard.api.environ import CallerGone
from tokenguard.api.wire import headers_of, read_body, request_id_of, set_headers, write
from tokenguard.errors import BodyTimeout
from tokenguard.exchange import Terms
from tokenguard.model import Answer, UpstreamRequest
from tokenguard.upstream import Upstream

Asgi = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

_log = logging.getLogger("tokenguard")


class GuardedRequest(Request):
    """A request that lets its resource watch for the caller going away."""

    def __init__(self, scope: dict[str, Any], receive: Receive, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Falcon passes them
        super().__init__(scope, receive, *args, **kwargs)
        self.receive = receive


class ChatCompletions:
    """``POST /v1/chat/completions``, where something about it is odd.

    Args:
        chat: Answers what is not.
    """

    def __init__(self, chat: Chat) -> None:
        self._guard = chat.guard
        self._upstream = chat.upstream

    async def on_post(self, req: GuardedRequest, resp: Response) -> None:
        """Guard and forward one call."""
        call = req.scope[CALL] = AsgiCall(self._guard, self._upstream, req.context.request_id)
        req.context.account = call.account
        body = await read_body(req, self._guard.max_body_bytes)
        answer = await call.ask(headers_of(req), body, req.receive)
        if answer is not None:
            return write(resp, answer)
        resp.status = call.head.status
        set_headers(resp, call.head.headers)
        resp.stream = call
        return None


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


class GuardedApp:
    """The outermost layer: however a request ends, its call is settled in the request's own task.

    Args:
        app: Answers what ``chat`` does not take.
        chat: Answers plain chat completions.

    Attributes:
        guard: How long a caller may take for the next piece of a body, or of an answer, and who counts.
    """

    def __init__(self, app: Asgi, chat: Chat) -> None:
        self._app = app
        self._chat = chat
        self.guard = chat.guard

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        app = self._chat.answer if self._chat.takes(scope) else self._app
        timeout_s = self.guard.caller_timeout_s
        try:
            await app(scope, Incoming(receive, timeout_s), Outgoing(send, timeout_s))
        except (ConnectionCut, CallerGone):
            pass  # the server closes a connection whose answer was not completed
        except BodyTimeout as error:  # nothing at all came of the body, so that no resource was asked
            await self._send(scope, send, refusal.error_answer(error))
        except CallerStalled as error:
            self._stalled(scope, str(error))
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            with suppress(RuntimeError):  # an answer had begun: that one is cut
                await self._send(scope, send, refusal.stopping())
        finally:
            if (call := scope.get(CALL)) is not None:
                await call.close()
        return None

    def _stalled(self, scope: dict[str, Any], why: str) -> None:
        """The server closes the connection of a caller who takes nothing; say so."""
        call: AsgiCall | None = scope.get(CALL)
        if call is not None:
            call.account.failure = why
        _log.warning("%s; its connection was closed (request %s)", why, self._request_id(scope))

    async def _send(self, scope: dict[str, Any], send: Send, answer: Answer) -> None:
        """Answer what no resource has answered."""
        await send_answer(send, answer, self._request_id(scope))
        self.guard.metrics.answered(None, answer.status)
        call: AsgiCall | None = scope.get(CALL)
        if call is not None:
            call.account.status = answer.status

    def _request_id(self, scope: dict[str, Any]) -> str:
        call: AsgiCall | None = scope.get(CALL)
        return request_id_of(scope["headers"]) if call is None else call.account.request_id
