"""The wire, read in Python one document at a time: whatever _chat does not find plain.

What is read here is what counts; _chat only reads the same more quickly, or leaves it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from tokenguard.errors import InvalidRequest
from tokenguard.jsontext import JsonObject, read_object, shown, whole_number
from tokenguard.model import Usage, checked_name
from tokenguard.sizing import weigh

MAX_CHOICES = 128
MAX_OUTPUT_TOKENS = 10**9
TOKENS_PER_MESSAGE = 3
TOKENS_PER_PROMPT = 3
IMAGE_TOKENS = {"low": 85}
"""Tokens of an image by its ``detail``."""
FULL_IMAGE_TOKENS = 765
"""85 + 170 for each of the four tiles of a 1024 x 1024 image."""
AUDIO_BYTES_PER_TOKEN = 2000
FILE_BYTES_PER_TOKEN = 40
MAX_USAGE = 10**12

_CAPS = ("max_completion_tokens", "max_tokens")
_SHAPES = ("tools", "functions", "response_format")
_READ = frozenset(("model", "messages", "stream", "stream_options", "n", *_CAPS, *_SHAPES))


# --- the request --------------------------------------------------------------------------------------------


class Chat(NamedTuple):
    """What matters of a request for a chat completion: what a ``ChatRequest`` is made of."""

    model: str
    stream: bool
    choices: int
    output_cap: int | None
    text_bytes: int
    text_256ths: int
    extra_tokens: int
    attachments: bool
    asks_for_usage: bool
    body: JsonObject


def read_chat(raw: bytes) -> Chat:
    """Read a request for a chat completion.

    Raises:
        InvalidRequest: The body is not one, or a member that matters cannot be.
    """
    body = read_object(raw)
    members = body.members
    for name in members:
        if name not in _READ and name.lower() in _READ:
            raise InvalidRequest(name, f"{name} is not a member, but {name.lower()} is: some parsers mix them up")
    if not isinstance(model := members.get("model"), str):
        raise InvalidRequest("model", f"model must be a string, got {shown(members, 'model')}")
    if not isinstance(messages := members.get("messages"), list):
        raise InvalidRequest("messages", f"messages must be a list, got {shown(members, 'messages')}")
    if not isinstance(members.get("stream_options"), dict | None):
        raise InvalidRequest(
            "stream_options", f"stream_options must be an object, got {shown(members, 'stream_options')}"
        )
    asks_for_usage = _boolean(members.get("stream_options") or {}, "include_usage")
    caps = [cap for name in _CAPS if (cap := _optional(members, name, MAX_OUTPUT_TOKENS)) is not None]
    size = _size_prompt(members)
    return Chat(
        model=checked_name("model", model),
        stream=_boolean(members, "stream"),
        choices=_optional(members, "n", MAX_CHOICES) or 1,
        output_cap=max(caps, default=None),
        text_bytes=size.text_bytes,
        text_256ths=size.text_256ths,
        extra_tokens=size.tokens + TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_PROMPT,
        attachments=size.tokens > 0,
        asks_for_usage=asks_for_usage,
        body=body,
    )


def ask_for_usage(body: JsonObject) -> bytes:
    """Return a body with ``stream_options.include_usage`` set, and nothing else changed."""
    options = '{"include_usage":true}'
    if body.members.get("stream_options") is not None:
        options = body.inner("stream_options").replacing("include_usage", "true").decode()
    return body.replacing("stream_options", options)


def _optional(members: dict[str, Any], name: str, most: int) -> int | None:
    return None if members.get(name) is None else whole_number(members, name, 1, most)


def _boolean(members: dict[str, Any], name: str) -> bool:
    value = members.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(name, f"{name} must be true or false, got {shown(members, name)}")
    return bool(value)


@dataclass(slots=True)
class Size:
    """How large a text is, in bytes of UTF-8 and in 256ths of a token, and how many tokens come beside it."""

    text_bytes: int = 0
    text_256ths: int = 0
    tokens: int = 0

    def add(self, text: bytes) -> None:
        """Count a piece of it."""
        self.text_bytes += len(text)
        self.text_256ths += weigh(text)


def _size_prompt(members: dict[str, Any]) -> Size:
    size = Size()
    try:
        add(size, members["messages"])
        for name in _SHAPES:
            if members.get(name):
                size.add(json.dumps(members[name], ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise InvalidRequest("messages", "messages must be valid Unicode, got a lone surrogate") from None
    except RecursionError:
        raise InvalidRequest("messages", "messages are nested too deeply") from None
    return size


def add(size: Size, value: Any, errors: str = "strict") -> None:  # noqa: ANN401 - any JSON
    """Add all text in ``value``, however deep it is nested; ``errors`` is for text that is no Unicode."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            size.add(value.encode(errors=errors))
        elif isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            attachment = _attachment_tokens(value)
            size.tokens += attachment
            left += [
                item
                for name, item in value.items()
                if name not in ("role", "type") and not (attachment and name == value["type"])
            ]


