"""The same bytes down both paths, the fast lane and Falcon, and what is to be the same of what comes of them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx

from tests.e2e.conftest import OUR_KEY, TokenGuard, running
from tests.e2e.test_observing import quiet

PATHS = {"lane": "on", "Falcon": "off"}
"""The paths, and what ``TOKENGUARD_FASTLANE`` says for each."""

PATIENCE_S = 30
CALLER_TIMEOUT_S = 1
MAX_BODY_BYTES = 20_000
SETTINGS = {
    "OPENAI_API_KEY": OUR_KEY,
    "CAP_GLOBAL": 10**12,
    "RATE_GLOBAL": 0,
    "CAP_TEAM": "unlimited",
    "CAP_USER": 1000,
    "RATE_USER": 0,
    "TOKENGUARD_BUCKETS": 50_000,
    "TOKENGUARD_CALLER_TIMEOUT_S": CALLER_TIMEOUT_S,
    "TOKENGUARD_MAX_BODY_BYTES": MAX_BODY_BYTES,
    "TOKENGUARD_PROVIDER_LIMITS": "off",
}
"""What both servers are started with: fixed grants, so that every token can be accounted for; none is learned."""

PROBE_ID = b"the-probe"
PROBE = b"GET /probe HTTP/1.1\r\nhost: x\r\nx-request-id: %b\r\n\r\n" % PROBE_ID
"""Is answered by a server that is between two requests, and by no other."""

MASKED = b"<made by the server>"
_MADE_ID = re.compile(rb"[0-9a-f]{32}")
_TIME = re.compile(rb'"time":"[^"]*"')
_MAY_DIFFER = frozenset((b"date", b"connection", b"transfer-encoding"))
"""Fields that say when, and how the body travels; that a connection ends is compared by whether it does."""

# --- the provider -------------------------------------------------------------------------------------------

PROMPT = 9
USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
WHOLE = json.dumps({"choices": [{"message": {"content": "Hello"}}], "usage": USAGE}).encode()
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}],"usage":null}\n\n'
TOLD = b"data: %b\n\n" % json.dumps({"choices": [], "usage": USAGE}).encode()
DONE = b"data: [DONE]\n\n"


def said(body=b"", *fields, status=b"200 OK", kind=b"application/json", length=None):
    """Return a whole answer of a provider."""
    told = b"content-length: %d" % (len(body) if length is None else length)
    return b"\r\n".join([b"HTTP/1.1 " + status, b"content-type: " + kind, told, *fields, b"", body])


def chunked(*pieces, fields=(b"content-type: text/event-stream",), last=b"0\r\n\r\n"):
    """Return an answer of a provider in chunks."""
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *fields, b"transfer-encoding: chunked", b"", b""])
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


@dataclass
class Provider:
    """Answers each request with what its field ``x-says`` names, on a free port of the loopback.

    Attributes:
        sayings: What can be named: the bytes, and whether the connection is closed behind them.
        received: The requests that came: head without the provider's address, and body.
    """

    sayings: dict[bytes, tuple[bytes, bool]]
    received: list[tuple[list[bytes], bytes]] = field(default_factory=list)

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def start(self):
        """Listen in the loop that runs."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, started):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self.start()
        started.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader, writer):
        closes = False
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while not closes:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int((re.search(rb"\r\ncontent-length: *(\d+)", head) or (b"", b"0"))[1])
                body = await reader.readexactly(length)
                lines = [line for line in head.split(b"\r\n") if not line.startswith(b"host:")]
                self.received.append((lines, body))
                answer, closes = self._answer(lines, body)
                writer.write(answer)
                await writer.drain()
        writer.close()

    def _answer(self, lines, body):
        says = [line[len(b"x-says: ") :] for line in lines if line.startswith(b"x-says: ")]
        default = chunked(WORD, WORD, TOLD, DONE) if re.search(rb'"stream": ?true', body) else said(WHOLE)
        return self.sayings.get(says[0] if says else b"", (default, False))


