"""Between plain values and Falcon's requests and responses."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from falcon import HTTPError, http_status_to_code
from falcon.asgi import Request, Response

from tokenguard import refusal
from tokenguard.errors import BodyTooLarge, TokenGuardError
from tokenguard.model import Answer, Headers

SERVES = "/v1/chat/completions, /v1/models, /config/budget and /"

_log = logging.getLogger("tokenguard")


def headers_of(req: Request) -> Headers:
    """Return the request's header fields as they came."""
    headers: Headers = req.scope["headers"]
    return headers


async def read_body(req: Request, max_bytes: int) -> bytes:
    """Return the whole body.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
    """
    length = req.content_length
    if length is not None and length > max_bytes:
        raise BodyTooLarge("body", f"body must be at most {max_bytes} bytes, got {length}")
    body = await req.stream.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise BodyTooLarge("body", f"body must be at most {max_bytes} bytes, got more")
    return body


def set_headers(resp: Response, headers: Headers) -> None:
    """Add fields to a response; one given twice becomes a list."""
    for name, value in headers:
        resp.append_header(name.decode("latin-1"), value.decode("latin-1"))


def write(resp: Response, answer: Answer) -> None:
    """Answer with a whole answer of ours."""
    resp.status = answer.status
    set_headers(resp, answer.headers)
    resp.data = answer.body


def write_json(resp: Response, status: int, value: Any) -> None:  # noqa: ANN401 - any JSON
    """Answer with a JSON document."""
    write(resp, Answer(status, [refusal.JSON], msgspec.json.encode(value) + b"\n"))


async def on_tokenguard_error(req: Request, resp: Response, error: TokenGuardError, params: object) -> None:
    """Answer an error of ours; log it if it is not the caller's."""
    answer = refusal.error_answer(error)
    if answer.status >= 500:
        _log.warning("%s", error)
    write(resp, answer)


async def on_http_error(req: Request, resp: Response, error: HTTPError, params: object) -> None:
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


async def on_unexpected_error(req: Request, resp: Response, error: Exception, params: object) -> None:
    """Answer what should not have happened, and log it."""
    _log.error("%s %s failed", req.method, req.path, exc_info=error)
    write(resp, refusal.failed())
