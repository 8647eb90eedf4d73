"""A storm of callers who hang up at random, and what must be true when it is over."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from tests.oracle import OracleTable, Terms

GLOBAL_CAPACITY = 10**9
USER_CAPACITY = 1000
SETTINGS = {
    "CAP_GLOBAL": GLOBAL_CAPACITY,
    "RATE_GLOBAL": 0,
    "CAP_TEAM": "unlimited",
    "CAP_USER": USER_CAPACITY,
    "RATE_USER": 0,
    "TOKENGUARD_BUCKETS": 50_000,
}
"""What the server is to be started with: fixed grants, so that every token can be accounted for."""

PROMPT = 9
RESERVED = PROMPT + 50
USED = 30
MAX_WORDS = 20
CALLERS = 64
PATIENCE_S = 20
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: hang up with a reset instead of a farewell."""

_USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": USED}
_COMPLETION = json.dumps({"choices": [{"message": {"content": "Hello"}}], "usage": _USAGE}).encode()
_WORD = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}],"usage":null}\n\n'
_END = b"data: %s\n\ndata: [DONE]\n\n" % json.dumps({"choices": [], "usage": _USAGE}).encode()


@dataclass
class Seen:
    """A call as the upstream saw it."""

    words: int = 0
    complete: bool = False


@dataclass
class Upstream:
    """A lean upstream in a thread of its own: answers in random pieces, after random moments."""

    seed: int
    seen: dict[str, Seen] = field(default_factory=dict)
    open_answers: int = 0

    def __enter__(self):
        started = threading.Event()
        self._random = random.Random(self.seed)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, started):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader, writer):
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = json.loads(await reader.readexactly(int(_field(head, "content-length"))))
                self.open_answers += 1
                try:
                    await self._answer(self.seen.setdefault(_field(head, "x-request-id"), Seen()), body, writer)
                finally:
                    self.open_answers -= 1
        writer.close()

    async def _answer(self, seen, body, writer):
        await self._moment()
        if not body.get("stream"):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            await self._send(writer, head % len(_COMPLETION) + _COMPLETION)
        else:
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for _ in range(self._random.randint(1, MAX_WORDS)):
                seen.words += 1
                await self._send(writer, b"%x\r\n%s\r\n" % (len(_WORD), _WORD))
            await self._send(writer, b"%x\r\n%s\r\n0\r\n\r\n" % (len(_END), _END))
        seen.complete = True

    async def _send(self, writer, data):
        cut = self._random.randint(0, len(data))
        for piece in (data[:cut], data[cut:]):
            writer.write(piece)
            await writer.drain()
            if self._random.random() < 0.2:
                await self._moment()

    async def _moment(self):
        await asyncio.sleep(self._random.random() * 0.003)


def _field(head, name):
    return re.search(rf"(?i)\r\n{name}: *(\S+)", head.decode())[1]


@dataclass
class Caller:
    """One caller, who hangs up once."""

    user: str
    stream: bool
    request: bytes
    sends: int
    takes: int
    resets: bool

    @classmethod
    def drawn(cls, user, rng):
        stream = rng.random() < 0.6
        # A model of its own for each caller: none is estimated by what others took.
        body = {
            "model": f"model-of-{user}",
            "messages": [{"role": "user", "content": "Say hello"}],
            "max_tokens": 50,
        }
        body = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-user-id: {user}\r\nx-request-id: {user}\r\n"
        if rng.random() < 0.5:
            cut = rng.randint(1, len(body) - 1)
            pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:cut], body[cut:]))
            request = f"{head}transfer-encoding: chunked\r\n\r\n".encode() + pieces + b"0\r\n\r\n"
        else:
            request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        sends = rng.randint(0, len(request)) if rng.random() < 0.3 else len(request)
        takes = rng.choice((0, 1, rng.randint(1, 600), rng.randint(1, 4000), 10**6))
        return cls(user, stream, request, sends, takes, resets=rng.random() < 0.5)

    async def call(self, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError):
            writer.write(self.request[: self.sends])
            await writer.drain()
            if self.sends == len(self.request):
                await self._take(reader)
        if self.resets:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def _take(self, reader):
        taken = b""
        while len(taken) < self.takes and not taken.endswith((b"0\r\n\r\n", b"}}")):
            piece = await asyncio.wait_for(reader.read(min(65536, self.takes - len(taken))), PATIENCE_S)
            if not piece:
                break
            taken += piece


async def _rage(port, callers):
    free = asyncio.Semaphore(CALLERS)

    async def call(caller):
        async with free:
            await caller.call(port)

    await asyncio.gather(*map(call, callers))


def rage(server, count, seed, prefix):
    """Let ``count`` callers call and hang up; return them."""
    rng = random.Random(seed)
    callers = [Caller.drawn(f"{prefix}-{seed}-{i}", rng) for i in range(count)]
    asyncio.run(_rage(httpx.URL(server.url).port, callers))
    return callers


def metrics(client):
    """Return the server's metrics without labels."""
    text = client.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def quiet(client):
    """Return the metrics once no call is under way; calls that are not streamed run on without their callers."""
    for _ in range(10_000):
        seen = metrics(client)
        if seen["tokenguard_calls_in_flight"] == 0:
            return seen
    raise AssertionError(f"{seen['tokenguard_calls_in_flight']:g} calls do not end")


def charged(client, caller):
    """Return what a caller was charged in all."""
    return USER_CAPACITY - client.get(f"/config/budget/user/{caller.user}").json()["level"]


def legal(caller, seen):
    """Return what a caller may have been charged, given what the upstream saw of the call."""
    if caller.sends < len(caller.request):
        return {0}
    if seen is None:  # left before it was forwarded, or while a connection came about
        return {0, RESERVED}
    if not caller.stream:
        return {USED}
    return {RESERVED, *(PROMPT + words for words in range(1, seen.words + 1)), *([USED] if seen.complete else [])}


def account(client, upstream, callers):
    """Assert that every call was charged what it may be, and every scope the same; return the charges.

    The oracle settles the same calls; its levels must be the server's.
    """
    oracle = OracleTable()
    terms = (Terms(GLOBAL_CAPACITY, 0, 10 * GLOBAL_CAPACITY), Terms(USER_CAPACITY, 0, 10 * USER_CAPACITY))
    charges = []
    for caller in callers:
        tokens = charged(client, caller)
        allowed = legal(caller, upstream.seen.get(caller.user))
        assert tokens in allowed, f"{caller} was charged {tokens}, not one of {allowed}"
        charges.append(tokens)
        plan = ((b"global", terms[0]), (caller.user.encode(), terms[1]))
        if tokens:
            assert oracle.reserve(plan, (RESERVED,) * 2, 0).allowed
            oracle.settle(plan, (tokens - RESERVED,) * 2, 0)
    (level,) = oracle.peek(((b"global", terms[0]),), 0).levels
    assert client.get("/config/budget/global").json()["level"] == level
    return charges
