"""Callers who vanish at every byte, of what they say and of what they hear, and others who behave no better."""

import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import dataclass

import httpx
import pytest

from tests.e2e import storm
from tests.e2e.conftest import OUR_KEY, running
from tests.e2e.two_paths import PATHS

SEED = 21
TIMEOUT_S = 2
ENOUGH = 10**6
GARBAGE = (
    b"\0\xff\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
    b"\r\n" * 50,
)
KINDS = ("resets", "closes", "ends")


@dataclass
class Vanishing(storm.Caller):
    """A caller who vanishes.

    Attributes:
        ends: Whether it closes its own side first, and hears what there is until the server has closed, too.
        stays: Whether it says no more and waits until it is given up.
        behind: What it sends behind its request.
        cut: Where its request is cut in two.
    """

    ends: bool = False
    stays: bool = False
    behind: bytes = b""
    cut: int = 0

    async def call(self, port):
        loop = asyncio.get_running_loop()
        with socket.socket() as connection, suppress(ConnectionError):
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", port))
            said = self.request[: self.sends] + self.behind
            for piece in (said[: self.cut], said[self.cut :]):
                await loop.sock_sendall(connection, piece)
                await asyncio.sleep(0)
            await self._hear(loop, connection, ENOUGH if self.stays else self.takes)
            if self.ends:
                connection.shutdown(socket.SHUT_WR)
                await self._hear(loop, connection, ENOUGH)
            if self.resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, storm._RESET)

    @staticmethod
    async def _hear(loop, connection, most):
        """Take some bytes, or an answer if that is less."""
        data = b""
        async with asyncio.timeout(storm.PATIENCE_S):
            while len(data) < most and not (most < ENOUGH and data.endswith((b"0\r\n\r\n", b"}}"))):
                piece = await loop.sock_recv(connection, min(most - len(data), 65536))
                if not piece:
                    return
                data += piece


def crowd():
    """Yield callers: every offset of a request and of an answer, and every way to leave in turn."""
    number = 0

    def caller(*, stream=False, sends=None, takes=0, how="closes", **more):
        nonlocal number
        number += 1
        user = f"vanishing-{number:04}"
        text = {"model": f"model-of-{user}", "messages": [{"role": "user", "content": "Say hello"}]}
        body = json.dumps({**text, "max_tokens": 50, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-user-id: {user}\r\nx-request-id: {user}\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        sends = len(request) if sends is None else sends
        return Vanishing(user, stream, request, sends, takes, how == "resets", ends=how == "ends", **more)

    length = len(caller().request)
    for offset in range(length):
        yield caller(sends=offset, how=KINDS[offset % 3], cut=offset // 2)
    for offset in range(0, 420, 2):
        yield caller(takes=offset, how=KINDS[offset // 2 % 3], cut=offset)
    for offset in range(0, 900, 3):
        yield caller(stream=True, takes=offset, how=KINDS[offset // 3 % 3], cut=offset // 3)
    for stream in (False, True):
        for garbage in GARBAGE:
            for how in KINDS:
                yield caller(stream=stream, behind=garbage, takes=300, how=how)
    for offset in range(0, length, 20):
        yield caller(sends=offset, stays=True)


@pytest.mark.parametrize("path", PATHS)
def test_no_vanishing_caller_leaves_anything_behind(tmp_path, path):
    """Whoever vanishes, and wherever: it pays what the rules say, every scope the same, and nothing stays open."""
    with (
        storm.Upstream(SEED) as upstream,
        running(
            tmp_path,
            "serve",
            OPENAI_API_KEY=OUR_KEY,
            OPENAI_BASE_URL=f"http://127.0.0.1:{upstream.port}/v1",
            TOKENGUARD_FASTLANE=PATHS[path],
            TOKENGUARD_CALLER_TIMEOUT_S=TIMEOUT_S,
            **storm.SETTINGS,
        ) as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        callers = list(crowd())
        asyncio.run(storm._rage(httpx.URL(server.url).port, callers))
        after = storm.quiet(client)
        charges = storm.account(client, upstream, callers)
        assert {0, storm.USED} < set(charges)
        assert any(storm.PROMPT < charge < storm.USED for charge in charges)
        assert after["tokenguard_reservations_open"] == 0
        assert after["tokenguard_tokens_reserved_total"] + after["tokenguard_tokens_overrun_total"] == (
            after["tokenguard_tokens_settled_total"] + after["tokenguard_tokens_refunded_total"]
        )
        assert upstream.open_answers == 0
        assert client.get("/v1/nowhere").status_code == 404
