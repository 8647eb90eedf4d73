"""uvicorn, as ``tokenguard serve`` runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tokenguard import refusal
from tokenguard._fields import MAX_FIELDS
from tokenguard._version import __version__
from tokenguard.errors import InvalidSetting
from tokenguard.lane._lane import KEEPALIVE_S, Connection, Lane
from tokenguard.lane.behind import FieldsIn, Sender
from tokenguard.model import Answer

GARBAGE = 20_000
"""How many objects come to be before garbage is looked for: a call makes some dozens, and leaves no cycles."""

MOST_WAITING = 16
"""With as many requests ahead of their time, no more is read from a connection."""

MAX_HEAD_BYTES = 65_536
"""What the head of a request may have; more, or more than MAX_FIELDS, is refused with 431."""

_log = logging.getLogger("tokenguard")


def run(
    app: Any,  # noqa: ANN401 - any ASGI app
    listening: socket.socket,
    ready: Callable[[], None],
    *,
    caller_timeout_s: float,
    patience_s: int,
    lifeline: int | None = None,
    lane: Lane | None = None,
) -> None:
    """Serve until a signal comes, and stop in peace.

    Args:
        app: The ASGI app.
        listening: What ``listen`` returned.
        ready: Is called once it serves.
        caller_timeout_s: How long a caller may take for the head of a request.
        patience_s: How long running calls may take to end.
        lifeline: A file descriptor; once it can be read from, the server stops.
        lane: What answers chat completions straight away; None to leave all to the app.
    """
    protocol: Callable[..., asyncio.Protocol] = partial(Protocol, caller_timeout_s=caller_timeout_s)
    if lane is not None:
        protocol = partial(Connection, lane, protocol)
    gc.collect()
    gc.freeze()  # what is there now stays, and need not be looked at again and again
    gc.set_threshold(GARBAGE, 20, 20)
    logging.getLogger("uvicorn.error").addFilter(_worth_saying)
    settings = uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol,  # type: ignore[arg-type]  # is called as a class
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEPALIVE_S,
        timeout_graceful_shutdown=patience_s,
    )
    Server(settings, ready, patience_s, lifeline).run([listening])


def listen(host: str, port: int, caller_timeout_s: float) -> socket.socket:
    """Return a listening socket.

    Args:
        host: A name or an address.
        port: The port; 0 picks a free one.
        caller_timeout_s: How long what was written to a caller may wait to be taken.

    Raises:
        InvalidSetting: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # create_server adds the address to its message, which we name already; a failed look-up has no errno
        said = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise InvalidSetting("port", f"cannot listen on {host} port {port}: {said}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Who takes nothing is given up, but what was written keeps its connection open until this is over.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(caller_timeout_s * 1000))
    return listening


def _worth_saying(record: logging.LogRecord) -> bool:
    """Return whether what uvicorn says is news to an operator."""
    if "without completing response" in record.msg:
        return False  # the app cuts a connection by not completing the answer, and says why itself
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False  # somebody would not wait for the end
    return not (record.msg.startswith("Cancel %s running task") and record.args == (0,))


def tell(listening: socket.socket, guards: str) -> None:
    """Say in one line where the server listens and what it guards."""
    address = listening.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"tokenguard {__version__} on http://{host}:{address[1]} | {guards}", flush=True)


class Server(uvicorn.Server):
    """uvicorn, which says when it serves, and stops when its supervisor is gone."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], patience_s: int, lifeline: int | None
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._patience_s = patience_s
        self._lifeline = lifeline

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, and be done then: uvicorn would raise it anew and so exit with an error."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        await super().startup(sockets)
        if self.started:
            if self._lifeline is not None:
                asyncio.get_running_loop().add_reader(self._lifeline, self._orphaned)
            self._ready()

    def _orphaned(self) -> None:
        """Stop, for the supervisor is gone."""
        asyncio.get_running_loop().remove_reader(self._lifeline or 0)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running calls end, and say that this is what the wait is for."""
        if running := len(self.server_state.tasks):
            _log.info("stopping: %d running calls have %d s to end", running, self._patience_s)
        await super().shutdown(sockets)
        for left in list[object](self.server_state.tasks):
            if isinstance(left, Connection):
                left.stop()  # after a second signal nobody has; tasks are cancelled with the loop


class Unreadable(Exception):
    """What comes is not read on."""


