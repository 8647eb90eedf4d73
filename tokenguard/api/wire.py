"""Between plain values and Falcon's requests and responses, of ASGI and of WSGI."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

import falcon
import falcon.asgi
import msgspec
from falcon import HTTPError, Request, Response, http_status_to_code

from tokenguard import refusal
from tokenguard._heads import REQUEST_ID
from tokenguard.account import Account
from tokenguard.api import environ
from tokenguard.api.call import answer_to
from tokenguard.api.environ import CallerGone, check_body, check_length
from tokenguard.errors import TokenGuardError
from tokenguard.metrics import Metrics
from tokenguard.model import Answer, Headers

SERVES = "/v1/chat/completions, /v1/models, /config/budget, /metrics, /openapi.json and /"

_log = logging.getLogger("tokenguard")


GONE = Answer(499, [], b"")
"""What nobody hears any more."""

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


def headers_of(req: Request) -> Headers:
    """Return the request's header fields as they came."""
    if isinstance(req, falcon.asgi.Request):
        headers: Headers = req.scope["headers"]
        return headers
    return environ.headers_of(req.env)


def peer_of(req: Request) -> str:
    """Return the address of whoever is at the other end of the connection; empty if that is not known."""
    if isinstance(req, falcon.asgi.Request):
        client = req.scope.get("client")
        return str(client[0]) if client else ""
    return str(req.env.get("REMOTE_ADDR", ""))


def http_version_of(req: Request) -> str:
    """Return ``1.0``, ``1.1`` or ``2``."""
    if isinstance(req, falcon.asgi.Request):
        return str(req.scope["http_version"])
    return str(req.env["SERVER_PROTOCOL"]).removeprefix("HTTP/")


async def read_body(req: falcon.asgi.Request, max_bytes: int) -> bytes:
    """Return the whole body of a request over ASGI.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
    """
    check_length(req.content_length, max_bytes)
    return check_body(await req.stream.read(max_bytes + 1), max_bytes)


def read_wsgi_body(req: Request, max_bytes: int) -> bytes:
    """Return the whole body of a request over WSGI; see ``environ.read_body``."""
    return environ.read_body(req.env, req.content_length, max_bytes)


def set_headers(resp: Response, headers: Headers) -> None:
    """Give a response its fields; one given twice becomes a list."""
    # PERF: Falcon's own append_header takes twice as long
    fields: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    resp.set_headers(fields)


def write(resp: Response, answer: Answer) -> None:
    """Answer with a whole answer of ours."""
    resp.status = answer.status
    set_headers(resp, answer.headers)
    resp.data = answer.body


def write_json(resp: Response, status: int, value: Any) -> None:  # noqa: ANN401 - any JSON
    """Answer with a JSON document."""
    write(resp, Answer(status, [refusal.JSON], msgspec.json.encode(value) + b"\n"))


# --- one resource, two drivers --------------------------------------------------------------------------------


class Resource:
    """What answers under one path, by plain functions: the same for both drivers.

    A responder finds the body of the request in ``req.context.body``.

    Attributes:
        max_body_bytes: A longer body is refused with 413.
        waits: Whether it waits for somebody else, so that an event loop must not run it.
    """

    max_body_bytes = 0
    waits = False


class _Driven:
    """A resource as one of Falcon's apps wants it.

    Attributes:
        resource: The resource.
    """

    def __init__(self, resource: Resource, driven: Callable[[Resource, Callable[..., None]], object]) -> None:
        self.resource = resource
        for name in dir(resource):
            if name.startswith("on_"):
                setattr(self, name, driven(resource, getattr(resource, name)))


def over_asgi(resource: Resource) -> object:
    """Return a resource for Falcon's ASGI app."""
    return _Driven(resource, _asynchronous)


def over_wsgi(resource: Resource) -> object:
    """Return a resource for Falcon's WSGI app."""
    return _Driven(resource, _synchronous)


def plain(resource: object) -> object:
    """Return the resource itself, whichever driver it was made ready for."""
    return resource.resource if isinstance(resource, _Driven) else resource


