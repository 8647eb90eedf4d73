"""The guarded proxy over WSGI: what ``proxy`` does, for a thread a call."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any

from falcon import Request, Response

from tokenguard._heads import forwarded_headers, returned_headers
from tokenguard.api.call import CALL, Call, Guard, path_of
from tokenguard.api.environ import check_identity
from tokenguard.api.wire import headers_of, read_wsgi_body, set_headers, write
from tokenguard.errors import UpstreamError
from tokenguard.exchange import Terms
from tokenguard.model import Answer, UpstreamRequest
from tokenguard.upstream import SyncUpstream, SyncUpstreamResponse

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ConnectionCut(ConnectionResetError):
    """The provider's answer broke off midway: the caller's connection must break off too, not end.

    NOTE: to a server this is what a broken connection raises; others it would log with a traceback.
    """

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the provider's answer broke off")


class WsgiChatCompletions:
    """``POST /v1/chat/completions``.

    Args:
        guard: Guards the calls.
        upstream: The provider.
    """

    def __init__(self, guard: Guard, upstream: SyncUpstream) -> None:
        self._guard = guard
        self._upstream = upstream

    def on_post(self, req: Request, resp: Response) -> None:
        """Guard and forward one call."""
        call = req.env[CALL] = WsgiCall(self._guard, self._upstream, req.context.request_id)
        req.context.account = call.account
        headers = headers_of(req)
        body = read_wsgi_body(req, self._guard.max_body_bytes)
        check_identity(headers)
        forward = call.begin(headers, body)
        answer = forward if isinstance(forward, Answer) else call.open(forward)
        if answer is not None:
            return write(resp, answer)
        resp.status = call.head.status
        set_headers(resp, call.head.headers)
        resp.stream = call
        return None


class WsgiCall(Call):
    """A call that, after ``open``, is the iterable of its response's body.

    A server tells that the caller has hung up by not asking for more. ``close`` reads a call that is not streamed
    to its end, to learn what it took.
    """

    def __init__(self, guard: Guard, upstream: SyncUpstream, request_id: str) -> None:
        super().__init__(guard, request_id)
        self._upstream = upstream
        self._response: SyncUpstreamResponse | None = None
        self._done = False

    def open(self, request: UpstreamRequest) -> Answer | None:
        """Forward the request; return an answer of ours if there is none of the provider's to pass on."""
        try:
            response = self._response = self._upstream.open(request)
        except UpstreamError as error:
            return self.failed(error)
        self.head = self.answered(response.status, response.headers)
        self._chunks = iter(response.chunks())
        return None

    def __iter__(self) -> WsgiCall:
        return self

    def __next__(self) -> bytes:
        try:
            while not self._done:
                try:
                    passed = self.feed(next(self._chunks))
                except StopIteration:
                    self._done = True
                    passed = self.finish()
                if passed:
                    return passed
        except UpstreamError as error:
            self._done = True
            self.failed(error)
            raise ConnectionCut from error
        raise StopIteration

    def close(self) -> None:
        """Settle, whatever happened, and give the connection back."""
        try:
            if self._response is not None and not self._done and not self.exchange.stream:
                self._read_on()
        finally:
            self._done = True
            self.over()
            response, self._response = self._response, None
            if response is not None:
                response.close()

    def _read_on(self) -> None:
        try:
            for _ in self:
                pass
        except ConnectionCut:
            pass  # it is settled, and nobody is left to be told


class WsgiModels:
    """``GET /v1/models`` and ``/v1/models/{id}``: passed through, uncharged.

    Args:
        upstream: The provider.
        terms: What is the same for all exchanges.
    """

    def __init__(self, upstream: SyncUpstream, terms: Terms) -> None:
        self._upstream = upstream
        self._terms = terms

    def on_get(self, req: Request, resp: Response, model: str | None = None) -> None:
        """Pass one request through."""
        headers = forwarded_headers(headers_of(req), self._terms.credentials, req.context.request_id)
        response = self._upstream.open(UpstreamRequest("GET", path_of(model), headers, b""))
        try:
            body = b"".join(response.chunks())
        finally:
            response.close()
        resp.status = response.status
        set_headers(resp, returned_headers(response.headers, drop_length=True, drop_encoding=False))
        resp.data = body


class GuardedWsgi:
    """The outermost layer: a call whose body the server will not close is closed here.

    Args:
        app: The app inside.
        begin: Is called before the first request, for nothing else tells when a process of a WSGI server begins
            to serve: the app may have been made in the one that it was forked off.
    """

    def __init__(self, app: Wsgi, begin: Callable[[], None]) -> None:
        self._app = app
        self._begin: Callable[[], None] | None = begin

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        if self._begin is not None:
            self._begin()
            self._begin = None
        body: Iterable[bytes] | None = None
        try:
            body = self._app(environ, start_response)
        finally:
            call: WsgiCall | None = environ.get(CALL)
            if call is not None and call is not body:
                call.close()
        return body