# --- a caller -----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """An answer, as far as it came."""

    line: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    whole: bool = False

    @property
    def status(self):
        return int(self.line.split(b" ")[1])

    def value(self, name):
        """Return the value of a field that is there once, or nothing."""
        return next((value for key, value in self.fields if key == name), b"")

    def masked(self, sent):
        """Return what must be the same on both paths."""
        given = [
            (
                name,
                MASKED if name == b"x-request-id" and value not in sent and _MADE_ID.fullmatch(value) else value,
            )
            for name, value in self.fields
            if name not in _MAY_DIFFER
        ]
        return self.line, sorted(given), _TIME.sub(b'"time":0', self.body), self.whole


def take_answer(data, *, closed):
    """Return the first answer in ``data``, as far as it came, and what follows it; None if there is none."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    if not blank:
        return None
    line, *lines = head.split(b"\r\n")
    fields = [tuple(line.split(b": ", 1)) if b": " in line else (line.rstrip(b":"), b"") for line in lines]
    answer = Answer(line, fields)
    if answer.status in (204, 304) or answer.status < 200:
        answer.whole = True
    elif answer.value(b"transfer-encoding") == b"chunked":
        return _take_chunks(answer, rest)
    else:
        told = answer.value(b"content-length")
        length = int(told) if told else len(rest)
        answer.body, answer.whole = rest[:length], len(rest) >= length if told else closed
        return answer, rest[length:]
    return answer, rest


def _take_chunks(answer, rest):
    while True:
        size, end, more = rest.partition(b"\r\n")
        if not end:
            return answer, b""
        length = int(size, 16)
        if len(more) < length + 2:
            answer.body += more[:length]
            return answer, b""
        assert more[length : length + 2] == b"\r\n", "a chunk is not what it says"
        answer.body, rest = answer.body + more[:length], more[length + 2 :]
        if not length:
            answer.whole = True
            return answer, rest


@dataclass
class Heard:
    """What a caller heard: the answers, the probe's left out, and whether the server closed the connection."""

    answers: list[Answer]
    closed: bool
    rest: bytes = b""

    def masked(self, sent):
        """Return what must be the same on both paths; whether it says "go on" depends on when it reads."""
        answers = [answer.masked(sent) for answer in self.answers if answer.status >= 200]
        return answers, self.closed, self.rest

    @property
    def statuses(self):
        return [answer.status for answer in self.answers]


def heard(data, *, closed):
    """Return what bytes of a server say."""
    answers = []
    while data and (taken := take_answer(data, closed=closed)) is not None:
        answer, data = taken
        answers.append(answer)
        if not answer.whole:
            break
    return Heard(answers, closed, data)


def _is_probe(answer):
    return answer.whole and answer.value(b"x-request-id") == PROBE_ID


async def converse(port, pieces, *, ends=False, at_once=False, gap_s=0.0):
    """Send pieces of bytes and return what is heard, until the server closes or is between two requests.

    Args:
        port: The server's.
        pieces: What is sent, one after the other.
        ends: Whether nothing more is sent: the caller's side is closed.
        at_once: Whether the probe is sent right behind, and not once the first answer is there.
        gap_s: How long to wait between two pieces, so that they are read one by one.
    """
    loop = asyncio.get_running_loop()
    data, probed = b"", False
    with socket.socket() as connection:
        # Sockets as they are: a stream of asyncio's drops what it has to be read once it cannot write any more.
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def send(piece):
            with suppress(ConnectionError):
                await loop.sock_sendall(connection, piece)

        async with asyncio.timeout(PATIENCE_S):
            await loop.sock_connect(connection, ("127.0.0.1", port))
            for piece in pieces:
                await send(piece)
                await asyncio.sleep(gap_s)
            if ends:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            elif at_once:
                probed = True
                await send(PROBE)
            while piece := await _received(loop, connection):
                data += piece
                so_far = heard(data, closed=False)
                final = [answer for answer in so_far.answers if answer.whole and answer.status >= 200]
                if final and _is_probe(final[-1]):
                    so_far.answers.remove(final[-1])
                    return so_far
                if final and not probed and not ends:
                    probed = True
                    await send(PROBE)
    return heard(data, closed=True)