def _asynchronous(resource: Resource, respond: Callable[..., None]) -> Callable[..., Awaitable[None]]:
    async def responder(req: falcon.asgi.Request, resp: Response, **params: str) -> None:
        if resource.max_body_bytes:
            req.context.body = await read_body(req, resource.max_body_bytes)
        if resource.waits:
            await asyncio.to_thread(respond, req, resp, **params)
        else:
            respond(req, resp, **params)

    return responder


def _synchronous(resource: Resource, respond: Callable[..., None]) -> Callable[..., None]:
    def responder(req: Request, resp: Response, **params: str) -> None:
        if resource.max_body_bytes:
            req.context.body = read_wsgi_body(req, resource.max_body_bytes)
        respond(req, resp, **params)

    return responder


# --- what holds for every request -----------------------------------------------------------------------------


def request_id_of(headers: Headers) -> str:
    """Return what the caller calls the request, if that is 1 to 128 printable characters; else make a name."""
    given = [value for name, value in headers if name == REQUEST_ID]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    return os.urandom(16).hex()


def _request_id(req: Request) -> str:
    """Return a request's id, also if Falcon refused it before it asked any middleware."""
    if not hasattr(req.context, "request_id"):
        req.context.request_id = request_id_of(headers_of(req))
    return str(req.context.request_id)


class Tracing:
    """Falcon middleware: gives every request an id, and counts it when it is answered.

    Args:
        metrics: Where.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def process_request(self, req: Request, resp: Response) -> None:
        """Give it an id."""
        _request_id(req)

    def process_response(self, req: Request, resp: Response, resource: object, succeeded: bool) -> None:
        """Tell the id, and count the request."""
        resp.set_header(REQUEST_ID.decode(), _request_id(req))
        self._metrics.answered(req.uri_template, resp.status_code)
        account: Account | None = getattr(req.context, "account", None)
        if account is not None:
            account.status = resp.status_code

    async def process_request_async(self, req: Request, resp: Response) -> None:
        """Give it an id."""
        self.process_request(req, resp)

    async def process_response_async(self, req: Request, resp: Response, resource: object, ok: bool) -> None:
        """Tell the id, and count the request."""
        self.process_response(req, resp, resource, ok)


def add_error_handlers(app: falcon.App[Any, Any]) -> None:
    """Answer all errors in the provider's shape."""
    for kind, handler in _ERROR_HANDLERS.items():
        app.add_error_handler(kind, _awaited(handler) if isinstance(app, falcon.asgi.App) else handler)


def _awaited(handler: Callable[..., None]) -> Callable[..., Any]:
    async def handle(req: Request, resp: Response, error: Exception, params: object) -> None:
        handler(req, resp, error, params)

    return handle


def _on_tokenguard_error(req: Request, resp: Response, error: TokenGuardError, params: object) -> None:
    """Answer an error of ours; log it if it is not the caller's."""
    write(resp, answer_to(error, _request_id(req)))


def _on_http_error(req: Request, resp: Response, error: HTTPError, params: object) -> None:
    """Answer what Falcon itself refuses, such as a path or a method that is not there."""
    status = http_status_to_code(error.status)
    headers = dict(error.headers or {})
    code = None
    if status == 404:
        message = f"Invalid URL ({req.method} {req.path}): TokenGuard serves {SERVES}"
        code = "unknown_url"
    elif status == 405:
        message = f"{req.method} is not allowed on {req.path}, but {headers.get('Allow')}"
        code = "method_not_allowed"
    else:
        message = error.description or error.title or "The request cannot be answered."
    write(resp, refusal.problem(status, message, "invalid_request_error", code))
    for name, value in headers.items():
        resp.set_header(name, value)


def _on_caller_gone(req: Request, resp: Response, error: CallerGone, params: object) -> None:
    """Answer nobody."""
    write(resp, GONE)


def _on_unexpected_error(req: Request, resp: Response, error: Exception, params: object) -> None:
    """Answer what should not have happened, and log it."""
    _log.error("%s %s failed (request %s)", req.method, req.path, _request_id(req), exc_info=error)
    write(resp, refusal.failed())


_ERROR_HANDLERS: dict[type[Exception], Callable[..., None]] = {
    Exception: _on_unexpected_error,
    HTTPError: _on_http_error,
    CallerGone: _on_caller_gone,
    TokenGuardError: _on_tokenguard_error,
}
