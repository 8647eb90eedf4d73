"""What the protocol behind the lane is spared: it takes in fields, and begins answers, in C."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tokenguard._fields import MAX_FIELDS, lines_of
from tokenguard.model import Headers

UNKNOWN = -1
"""The length of a body that nobody tells."""


class FieldsIn:
    """The fields of a request's head, as httptools tells them one by one.

    Args:
        max_bytes: How much the head may have, in bytes.
        refuse: Raises why a head is not read on.

    Attributes:
        open: Whether the head is not whole yet; what comes behind the body does not say who calls.
        expects: Whether the caller waits to be told to go on.
    """

    def __init__(self, max_bytes: int, refuse: Callable[[], None]) -> None:
        self._max_bytes = max_bytes
        self._refuse = refuse
        self._headers: Headers = []
        self._bytes = 0
        self.open = False
        self.expects = False

    def begin(self, headers: Headers) -> None:
        """Put the fields that follow into a list."""
        self._headers = headers
        self._bytes = 0
        self.open = True
        self.expects = False

    def count(self, size: int) -> None:
        """Count bytes of the head."""
        self._bytes += size
        if self._bytes > self._max_bytes:
            self._refuse()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in a field."""
        self.count(len(name) + len(value) + 4)  # ": " and CRLF
        if not self.open:
            return
        if len(self._headers) == MAX_FIELDS:
            self._refuse()
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expects = True
        self._headers.append((name, value))


class HeadOut:
    """The head of an answer: what of it the protocol has to know, and the lines of its fields.

    NOTE: names and values are not looked at again, as uvicorn would with two regular expressions for each field:
    they are ours, or have been read strictly (``upstream/_http.pyx``), or by httpx.

    Attributes:
        lines: The lines.
        length: How long the body is, in bytes; ``UNKNOWN`` if no field tells.
        close: Whether a field says that the connection ends.
    """

    def __init__(self, headers: Headers) -> None:
        self.lines = lines_of(headers)
        self.length = UNKNOWN
        self.close = False
        for name, value in headers:
            if name == b"content-length":
                self.length = int(value)
            elif name == b"connection" and value == b"close":
                self.close = True


class Sender:
    """What an app sends by, in the place of uvicorn's own: heads are written here, all else is left to that.

    PERF: a head waits for what follows at once, until the loop turns, as what uvicorn takes for its transport: to
    write both together takes the system half as long. See benchmarks/gateway, json.

    Args:
        cycle: uvicorn's, of one request.
        statuses: The first line of an answer, by its status.
        loop: The event loop.
    """

    def __init__(self, cycle: Any, statuses: dict[int, bytes], loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401 - uvicorn is not known here
        self._cycle = cycle
        self._statuses = statuses
        self._loop = loop
        self._transport: Any = cycle.transport
        self._head = b""

    async def send(self, event: dict[str, Any]) -> None:
        """Send an event."""
        cycle = self._cycle
        if event["type"] == "http.response.start" and not (
            cycle.response_started or cycle.disconnected or cycle.flow.write_paused
        ):
            self._begin(event["status"], HeadOut([*cycle.default_headers, *event["headers"]]))
        else:
            await cycle.send(event)

    def _begin(self, status: int, head: HeadOut) -> None:
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [self._statuses[status], head.lines]
        if head.close:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        if head.length != UNKNOWN:
            cycle.chunked_encoding = False
            cycle.expected_content_length = head.length
        elif status not in (204, 304):
            cycle.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        cycle.transport = self
        self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write a head that nothing followed at once."""
        if self._head:
            self.write(b"")

    def write(self, data: bytes) -> None:
        """Write what follows a head, and the head."""
        head, self._head = self._head, b""
        self._cycle.transport = self._transport
        if not self._transport.is_closing():
            self._transport.write(b"".join((head, data)))

    def close(self) -> None:
        """Close the connection behind a head."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether the connection is being closed."""
        return bool(self._transport.is_closing())
