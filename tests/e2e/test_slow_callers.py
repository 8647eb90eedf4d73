"""Callers who stall: with half a request, or with an answer that they do not take."""

import asyncio
import json
import socket
import threading

import httpx
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY, running
from tests.e2e.fake_openai import EVENTS, delta, event
from tests.e2e.test_observing import quiet, series

MESSAGES = [{"role": "user", "content": "Say hello"}]
PROMPT = 9
CAPACITY = 10**6
WORD = "x" * 40_000
MOST_BYTES = 32 * 2**20
"""More than all buffers between the provider and a caller hold: the kernel's of two connections, and ours."""


def serving(folder, upstream_url, **settings):
    fixed = {"CAP_USER": CAPACITY, "RATE_USER": 0, "CAP_GLOBAL": "unlimited", "CAP_TEAM": "unlimited"}
    keys = {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": upstream_url}
    return running(folder, "serve", **keys, **fixed, **settings)


def request(user, **more):
    """Return a whole request as bytes."""
    body = json.dumps({"model": f"model-of-{user}", "messages": MESSAGES, "max_tokens": 50, **more}).encode()
    fields = f"host: x\r\nx-user-id: {user}\r\ncontent-length: {len(body)}\r\n\r\n"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{fields}".encode(), body


def connected(server):
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10)


@pytest.fixture
def endless(fake):
    """Makes the provider stream without end; tells how many bytes it could send, and how many streams ended."""

    class Endless:
        bytes_sent = 0
        ended = threading.Semaphore(0)

    async def script(reply):
        if not reply.received.json.get("stream"):
            return await fake.answer(reply)
        piece = event(reply.received, delta(WORD))
        await reply.head(headers=EVENTS)
        gone = asyncio.create_task(reply.until_gone())
        while not gone.done() and Endless.bytes_sent < MOST_BYTES:
            await reply.piece(piece)
            await asyncio.sleep(0)
            Endless.bytes_sent += len(piece)
        await gone
        Endless.ended.release()
        return None

    fake.script = script
    return Endless


def test_stalled_reader_holds_the_provider_back_and_is_given_up(tmp_path, fake, upstream_url, endless, user):
    """A stream that nobody takes is not read from the provider either; then it ends, and what came is charged."""
    with serving(tmp_path, upstream_url, TOKENGUARD_CALLER_TIMEOUT_S=1) as server:
        before = series_of_process(server)
        with connected(server) as connection:
            connection.sendall(b"".join(request(user, stream=True)))
            assert endless.ended.acquire(timeout=10)
            assert endless.bytes_sent < MOST_BYTES
            assert series_of_process(server) - before < 20 * 2**20
            quiet(server)
            words = (CAPACITY - server.level("user", user) - PROMPT) / (len(WORD) // 4)
            assert 1 <= words == int(words) <= endless.bytes_sent // len(WORD) + 1
        assert server.log.count("the caller took nothing for 1 s; its connection was closed") == 1


def series_of_process(server):
    text = httpx.get(f"{server.url}/metrics").text
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("process_resident_memory_b")
    )


def test_stalled_readers_do_not_starve_others(tmp_path, fake, upstream_url, endless, user):
    """Whoever holds all connections to the provider and takes nothing loses them to those who wait."""
    patience = {"TOKENGUARD_CALLER_TIMEOUT_S": "0.5", "TOKENGUARD_QUEUE_TIMEOUT_S": 10}
    with serving(tmp_path, upstream_url, TOKENGUARD_MAX_CONNECTIONS=2, **patience) as server:
        stalled = [connected(server) for _ in range(2)]
        for connection in stalled:
            connection.sendall(b"".join(request(user, stream=True)))
            assert connection.recv(1)
        answer = server.client(user).chat.completions.create(model="m", messages=MESSAGES)
        assert answer.usage.total_tokens == 30
        for connection in stalled:
            connection.close()
        assert quiet(server)["tokenguard_reservations_open"] == 0


@pytest.mark.parametrize(("sent", "route"), [(0, "other"), (10, "/v1/chat/completions")])
def test_half_a_body_is_answered_408_and_costs_nothing(tmp_path, fake, upstream_url, user, sent, route):
    """A body that does not come to its end in time is refused, be it that nothing or something of it came."""
    with (
        serving(tmp_path, upstream_url, TOKENGUARD_CALLER_TIMEOUT_S="0.3") as server,
        connected(server) as connection,
    ):
        head, body = request(user)
        connection.sendall(head + body[:sent])
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert b"\r\nx-request-id: " in answer
        assert server.level("user", user) == CAPACITY
        assert fake.received == []
        assert quiet(server)["tokenguard_reservations_open"] == 0
        assert series(server)[f'tokenguard_requests_total{{route="{route}",status="408"}}'] == 1


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_breaks_off_is_nobodys_call(driver, tmp_path, fake, upstream_url, user, chunked):
    """A request that is cut is not forwarded, even if what came of it can be read."""
    settings = {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": upstream_url, "CAP_USER": CAPACITY, "RATE_USER": 0}
    with DRIVERS[driver](tmp_path, **settings) as server:
        head, body = request(user)
        length = b"content-length: %d" % len(body)
        if chunked:
            head = head.replace(length, b"transfer-encoding: chunked")
            body = b"%x\r\n%s\r\n" % (len(body), body)
        else:
            head = head.replace(length, b"content-length: %d" % (len(body) + 1))
        with connected(server) as connection:
            connection.sendall(head + body)
            connection.shutdown(socket.SHUT_WR)
            connection.makefile("rb").read()
        quiet(server)
        assert series(server).get('tokenguard_requests_total{route="/v1/chat/completions",status="200"}') is None
        assert server.level("user", user) == CAPACITY
        assert fake.received == []
        assert server.log == ""
