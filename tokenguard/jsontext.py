"""JSON objects, read strictly: what two parsers could read differently is refused.

A member given twice, NaN and Infinity, and bytes that are not UTF-8 are errors. The place of each member in
the text is kept, so that one can be replaced and every other byte left as it came.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Any

from tokenguard.errors import InvalidRequest

_SPACE = re.compile(r"[ \t\n\r]*")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _twice(name)
            seen.add(name)
    return members


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest(name[:80], f"member {name[:80]!r} is given more than once in one object")


def _reject(constant: str) -> Any:  # noqa: ANN401 - never returns
    raise InvalidRequest("body", f"body must be JSON, which has no {constant}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_reject)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """An object and where in its text the members stand.

    Attributes:
        text: The whole text.
        members: Name to value.
        spans: Name to the value's first character and the one behind it.
        opening: The place right behind the opening brace.
    """

    text: str
    members: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    opening: int

    def inner(self, name: str) -> JsonObject:
        """Return a member that is an object, with the places of its members in its own text."""
        start, end = self.spans[name]
        return _read(self.text[start:end])

    def replacing(self, name: str, value: str) -> bytes:
        """Return the text with one member set to ``value`` (as JSON), the first one if it is new."""
        if name in self.spans:
            start, end = self.spans[name]
            return (self.text[:start] + value + self.text[end:]).encode()
        comma = "," if self.members else ""
        member = f"{json.dumps(name)}:{value}{comma}"
        return (self.text[: self.opening] + member + self.text[self.opening :]).encode()


def read_object(body: bytes) -> JsonObject:
    """Return the object that ``body`` holds.

    Raises:
        InvalidRequest: It is not one JSON object in UTF-8, or it is ambiguous.
    """
    try:
        return _read(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            "body", f"body must be UTF-8, got byte {body[error.start]:#04x} at {error.start}"
        ) from None
    except InvalidRequest:
        raise
    except RecursionError:
        raise InvalidRequest("body", "body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest("body", f"body must be a JSON object: {error}") from None


def shown(members: dict[str, Any], name: str) -> str:
    """Return a member as a message may show it: short, and plainly nothing if it is absent."""
    if name not in members:
        return "nothing"
    try:
        text = repr(members[name])
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def whole_number(members: dict[str, Any], name: str, least: int, most: int) -> int:
    """Return a member that must be a whole number within bounds; 5.0 is one, true is not.

    Raises:
        InvalidRequest: It is not one, or it is absent.
    """
    value = members.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(
            name, f"{name} must be a whole number from {least} to {most}, got {shown(members, name)}"
        )
    return value


def _read(text: str) -> JsonObject:
    at = opening = _expect(text, _skip(text, 0), "{")
    members: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _skip(text, at)
    while text[at : at + 1] != "}":
        if members:
            at = _skip(text, _expect(text, at, ","))
        name, at = scanstring(text, _expect(text, at, '"'), True)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        value, end = _DECODER.raw_decode(text, at)
        if name in members:
            raise _twice(name)
        members[name], spans[name] = value, (at, end)
        at = _skip(text, end)
    if _skip(text, at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)
    return JsonObject(text, members, spans, opening)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
    return at + 1