async def _received(loop, connection):
    try:
        return await loop.sock_recv(connection, 65536)
    except ConnectionError:
        return b""


# --- both paths ---------------------------------------------------------------------------------------------


@dataclass(repr=False)
class Path:
    """A server that goes one way, and its provider."""

    name: str
    server: TokenGuard
    provider: Provider
    _counted: dict[str, float] = field(default_factory=dict)

    def __repr__(self):
        return f"the path of {self.name}"

    @property
    def port(self):
        return httpx.URL(self.server.url).port

    def books(self, *users):
        """Return what users have left, and what was charged and counted since this was asked last."""
        counted = {
            name: value
            for name, value in quiet(self.server).items()
            if not any(word in name for word in ("seconds", "_created", "latency", "quantile", 'route="/metrics"'))
        }
        counted["charged"] = -self.server.level("global", "*")
        before, self._counted = self._counted, counted
        changes = {name: value - before.get(name, 0) for name, value in counted.items()}
        return (
            [self.server.level("user", user) for user in users],
            {name: by for name, change in changes.items() if (by := round(change, 6))},
        )

    def forwarded(self):
        """Return what came to the provider since it was asked last; the ids that the server made are masked."""
        received, self.provider.received = self.provider.received, []
        return sorted(
            (sorted(re.sub(rb"^(x-request-id: )[0-9a-f]{32}$", rb"\1" + MASKED, line) for line in lines), body)
            for lines, body in received
        )


@contextmanager
def both(folder, sayings):
    """Start a server for each path; return them."""
    with Provider(sayings) as first, Provider(sayings) as second:
        lane, falcon = (
            running(
                folder,
                "serve",
                OPENAI_BASE_URL=f"http://127.0.0.1:{provider.port}/v1",
                TOKENGUARD_FASTLANE=setting,
                **SETTINGS,
            )
            for provider, setting in zip((first, second), PATHS.values(), strict=True)
        )
        with lane as with_lane, falcon as without:
            yield Path("lane", with_lane, first), Path("Falcon", without, second)


def told_by_both(paths, pieces, **how):
    """Send the same down both paths, at the same time; return what each says."""

    async def ask():
        return await asyncio.gather(*(converse(path.port, pieces, **how) for path in paths))

    return asyncio.run(ask())


def assert_same(paths, pieces, *users, **how):
    """Assert that both paths say, forward, charge and count the same; return what they say."""
    told = told_by_both(paths, pieces, **how)
    assert_equal(*(heard.masked(b"".join(pieces)) for heard in told))
    assert_equal(*(path.books(*users) for path in paths))
    assert_equal(*(path.forwarded() for path in paths))
    return told[0]


def assert_equal(lane, falcon, about=""):
    """Assert that both paths did the same."""
    assert lane == falcon, f"{about}\n    lane: {lane}\n  Falcon: {falcon}"


def agree(lane, falcon, sent):
    """Return whether two say the same, but for the timing of a request whose body breaks off.

    What breaks off is refused. Whether the request had its answer before, which did not need the body, depends on
    how long those before it took.
    """
    lane, falcon = lane.masked(sent), falcon.masked(sent)
    if lane == falcon:
        return True
    (fewer, *_), (more, *_) = sorted((lane, falcon), key=lambda heard: len(heard[0]))
    return (
        lane[1:] == falcon[1:] == (True, b"")
        and fewer[-1:] == more[-1:]
        and b"invalid_http" in fewer[-1][2]
        and fewer[:-1] == more[:-2]
    )