def _attachment_tokens(part: dict[str, Any]) -> int:
    """Return about how many tokens an image, a sound or a file takes; 0 for any other part.

    The attachment is in the member that is named like the type. A base64 blob must never be counted as text: it
    would come to a hundred times what is billed. What else stands beside it must be.
    """
    match part:
        case {"type": "image_url", "image_url": {"detail": str(detail)}}:
            return IMAGE_TOKENS.get(detail, FULL_IMAGE_TOKENS)
        case {"type": "image_url", "image_url": _}:
            return FULL_IMAGE_TOKENS
        case {"type": "input_audio", "input_audio": {"data": str(data)}}:
            return 1 + len(data) // AUDIO_BYTES_PER_TOKEN
        case {"type": "file", "file": {"file_data": str(data)}}:
            return 1 + len(data) // FILE_BYTES_PER_TOKEN
    return 0


# --- the answer ---------------------------------------------------------------------------------------------


def read_usage(value: object) -> Usage | None:
    """Return the usage that an answer's ``usage`` tells, or None if it tells none that can be."""
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt_tokens", 0), value.get("completion_tokens", 0)
    if not (_is_count(prompt) and _is_count(completion)):
        return None
    total = value.get("total_tokens")
    if total is None:
        total = prompt + completion
    return Usage(prompt, completion, total) if _is_count(total) and total > 0 else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_USAGE


def decode(document: bytes) -> dict[str, Any] | None:
    """Return the object that a provider sent, or None if it is none.

    What strict JSON refuses, such as NaN or half a surrogate pair, must not hide the usage beside it.
    """
    try:
        value = msgspec.json.decode(document)
    except (msgspec.DecodeError, ValueError, RecursionError):
        try:
            value = json.loads(document)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


class Event(NamedTuple):
    """What one event of a stream tells.

    Attributes:
        deltas: How many deltas carry text.
        delta_bytes: How much they carry.
        finished: Whether it says why the stream finished.
        usage: The usage, if it tells one that can be.
        only_usage: Whether it tells the usage and nothing else.
    """

    deltas: int
    delta_bytes: int
    finished: bool
    usage: Usage | None
    only_usage: bool


def read_event(event: bytes) -> Event | None:
    """Return what an event tells, or None if it is no chunk of a completion."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    if not lines or lines == [b"[DONE]"] or (chunk := decode(b"\n".join(lines))) is None:
        return None
    told = chunk.get("choices")
    choices = [choice for choice in told if isinstance(choice, dict)] if isinstance(told, list) else []
    sizes = [size for choice in choices if (size := _size_delta(choice.get("delta")))]
    return Event(
        deltas=len(sizes),
        delta_bytes=sum(sizes),
        finished=any(choice.get("finish_reason") is not None for choice in choices),
        usage=read_usage(chunk.get("usage")),
        only_usage=told == [] and chunk.get("usage") is not None,
    )


def _size_delta(delta: object) -> int:
    size = Size()
    if isinstance(delta, dict):
        add(size, delta, "surrogatepass")
    return size.text_bytes
