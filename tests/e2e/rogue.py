"""An upstream that does to a connection what a test says, byte for byte."""

from __future__ import annotations

import re
import socket
import ssl
import threading

TIMEOUT_S = 10
TLS_HANDSHAKE = 0x16
"""How somebody begins who takes us for a server with TLS."""


class Rogue:
    """Takes one request a connection and lets ``behave`` answer it, on a free port of the loopback.

    Attributes:
        behave: What answers: a function that is given the connection, which is closed afterwards.
        received: The requests that came.
        stopped: Is set at the end: what ``behave`` may wait for to let a caller wait.
    """

    def __init__(self, tls: ssl.SSLContext | None = None):
        self._tls = tls
        self._serving = 0
        self._changed = threading.Condition()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listening.getsockname()[1]
        self.stopped = threading.Event()
        self.reset()

    def hung_up(self):
        """Wait until every connection is closed: it was not announced, so that a call might still take one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._serving == 0, TIMEOUT_S)

    def reset(self):
        self.received = []
        self.behave = saying()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._count(1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        connection.settimeout(TIMEOUT_S)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                self.received.append(read_request(connection))
                self.behave(connection)
        except OSError:  # TokenGuard has closed it
            connection.close()
        finally:
            self._count(-1)

    def _count(self, more):
        with self._changed:
            self._serving += more
            self._changed.notify_all()


def read_request(connection):
    """Return one request, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError
        data += piece
        if data[0] == TLS_HANDSHAKE:
            return data, b""
    head, _, body = data.partition(b"\r\n\r\n")
    length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or (b"", b"0"))[1])
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def saying(*pieces):
    """Return a behaviour: send the pieces, then hang up."""

    def behave(connection):
        for piece in pieces:
            connection.sendall(piece)

    return behave


def answer(body, *fields, status="200 OK", length=None, kind="application/json"):
    """Return a whole answer, whose announced length may be wrong."""
    fields = (f"content-type: {kind}", f"content-length: {len(body) if length is None else length}", *fields)
    return head(*fields, status=status) + body


def head(*fields, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode("latin-1")


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENTS = head("content-type: text/event-stream", "transfer-encoding: chunked")
LAST = b"0\r\n\r\n"