class Flow(FlowControl):
    """uvicorn's, which does not read on while too many requests wait.

    Attributes:
        held: Whether they do.
    """

    held = False

    def resume_reading(self) -> None:
        """Read on, if that may be."""
        if not self.held:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds on a head, and with refusals in the provider's shape and in their turn."""

    def __init__(self, *args: Any, caller_timeout_s: float, **kwargs: Any) -> None:  # noqa: ANN401 - as uvicorn passes them
        self._fields = FieldsIn(MAX_HEAD_BYTES, self._refuse_head)
        self.on_header = self._fields.on_header  # type: ignore[method-assign]  # PERF: benchmarks/gateway, falcon
        super().__init__(*args, **kwargs)
        self._caller_timeout_s = caller_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._untold_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._deaf = False
        self._broke_off = False
        self._why: Answer | None = None
        self._last: Answer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a first request."""
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more, and tell whoever is answering, also if the next request has come already."""
        self._forget_head()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Read on, unless what came before was the last that is read."""
        if self._deaf:
            return
        self._untold_bytes += len(data)
        super().data_received(data)
        if not self._reading:
            self._untold_bytes = 0
        elif self._untold_bytes > MAX_HEAD_BYTES:  # of a field that does not end, nobody tells
            self._end_with(_too_large())
        self._expect_something()

    def on_message_begin(self) -> None:
        """Take in a head; the rest of it is expected if it does not come at once."""
        super().on_message_begin()
        self._fields.begin(self.headers)
        self._reading = True
        self._untold_bytes = 0
        self._forget_head()

    def on_url(self, url: bytes) -> None:
        """Take in a piece of the target."""
        self._fields.count(len(url))
        super().on_url(url)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self.parser.get_http_version() not in ("1.0", "1.1"):  # Falcon takes others for errors of ours
            raise Unreadable
        self._untold_bytes = 0
        self._forget_head()
        self.expect_100_continue = self._fields.expects
        super().on_headers_complete()
        self._fields.open = False
        self.flow.held = len(self.pipeline) >= MOST_WAITING

    def on_body(self, body: bytes) -> None:
        """Take in a piece of the body."""
        self._untold_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._reading = False
        self._forget_head()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401 - likewise
        """Begin to answer a request."""
        self._running = cycle
        if cycle.scope["method"] == "HEAD":
            super()._start_asgi_task(cycle, app)
        else:
            send = Sender(cycle, STATUS_LINE, self.loop).send
            super()._start_asgi_task(cycle, lambda scope, receive, _: app(scope, receive, send))

    def on_response_complete(self) -> None:
        """Go on to the next request, or to what was none."""
        left = len(self.pipeline)
        self.flow.held = left > MOST_WAITING
        super().on_response_complete()
        if self._last is not None and left <= self._broke_off:
            self._refuse(self._last)
        elif self._reading:
            self._unset_keepalive_if_required()
            self._expect_something()

    @property
    def idle(self) -> bool:
        """Whether it is between two requests."""
        return not (self._reading or self._deaf or self._answering)

    @property
    def _answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # there is none before the first
        return bool(self.pipeline) or not (cycle is None or cycle.response_complete)

    def rest(self) -> None:
        """Expect nothing: somebody else reads the next request."""
        self._unset_keepalive_if_required()
        self._forget_head()

    def _expect_something(self) -> None:
        """Wait for no caller for ever: not within a head, nor behind a blank line, nor for what has its answer."""
        heading = self._heading and not self._deaf
        between = not self._answering and self.timeout_keep_alive_task is None
        if self._head_timer is None and (heading or between):
            self._expect_head()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._caller_timeout_s, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    @property
    def _heading(self) -> bool:
        return self._fields.open

    def _refuse_head(self) -> None:
        self._why = _too_large()
        raise Unreadable

    def _unsupported_upgrade_warning(self) -> None:
        """Answer as if no upgrade were asked for, and close: the parser has skipped a body, of unknown length."""
        self._deaf = True
        self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or more of it than is read, and close."""
        self._end_with(self._why or _invalid(msg))

    def _end_with(self, answer: Answer) -> None:
        """Close with an answer, once the requests before it have theirs."""
        self._deaf, self._last = True, answer
        self._forget_head()
        self._broke_off = self._reading and not self._heading
        if self.pipeline:
            return
        if not self._answering or (self._broke_off and not self.cycle.response_started):
            self._refuse(answer)
        elif self._broke_off:
            self.transport.close()

    def _refuse(self, answer: Answer) -> None:
        if self.transport.is_closing():
            return
        head = [b"HTTP/1.1 %d %b" % (answer.status, HTTPStatus(answer.status).phrase.encode())]
        head += [b"connection: close", b"content-length: %d" % len(answer.body)]
        head += [b": ".join(field) for field in answer.headers]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + answer.body)
        self.transport.close()


def _invalid(message: str) -> Answer:
    return refusal.problem(400, message, "invalid_request_error", "invalid_http")


def _too_large() -> Answer:
    message = f"the head of a request must be at most {MAX_HEAD_BYTES} bytes and {MAX_FIELDS} fields"
    return refusal.problem(431, message, "invalid_request_error", "head_too_large")
