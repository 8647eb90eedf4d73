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
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokenguard import refusal
from tokenguard._version import __version__
from tokenguard.errors import InvalidSetting
from tokenguard.lane._lane import Connection, Lane

KEEPALIVE_S = 75
"""How long a caller's idle connection is kept: longer than clients keep theirs, so that it is they who close."""

GARBAGE = 20_000
"""How many objects come to be before garbage is looked for: a call makes some dozens, and leaves no cycles."""

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


class Protocol(HttpToolsProtocol):
    """uvicorn's, which answers what is no HTTP in the provider's shape, and gives up who never ends a head."""

    def __init__(self, *args: Any, caller_timeout_s: float, **kwargs: Any) -> None:  # noqa: ANN401 - as uvicorn passes them
        super().__init__(*args, **kwargs)
        self._caller_timeout_s = caller_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._reading = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a first request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._forget_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Expect the rest of the head."""
        super().on_message_begin()
        self._reading = True
        self._forget_head()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._forget_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._reading = False
        super().on_message_complete()

    @property
    def idle(self) -> bool:
        """Whether it is between two requests."""
        cycle: RequestResponseCycle | None = self.cycle  # there is none before the first
        return not self._reading and not self.pipeline and (cycle is None or cycle.response_complete)

    def rest(self) -> None:
        """Expect nothing: somebody else reads the next request."""
        self._unset_keepalive_if_required()
        self._forget_head()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._caller_timeout_s, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and close."""
        answer = refusal.problem(400, msg, "invalid_request_error", "invalid_http")
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"content-length: %d" % len(answer.body)]
        head += [b": ".join(field) for field in answer.headers]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + answer.body)
        self.transport.close()
