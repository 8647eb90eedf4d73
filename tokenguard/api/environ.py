"""What a WSGI environment tells of a request, whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tokenguard._heads import IDENTITY_HEADERS
from tokenguard.errors import BodyTooLarge, InvalidRequest
from tokenguard.model import Headers


class CallerGone(Exception):
    """The caller hung up while we were waiting, for the rest of its request or for the provider."""


_IDENTITY = {f"HTTP_{name.decode().upper().replace('-', '_')}": name for name in IDENTITY_HEADERS}
_CONTENT = {"CONTENT_TYPE": b"content-type", "CONTENT_LENGTH": b"content-length"}
"""The header fields that an environment has under names of their own."""


def headers_of(environ: Mapping[str, Any]) -> Headers:
    """Return the header fields of a request, but the content's type and length."""
    return [(_name(name), value.encode("latin-1")) for name, value in environ.items() if name.startswith("HTTP_")]


def fields_of(environ: Mapping[str, Any]) -> Headers:
    """Return all header fields of a request."""
    content = [(name, environ[key].encode("latin-1")) for key, name in _CONTENT.items() if environ.get(key)]
    return headers_of(environ) + content


def identity_fields_of(environ: Mapping[str, Any]) -> Headers:
    """Return the header fields that say who calls.

    Raises:
        InvalidRequest: They cannot be told.
    """
    fields = [(name, environ[key].encode("latin-1")) for key, name in _IDENTITY.items() if key in environ]
    check_identity(fields)
    return fields


@lru_cache(1024)
def _name(name: str) -> bytes:
    """Return a field's name; PERF: remembered, for a request has the names of the one before."""
    return name[5:].replace("_", "-").lower().encode("latin-1")


def check_identity(headers: Headers) -> None:
    """Refuse a request whose identity cannot be told.

    NOTE: WSGI servers join the values of a field that is given twice by a comma. What an authenticating proxy adds
    to what a caller sent would then name somebody new, who has a fresh budget.

    Raises:
        InvalidRequest: It cannot.
    """
    for name, value in headers:
        if name in IDENTITY_HEADERS and b"," in value:
            shown = name.decode()
            message = f"header {shown} holds a comma: over WSGI that cannot be told from a field given twice"
            raise InvalidRequest(shown, message)


def read_body(environ: Mapping[str, Any], length: int | None, max_bytes: int) -> bytes:
    """Return the whole body of a request.

    Args:
        environ: The environment.
        length: How long the body is, in bytes; None if that is not told.
        max_bytes: How long it may be.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
        CallerGone: It did not come to its end.
    """
    check_length(length, max_bytes)
    if length is None and not environ.get("wsgi.input_terminated"):
        return b""
    wanted = max_bytes + 1 if length is None else length
    try:
        body: bytes = environ["wsgi.input"].read(wanted)
    except Exception as error:  # each server has errors of its own for a connection that breaks off
        raise CallerGone from error
    if length is not None and len(body) < length:
        raise CallerGone
    return check_body(body, max_bytes)


def check_length(length: int | None, max_bytes: int) -> None:
    """Refuse a body before it is read.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
    """
    if length is not None and length > max_bytes:
        raise BodyTooLarge("body", f"body must be at most {max_bytes} bytes, got {length}")


def check_body(body: bytes, max_bytes: int) -> bytes:
    """Return a body if it is not too large.

    Raises:
        BodyTooLarge: It is larger than ``max_bytes``.
    """
    if len(body) > max_bytes:
        raise BodyTooLarge("body", f"body must be at most {max_bytes} bytes, got more")
    return body
