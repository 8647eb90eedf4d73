"""A provider within the test's own loop, and the pool that calls it: what travels, and when, is up to the test."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress

from tokenguard.model import UpstreamRequest
from tokenguard.upstream import Hop
from tokenguard.upstream._pool import PooledUpstream

PATIENCE = {
    "connect_timeout_s": 5.0,
    "read_timeout_s": 5.0,
    "total_timeout_s": 10.0,
    "max_connections": 4,
    "queue_timeout_s": 5.0,
}
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Line:
    """A connection, as the provider has it.

    Attributes:
        requests: The requests that came over it, head and body.
    """

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer
        self.requests = []

    async def request(self):
        """Return the next request; raise IncompleteReadError where the connection ends instead."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        self.requests.append((head, body))
        return head, body

    async def say(self, *pieces):
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()

    async def head(self):
        """Return the head of the next request."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def some(self, most):
        """Return some bytes of a body; raise IncompleteReadError at its end."""
        if got := await self._reader.read(most):
            return got
        raise asyncio.IncompleteReadError(b"", None)

    async def gone(self):
        """Wait until the other side has closed it."""
        with suppress(ConnectionError):
            while await self._reader.read(65536):
                pass

    def raw(self):
        """Return the socket, for what is to happen without the loop."""
        return socket.socket(fileno=socket.dup(self._writer.get_extra_info("socket").fileno()))

    def close(self):
        self._writer.close()

    def end(self):
        """Send nothing more, but stay."""
        self._writer.write_eof()

    def reset(self):
        """Break it off, as a crash would."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


async def polite(line):
    """Answer every request."""
    while True:
        await line.request()
        await line.say(OK)


def saying(*pieces):
    """Return a script: answer each request with pieces, then close."""

    async def script(line):
        await line.request()
        await line.say(*pieces)
        line.close()

    return script


class Provider:
    """Gives each connection that comes to ``script``.

    Attributes:
        lines: The connections that have come.
        port: Where it listens.
    """

    def __init__(self, script=polite, tls=None, host="127.0.0.1", room=None):
        """Let the kernel keep no more than ``room`` bytes of what was not read yet, where that is given."""
        self.script, self._tls, self._host, self._room = script, tls, host, room
        self.lines = []
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, self._host, 0, ssl=self._tls)
        listening = self._server.sockets[0]
        if self._room is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._room)
        self.port = listening.getsockname()[1]
        return self

    async def __aexit__(self, *error):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader, writer):
        line = Line(reader, writer)
        self.lines.append(line)
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self.script(line)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            writer.close()
            self._tasks.discard(task)


def server_context(authority, *names):
    """Return what a server of those names needs, by an authority of trustme's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def hop_to(url, **more):
    return Hop(url, **{**PATIENCE, **more})


class OddLoop:
    """The loop that runs, whose clock can be put on, and whose resolver may be the test's own.

    Attributes:
        ahead: How many seconds the clock is ahead.
        addresses: What every name stands for, if not what it does.
    """

    def __init__(self, *addresses):
        self._loop = asyncio.get_running_loop()
        self.ahead, self.addresses = 0, addresses

    def __getattr__(self, name):
        return getattr(self._loop, name)

    def time(self):
        return self._loop.time() + self.ahead

    async def getaddrinfo(self, *asked, **how):
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        if self.addresses:
            return [(*kind, address) for address in self.addresses]
        return await self._loop.getaddrinfo(*asked, **how)


@asynccontextmanager
async def calling(url, loop=None, **more):
    """A pool; at the end nothing is under way in it, and once it is closed, nothing is left of it."""
    upstream = PooledUpstream(hop_to(url, **more), loop)
    try:
        yield upstream
        await seen(lambda: state(upstream)[1:] == (0, 0, 0), lambda: repr(upstream.pool))
    finally:
        await upstream.close()
    assert state(upstream) == (0, 0, 0, 0)


@asynccontextmanager
async def facing(script=polite, **more):
    """A provider, and a pool that calls it."""
    async with Provider(script) as provider, calling(f"http://127.0.0.1:{provider.port}/v1", **more) as upstream:
        yield provider, upstream


def state(upstream):
    """Return how many connections are idle, busy and coming about, and how many calls wait for one."""
    return tuple(
        int(number) for number in re.findall(r"(\d+) (?:idle|busy|connecting|waiting)", repr(upstream.pool))
    )


async def seen(holds, what=lambda: ""):
    """Wait until something holds."""
    for _ in range(2_000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"it does not come to that: {what()}")


def request(method="POST", path="/chat/completions", body=b"{}", **fields):
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return UpstreamRequest(method, path, headers, b"" if method in ("GET", "HEAD") else body)


async def body_of(response):
    """Return the rest of an answer, and close it."""
    try:
        return b"".join([piece async for piece in response.chunks()])
    finally:
        await response.close()


async def ask(upstream, asked=None):
    """Return the status and the body of an answer."""
    response = await upstream.open(asked or request())
    return response.status, await body_of(response)


def full_queue():
    """Return sockets of which the first lets nobody in any more."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    waiting = []
    for _ in range(4):
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(listening.getsockname())
        waiting.append(connection)
    return [listening, *waiting]
