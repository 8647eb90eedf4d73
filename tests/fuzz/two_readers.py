"""Feeds odd bytes to the fast lane and to Falcon, in one process, until they disagree or the time is over.

    python -m tests.fuzz.two_readers --minutes 10 [--seed 1]

Each input is a few requests, mutated, and cut into pieces at random. What must hold: both say the same answers,
find the end of each message at the same byte (a request put behind tells), forward and charge the same; nothing is
raised into the event loop or the log; once a caller is gone, no call and no reservation is open. The input that
breaks one of these is printed, and the exit code is 1.
"""

import argparse
import asyncio
import logging
import random
import time
from functools import partial

import uvicorn
import uvloop
from uvicorn.server import ServerState

from tests.e2e.test_two_paths import REQUESTS, SAYINGS, chat, in_chunks
from tests.e2e.two_paths import PROBE, SETTINGS, Provider, _is_probe, agree, heard
from tokenguard.asgi import create_app
from tokenguard.config import read_config
from tokenguard.engine import buckets
from tokenguard.lane._lane import Connection, Lane
from tokenguard.server import KEEPALIVE_S, Protocol, _worth_saying
from tokenguard.wiring import upstream_of

TURNS = 12
"""Of the event loop, without anything written and without a call at the provider: then nothing more comes."""
PATIENCE_S = 20
NAME = "nobody-000000000"
USERS = 40_000
"""After so many users a table is nearly full, and the servers are made anew."""


class Broken(AssertionError):
    """Something that must hold does not."""


