"""A road between a node and its Redis that can be blocked, and that can swallow answers."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

PIECE = 65_536


class Road:
    """Forwards connections on a port of its own to another port.

    Attributes:
        swallows: How many answers are still to be thrown away; with each, its connection is cut.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listening.getsockname()[1]
        self.swallows = 0
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def block(self) -> None:
        """Pass nothing on from now on, either way, and close nothing: a network that lost its way."""
        self._open.clear()

    def clear(self) -> None:
        """Pass on what was held back, and all that comes."""
        self._open.set()

    def cut(self) -> None:
        """Close all connections."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for each in (
                    threading.Thread(target=self._pass, args=(near, far, False), daemon=True),
                    threading.Thread(target=self._pass, args=(far, near, True), daemon=True),
                ):
                    self._threads.append(each)
                    each.start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                self._open.wait()
                if answers and self.swallows:
                    self.swallows -= 1
                    break
                sink.sendall(piece)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Road:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()
