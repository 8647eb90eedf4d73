"""What a caller gets, and what it is charged, when the provider fails: each fault on both drivers."""

import re
import socket
import ssl
from itertools import repeat

import httpx
import pytest
import trustme

from tests.e2e.conftest import DRIVERS, OUR_KEY
from tests.e2e.faults import (
    BROKEN,
    CAPACITY,
    CUT,
    DONE,
    FAULTS,
    MESSAGES,
    PROMPT,
    RESERVED,
    USED,
    WHOLE,
    event,
    levels_after,
    streamed,
    usage,
)
from tests.e2e.rogue import EVENTS, LAST, Rogue, answer, chunk, head, saying
from tests.provider import full_queue


@pytest.fixture(scope="module")
def rogue():
    with Rogue() as rogue:
        yield rogue


@pytest.fixture(scope="module", params=DRIVERS)
def faced(request, rogue, tmp_path_factory):
    """A server of each driver that faces the rogue."""
    with started(request.param, tmp_path_factory.mktemp("faced"), f"http://127.0.0.1:{rogue.port}/v1") as server:
        yield server


def started(driver, folder, url):
    return DRIVERS[driver](
        folder,
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=url,
        CAP_GLOBAL="unlimited",
        CAP_TEAM=CAPACITY,
        RATE_TEAM=0,
        CAP_USER=CAPACITY,
        RATE_USER=0,
        TOKENGUARD_READ_TIMEOUT_S="1",
        TOKENGUARD_CONNECT_TIMEOUT_S="0.5",
    )


@pytest.fixture(autouse=True)
def hung_up(rogue):
    """Let no connection that is about to be closed be left for the next call, which would be lost with it."""
    yield
    rogue.hung_up()


def call(server, user, **more):
    """Return the answer to a call, read to its end, or ``CUT``."""
    body = {"model": f"model-of-{user}", "messages": MESSAGES, "max_tokens": 50, **more}
    headers = {"x-user-id": user, "x-team-id": f"team-of-{user}"}
    try:
        return server.post("/v1/chat/completions", json=body, headers=headers)
    except httpx.RemoteProtocolError:
        return CUT


def assert_charged(server, user, charged):
    """Assert that every bucket is where the oracle has it, once that much was settled for what was reserved."""
    levels = (server.level("team", f"team-of-{user}"), server.level("user", user))
    assert levels == levels_after(charged)
    assert "tokenguard_reservations_open 0.0" in httpx.get(f"{server.url}/metrics").text


def assert_answered(got, gets, code):
    if gets == CUT:
        assert got == CUT
        return
    assert got.status_code == gets
    if code is not None:
        assert got.json()["error"]["code"] == code


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault(faced, rogue, user, fault):
    """The caller gets what is due, every bucket is where the oracle has it, and the next call goes well."""
    before = len(faced.log.splitlines())
    rogue.behave = saying(fault.sent)
    assert_answered(call(faced, user, stream=fault.stream), fault.gets, fault.code)
    assert_charged(faced, user, fault.charged)
    assert len(faced.log.splitlines()) - before <= 1
    assert OUR_KEY not in faced.log
    rogue.hung_up()
    rogue.behave = saying(answer(WHOLE))
    assert call(faced, f"{user}-next").content == WHOLE


def test_error_of_the_provider_passes_whole(faced, rogue, user):
    """Status, body and fields pass; a redirect's target and cookies do not."""
    fields = ("retry-after: 7", "x-odd: \xe9", "location: http://elsewhere/", "set-cookie: a=b", "server: them")
    rogue.behave = saying(answer(b'{"error":{}}', *fields, status="429 No"))
    got = call(faced, user)
    assert (got.status_code, got.content, got.headers["retry-after"]) == (429, b'{"error":{}}', "7")
    assert got.headers["x-odd"] == "\xe9"
    assert not {"location", "set-cookie"} & set(got.headers)
    assert got.headers.get("server") != "them"


def test_provider_that_is_slow_to_answer(faced, rogue, user):
    """After the read time-out the caller gets a 504, and what was reserved stays spent."""
    rogue.behave = lambda connection: connection.recv(1)
    assert_answered(call(faced, user), 504, "upstream_timeout")
    assert_charged(faced, user, RESERVED)


def test_provider_that_falls_silent_within_a_stream(faced, rogue, user):
    """After the read time-out the stream breaks off, and what was streamed is charged."""

    def behave(connection):
        connection.sendall(streamed(event("one"), cut=True))
        connection.recv(1)

    rogue.behave = behave
    assert call(faced, user, stream=True) == CUT
    assert_charged(faced, user, PROMPT + 1)


@pytest.mark.parametrize("streams", [False, True], ids=["JSON", "stream"])
def test_answer_of_100_mb_passes_in_bounded_memory(faced, rogue, user, streams):
    """An answer of any size passes, is not kept, and is charged by its usage if that can be seen."""
    word = event("x" * 10_000)

    def behave(connection):
        pieces = repeat(word, 10_000) if streams else repeat(b" " * 10_000, 10_000)
        connection.sendall(EVENTS if streams else head("transfer-encoding: chunked"))
        for piece in pieces:
            connection.sendall(chunk(piece))
        connection.sendall(chunk(event(usage=usage()) + DONE if streams else WHOLE) + LAST)

    rogue.behave = behave
    before = memory(faced)
    body = {"model": f"model-of-{user}", "messages": MESSAGES, "max_tokens": 50, "stream": streams}
    headers = {"x-user-id": user, "x-team-id": f"team-of-{user}"}
    with httpx.stream("POST", f"{faced.url}/v1/chat/completions", json=body, headers=headers, timeout=30) as got:
        size = sum(len(piece) for piece in got.iter_raw())
    assert size > 10**8
    assert memory(faced) - before < 60 * 10**6
    assert_charged(faced, user, USED if streams else RESERVED)


def memory(server):
    """Return the bytes that the serving process occupies."""
    return float(re.search(r"\nprocess_resident_memory_bytes (\S+)", httpx.get(f"{server.url}/metrics").text)[1])


# --- no connection ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def addresses():
    """Addresses where no connection comes about, by what is wrong."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    full = full_queue()
    with Rogue(tls) as stranger, Rogue() as plain, socket.create_server(("127.0.0.1", 0)) as nobody:
        plain.behave = saying(answer(b"", status="400 Speak HTTP"))
        gone = nobody.getsockname()[1]
        nobody.close()
        yield {
            "refused": (f"http://127.0.0.1:{gone}/v1", 502, BROKEN),
            "no such name": ("http://nobody.invalid/v1", 502, BROKEN),
            "a certificate that nobody vouches for": (f"https://127.0.0.1:{stranger.port}/v1", 502, BROKEN),
            "no TLS": (f"https://127.0.0.1:{plain.port}/v1", 502, BROKEN),
            "slow to connect": (f"http://127.0.0.1:{full[0].getsockname()[1]}/v1", 504, "upstream_timeout"),
        }
    for connection in full:
        connection.close()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "fault", ["refused", "no such name", "a certificate that nobody vouches for", "no TLS", "slow to connect"]
)
def test_no_connection(driver, fault, addresses, tmp_path, user):
    """Where no connection comes about, the caller hears of it and gets all tokens back."""
    url, status, code = addresses[fault]
    with started(driver, tmp_path, url) as server:
        assert_answered(call(server, user), status, code)
        assert_charged(server, user, 0)
        assert server.log.count("the provider could not be reached") == 1
        assert OUR_KEY not in server.log