class Watching(logging.Handler):
    """Keeps what must not be logged."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        if record.exc_info or record.levelno >= logging.ERROR:
            self.seen.append(self.format(record))


class Pipe(asyncio.Transport):
    """A connection without a socket: keeps what is written, and takes what is read when that is wanted."""

    def __init__(self, loop):
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._loop = loop
        self.written = bytearray()
        self.closed = self.lost = self.paused = False
        self.protocol = None

    def write(self, data):
        if self.lost:
            raise RuntimeError("the handler is closed")  # as uvloop says it
        if not self.closed:
            self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self._lose)

    abort = close

    def _lose(self):
        self.lost = True
        self.protocol.connection_lost(None)

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def is_reading(self):
        return not self.paused

    def get_write_buffer_size(self):
        return 0


class Reader:
    """One of the two that read, with buckets and a provider of its own."""

    def __init__(self, name, *, fast):
        self.name, self._fast = name, fast
        self.provider = Provider(SAYINGS)

    async def start(self):
        self._loop = asyncio.get_running_loop()
        self._listening = await self.provider.start()
        url = f"http://127.0.0.1:{self.provider.port}/v1"
        config = read_config({**{k: str(v) for k, v in SETTINGS.items()}, "OPENAI_BASE_URL": url})
        self._upstream, self.backend = upstream_of(config), buckets(config)
        app = create_app(config, self._upstream, self.backend)
        self._limiter = app.guard.limiter
        make = partial(Protocol, caller_timeout_s=PATIENCE_S)
        if self._fast:
            make = partial(Connection, Lane(app.guard, self._upstream), make)
        settings = uvicorn.Config(
            app, loop="uvloop", http=make, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEPALIVE_S,
        )  # fmt: skip
        settings.load()
        self._state = ServerState()
        self._state.default_headers = [(b"date", b"now")]
        self._make = partial(make, settings, self._state, {}, self._loop)

    async def stop(self):
        self._listening.close()
        await self._upstream.close()

    def _counted(self, name):
        return sum(self.backend.table.tallies()[name])

    @property
    def calls(self):
        """How many calls are under way."""
        return self._counted(b"calls_in_flight")

    @property
    def open(self):
        """How many reservations are neither settled nor kept."""
        return self._counted(b"reservations_open")

    @property
    def charged(self):
        """What calls were charged in all."""
        return self._counted(b"tokens_settled")

    async def listen(self, pieces):
        """Read pieces; return what is said, the answer to the probe left out."""
        pipe = Pipe(self._loop)
        pipe.protocol = self._make()
        pipe.protocol.connection_made(pipe)
        for piece in (*pieces, PROBE):
            if piece is PROBE:
                await self._quiet(pipe)
            await self._feed(pipe, piece)
        await self._quiet(pipe)
        said = heard(bytes(pipe.written), closed=pipe.closed)
        said.answers = [answer for answer in said.answers if not _is_probe(answer)]
        pipe.close()
        await self._quiet(pipe)
        for _ in range(1000):
            if not self.calls and not self._state.tasks:
                break
            await asyncio.sleep(0.001)
        if self.calls or self.open or self._state.tasks or self._state.connections:
            raise Broken(f"{self.name} leaves behind: {vars(self)} {self._state}")
        return said

    async def _feed(self, pipe, piece):
        while pipe.paused and not pipe.closed:
            if not await self._quiet(pipe):
                return  # it will never read on
        if not pipe.closed:
            pipe.protocol.data_received(piece)
            await asyncio.sleep(0)

    async def _quiet(self, pipe):
        """Wait until nothing happens any more; return whether anything has happened."""
        seen, turns, moved = (len(pipe.written), pipe.paused), 0, False
        began = time.monotonic()
        while turns < TURNS:
            await asyncio.sleep(0)
            now = (len(pipe.written), pipe.paused)
            turns = 0 if now != seen else turns + 1
            moved |= now != seen
            seen = now
            if turns == TURNS and self.open:  # to ask the table takes long
                await asyncio.sleep(0.0002)
                turns = 0
            if time.monotonic() - began > PATIENCE_S:
                raise Broken(f"{self.name} does not come to an end")
        return moved

    def forwarded(self):
        """Return what came to the provider since it was asked last, but for the ids of requests."""
        received, self.provider.received = self.provider.received, []
        return [
            (sorted(line for line in lines if not line.startswith(b"x-request-id")), body)
            for lines, body in received
        ]


# --- inputs -------------------------------------------------------------------------------------------------

SEEDS = [make(NAME) for name, make in REQUESTS.items() if name != "HEAD"]
"""What is mutated; the answer to a HEAD has a length and no body, which whoever hears it would have to know."""
SEEDS = [seed for seed in SEEDS if len(seed) < 3000]
MARKS = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b"\0",
    b"\xff",
    b"0",
    b"9",
    b",",
    b";",
    b"\r\n\r\n",
    b"\x0b",
    b"\x7f",
]
LINES = [
    b"content-length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"connection: keep-alive, upgrade\r\n",
    b"upgrade: h2c\r\n",
    b"expect: 100-continue\r\n",
    b"x-team-id: t\r\n",
    b"x-user-id: mallory\r\n",
    b"host: y\r\n",
    b"te: trailers\r\n",
    b"trailer: x-user-id\r\n",
    *(b"x-says: %b\r\n" % name for name in SAYINGS if name != b"a 100 kB stream"),
]
WORDS = [
    b" x\r\n",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"POST ",
    b"GET / HTTP/1.1\r\n\r\n",
    b"0\r\n\r\n",
    b"chunked",
    b"identity",
]
SPLICES = [*MARKS, *LINES, *WORDS]


def drawn(rng):
    """Return bytes that are requests, more or less."""
    parts = [rng.choice(SEEDS) if rng.random() < 0.6 else made(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    data = bytearray(b"".join(parts))
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:  # heads are where it matters
            at = data.find(b"\r\n", at)
            at = max(at, 0) + 2 * (rng.random() < 0.7)
        kind = rng.random()
        if kind < 0.45:
            data[at:at] = rng.choice(SPLICES)
        elif kind < 0.6:
            data[at : at + rng.randrange(1, 6)] = b""
        elif kind < 0.75 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind < 0.85 and at < len(data):
            data[at] ^= 0x20
        else:
            end = min(len(data), at + rng.randrange(1, 200))
            to = rng.randrange(len(data) + 1)
            data[to:to] = data[at:end]
    return bytes(data)


def made(rng):
    fields = [rng.choice(SPLICES).strip() for _ in range(rng.randrange(4))]
    make = in_chunks if rng.random() < 0.3 else chat
    return make(NAME, *(field for field in fields if b":" in field), stream=rng.random() < 0.5)


def cut(rng, data):
    """Return the data in pieces."""
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 2, 5))))
    return [piece for start, end in zip((0, *at), (*at, len(data)), strict=True) if (piece := data[start:end])]


# --- the run ------------------------------------------------------------------------------------------------


async def run(seconds, seed):
    rng = random.Random(seed)
    watching = Watching()
    logging.getLogger().addHandler(watching)
    for name in ("tokenguard", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(_worth_saying)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: watching.seen.append(repr(context)))
    end, inputs, answers, statuses = time.monotonic() + seconds, 0, 0, {}
    readers = []
    while time.monotonic() < end:
        if inputs % USERS == 0:
            for reader in readers:
                await reader.stop()
            readers = [Reader("lane", fast=True), Reader("Falcon", fast=False)]
            for reader in readers:
                await reader.start()
        inputs += 1
        user = b"fuzz%012d" % inputs
        data = drawn(rng).replace(NAME.encode(), user)
        pieces = cut(rng, data)
        try:
            lane, falcon = [await reader.listen(pieces) for reader in readers]
            if not agree(lane, falcon, data):
                compare("the answers", lane.masked(data), falcon.masked(data))
            compare("what came to the provider", *(reader.forwarded() for reader in readers))
            compare("charges", *(reader.charged for reader in readers))
            if watching.seen:
                raise Broken("\n".join(watching.seen))
        except (Broken, AssertionError, ValueError) as error:
            print(f"after {inputs} inputs of seed {seed}: {error}\n{pieces!r}", flush=True)
            return 1
        answers += len(lane.answers)
        for status in lane.statuses:
            statuses[status] = statuses.get(status, 0) + 1
        if inputs % 5000 == 0:
            print(f"{inputs} inputs, {answers} answers {dict(sorted(statuses.items()))}", flush=True)
    print(f"{inputs} inputs, {answers} answers {dict(sorted(statuses.items()))}: nothing found", flush=True)
    return 0


def compare(what, lane, falcon):
    if lane != falcon:
        raise Broken(f"{what} are not the same\n  lane:   {lane}\n  Falcon: {falcon}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    return uvloop.run(run(asked.minutes * 60, asked.seed))


if __name__ == "__main__":
    raise SystemExit(main())
