"""The wire of OpenAI's chat completions, as OpenAI and everybody compatible with it speaks it.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenguard.errors import InvalidRequest
from tokenguard.jsontext import JsonObject, read_object, shown, whole_number
from tokenguard.model import Usage, checked_name

CHAT_PATH = "/chat/completions"

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
MAX_ANSWER_BYTES = 16 * 2**20
"""An answer longer than this is passed on, but not read for its usage."""
MAX_EVENT_BYTES = 2**20
MAX_USAGE = 10**12

_CAPS = ("max_completion_tokens", "max_tokens")
_SHAPES = ("tools", "functions", "response_format")
_READ = frozenset(("model", "messages", "stream", "stream_options", "n", *_CAPS, *_SHAPES))


def error_body(message: str, kind: str, code: str | None, param: str | None = None, **more: object) -> bytes:
    """Return an error of a kind (its ``type``) as OpenAI words it; ``more`` are members beside ``error``."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    try:
        return msgspec.json.encode({"error": error, **more}) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate that somebody sent, and that the message shows
        return json.dumps({"error": error, **more}).encode() + b"\n"


# --- the request --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What matters of a request for a chat completion.

    Attributes:
        model: The model's name.
        stream: Whether the answer is to come as events.
        choices: How many answers are asked for, 1 to 128.
        output_cap: The largest cap that the caller set on each answer, in tokens; None without one.
        text_bytes: The size of all text of the prompt, as UTF-8.
        extra_tokens: Tokens of the prompt that do not come from its text: framing, images, sound, files.
        attachments: Whether some of them come from attachments, whose size is only guessed.
        body: The whole body.
    """

    model: str
    stream: bool
    choices: int
    output_cap: int | None
    text_bytes: int
    extra_tokens: int
    attachments: bool
    body: JsonObject = field(repr=False)

    @property
    def asks_for_usage(self) -> bool:
        """Whether the caller wants the usage at the end of the stream."""
        return (self.body.members.get("stream_options") or {}).get("include_usage") is True

    def body_with_usage(self) -> bytes:
        """Return the body with ``stream_options.include_usage`` set, and nothing else changed."""
        options = '{"include_usage":true}'
        if self.body.members.get("stream_options") is not None:
            options = self.body.inner("stream_options").replacing("include_usage", "true").decode()
        return self.body.replacing("stream_options", options)


def read_chat(raw: bytes) -> ChatRequest:
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
    _boolean(members.get("stream_options") or {}, "include_usage")
    caps = [cap for name in _CAPS if (cap := _optional(members, name, MAX_OUTPUT_TOKENS)) is not None]
    size = _size_prompt(members)
    return ChatRequest(
        model=checked_name("model", model),
        stream=_boolean(members, "stream"),
        choices=_optional(members, "n", MAX_CHOICES) or 1,
        output_cap=max(caps, default=None),
        text_bytes=size.text_bytes,
        extra_tokens=size.tokens + TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_PROMPT,
        attachments=size.tokens > 0,
        body=body,
    )


def _optional(members: dict[str, Any], name: str, most: int) -> int | None:
    return None if members.get(name) is None else whole_number(members, name, 1, most)


def _boolean(members: dict[str, Any], name: str) -> bool:
    value = members.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(name, f"{name} must be true or false, got {shown(members, name)}")
    return bool(value)


@dataclass(slots=True)
class _Size:
    text_bytes: int = 0
    tokens: int = 0


def _size_prompt(members: dict[str, Any]) -> _Size:
    size = _Size()
    try:
        _add(size, members["messages"])
        for name in _SHAPES:
            if members.get(name):
                size.text_bytes += len(json.dumps(members[name], ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise InvalidRequest("messages", "messages must be valid Unicode, got a lone surrogate") from None
    except RecursionError:
        raise InvalidRequest("messages", "messages are nested too deeply") from None
    return size


def _add(size: _Size, value: Any, errors: str = "strict") -> None:  # noqa: ANN401 - any JSON
    """Add all text in ``value``, however deep it is nested; ``errors`` is for text that is no Unicode."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            size.text_bytes += len(value) if value.isascii() else len(value.encode(errors=errors))
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


