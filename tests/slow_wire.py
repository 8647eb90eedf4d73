"""Answers and streams, read as plainly as can be: what _chat's readers are held against."""

from __future__ import annotations

import re

from tokenguard.model import Usage
from tokenguard.providers.careful import Size, add, decode, read_usage
from tokenguard.providers.openai import MAX_ANSWER_BYTES, MAX_EVENT_BYTES


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
        answer = None if self._kept is None else decode(b"".join(self._kept))
        return None if answer is None else read_usage(answer.get("usage"))

    def final_usage(self, *, ended: bool) -> Usage | None:  # noqa: ARG002 - a part of a document is none
        """Return what the whole call took, if that has been told."""
        return self.usage


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
        if not lines or lines == [b"[DONE]"] or (chunk := decode(b"\n".join(lines))) is None:
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
        size = Size()
        add(size, delta, "surrogatepass")
        if size.text_bytes:
            self._deltas += 1
            self._delta_bytes += size.text_bytes
