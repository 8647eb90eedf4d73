"""A guard in front of a WSGI app."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from io import BytesIO
from typing import Any

from tokenguard.api.environ import CallerGone, read_body
from tokenguard.errors import InvalidRequest, TokenGuardError
from tokenguard.library import Limiter
from tokenguard.library.call import Call
from tokenguard.middleware.asking import CALL, Asking, Cost, Identify, Request, by_headers
from tokenguard.middleware.ending import Ending, error_answer, fields_of, refuse
from tokenguard.model import Answer, Decision

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]


class WSGIGuard:
    """Lets a request through to a WSGI app if every budget on its path has room for it.

    What ``ASGIGuard`` says holds here too; the app finds the request's ``Call`` in its environment, and may settle
    it until it has returned a list, or its body is closed.

    Args:
        app: The app.
        limiter: Reserves and settles.
        identify: Returns who a request is of: an identity, the id of a user, or None to let it pass unguarded. By
            default the headers say so, as the proxy reads them.
        cost: Tokens that a request takes: a number, a function of the request, or ``FromBody()``.

    Raises:
        InvalidValue: ``cost`` is a number out of bounds.

    Source: docs/middleware.md
    """

    def __init__(self, app: App, limiter: Limiter, identify: Identify = by_headers, cost: Cost = 1) -> None:
        self._app = app
        self._identify = identify
        self._asking = Asking(limiter, cost)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        request = _request(environ)
        try:
            who = self._identify(request)
            if who is not None:
                if self._asking.body is not None:
                    request.body = _body(environ, self._asking.body.max_bytes)
                call = self._asking.call(who, request).attempt()
        except TokenGuardError as error:
            return _answer(environ, start_response, error_answer(error))
        except CallerGone:
            return _answer(environ, start_response, Answer(HTTPStatus.BAD_REQUEST, [], b""))  # nobody hears it
        if who is None:
            return self._app(environ, start_response)
        if isinstance(call, Decision):
            return _answer(environ, start_response, refuse(call))
        return self._guarded(call, environ, start_response)

    def _guarded(self, call: Call, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        ending = Ending(call, reads_usage=self._asking.body is not None)

        def started(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:  # noqa: ANN401 - as WSGI has it
            fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            own = ending.answered(int(status[:3]), fields)
            headers = [*headers, *((name.decode(), value.decode()) for name, value in own)]
            write = start_response(status, headers, *([exc_info] if exc_info else []))

            def written(chunk: bytes) -> None:
                ending.feed(chunk)
                write(chunk)

            return written

        environ[CALL] = call
        try:
            body = self._app(environ, started)
            if isinstance(body, list | tuple):
                for chunk in body:
                    ending.feed(chunk)
            elif type(body) is not environ.get("wsgi.file_wrapper"):
                return _Body(body, ending)
            ending.ended()
        except BaseException:
            ending.over()
            raise
        ending.over()
        return body  # as it is: servers tell the length of what is of one piece, and send files by themselves


class _Body:
    """The body of an answer, read on the way. A server closes it, however the answer ends."""

    def __init__(self, body: Iterable[bytes], ending: Ending) -> None:
        self._body = body
        self._chunks: Iterator[bytes] | None = None
        self._ending = ending

    def __iter__(self) -> _Body:
        return self

    def __next__(self) -> bytes:
        try:
            if self._chunks is None:
                self._chunks = iter(self._body)
            chunk = next(self._chunks)
            self._ending.feed(chunk)
        except StopIteration:
            self._ending.ended()
            raise
        except BaseException:
            self._ending.over()
            raise
        return chunk

    def close(self) -> None:
        """Settle what is not settled: the caller has hung up, if the body has not come to its end."""
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._ending.leave()
            self._ending.over()


def _request(environ: Environ) -> Request:
    path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
    return Request(
        environ["REQUEST_METHOD"],
        path.decode("utf-8", "replace"),
        str(environ.get("REMOTE_ADDR", "")),
        environ,
    )


MAX_DIGITS = 18
"""Of a content-length: what is longer is none."""


def _body(environ: Environ, max_bytes: int) -> bytes:
    """Return the body of a request, and leave the app one to read.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
        InvalidRequest: Its length is no number.
        CallerGone: It did not come to its end.
    """
    given = environ.get("CONTENT_LENGTH") or None
    if given is not None and not (given.isdecimal() and len(given) <= MAX_DIGITS):
        raise InvalidRequest("content-length", f"content-length must be a whole number, got {given[:80]!r}")
    body = read_body(environ, None if given is None else int(given), max_bytes)
    environ["wsgi.input"] = BytesIO(body)
    environ["CONTENT_LENGTH"] = str(len(body))
    return body


def _answer(environ: Environ, start_response: StartResponse, answer: Answer) -> list[bytes]:
    """Answer instead of the app."""
    headers = [(name.decode(), value.decode()) for name, value in fields_of(answer)]
    start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", headers)
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer.body]