class JsonAnswer:
    """Reads the usage of an answer that comes as one JSON document, and passes every byte on.

    Attributes:
        streamed_tokens: Always 0: nothing is visible before the whole document has come.
    """

    streamed_tokens = 0

    def __init__(self) -> None:
        self._kept: list[bytes] | None = []
        self._size = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece; return what to pass on."""
        self._size += len(chunk)
        if self._size > MAX_ANSWER_BYTES:
            self._kept = None
        elif self._kept is not None:
            self._kept.append(chunk)
        return chunk

    def rest(self) -> bytes:
        """Return what is still to be passed on at the end: nothing."""
        return b""

    @property
    def usage(self) -> Usage | None:
        """The usage, once the whole document has come."""
        answer = None if self._kept is None else _decode(b"".join(self._kept))
        return None if answer is None else read_usage(answer.get("usage"))

    def final_usage(self, *, ended: bool) -> Usage | None:  # noqa: ARG002 - a part of a document is none
        """Return what the whole call took, if that has been told."""
        return self.usage


def _decode(document: bytes) -> dict[str, Any] | None:
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


_EVENT_END = re.compile(rb"(?>\r\n|\n|\r){2}")


class EventStream:
    """Reads the usage of an answer that comes as server-sent events.

    Args:
        swallow_usage: Keep back the one event that came only because we asked for the usage: the one without
            choices that tells it.

    Attributes:
        usage: The last usage told, if any.
    """

    def __init__(self, *, swallow_usage: bool) -> None:
        self.usage: Usage | None = None
        self._swallow_usage = swallow_usage
        self._pending = b""
        self._finished = False
        self._deltas = 0
        self._deltas_at_usage = 0
        self._delta_bytes = 0

    @property
    def streamed_tokens(self) -> int:
        """About how many tokens of visible output have come: at least one a delta, at four bytes each."""
        return max(self._deltas, self._delta_bytes // 4)

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece; return what to pass on: every event that is complete, as it came."""
        data = self._pending + chunk
        passed = []
        start = 0
        for match in _EVENT_END.finditer(data, max(0, len(self._pending) - 3)):
            if match.end() == len(data) and data.endswith(b"\r"):
                break  # half of a line's end, perhaps
            event = data[start : match.end()]
            start = match.end()
            if not (self._read(event) and self._swallow_usage):
                passed.append(event)
        self._pending = data[start:]
        if len(self._pending) > MAX_EVENT_BYTES:
            passed.append(self.rest())
        return b"".join(passed)

    def rest(self) -> bytes:
        """Return what is still to be passed on at the end: an event without the blank line that ends it."""
        rest, self._pending = self._pending, b""
        return b"" if self._read(rest) and self._swallow_usage else rest

    def _read(self, event: bytes) -> bool:
        """Take note of one event; return whether it tells the usage and nothing else."""
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        if not lines or lines == [b"[DONE]"] or (chunk := _decode(b"\n".join(lines))) is None:
            return False
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            self._read_choice(choice)
        if usage := read_usage(chunk.get("usage")):
            self.usage = usage
            self._deltas_at_usage = self._deltas
        return choices == [] and chunk.get("usage") is not None

    def final_usage(self, *, ended: bool) -> Usage | None:
        """Return what the whole call took, if that has been told; a usage that output followed was of a part.

        Args:
            ended: Whether the stream has come to its end.
        """
        return self.usage if (ended or self._finished) and self._deltas == self._deltas_at_usage else None

    def _read_choice(self, choice: object) -> None:
        if not isinstance(choice, dict):
            return
        self._finished = self._finished or choice.get("finish_reason") is not None
        if not isinstance(delta := choice.get("delta"), dict):
            return
        size = _Size()
        _add(size, delta, "surrogatepass")
        if size.text_bytes:
            self._deltas += 1
            self._delta_bytes += size.text_bytes
