"""What a caller's connection is given and denied: bounds on heads, an order of answers, an end of patience."""

import asyncio
import json
import socket
import threading

import httpx
import pytest

from tests.e2e.conftest import OUR_KEY, running
from tests.e2e.fake_openai import EVENTS, delta, event
from tests.e2e.test_observing import quiet
from tests.e2e.test_provider_faults import memory
from tests.e2e.two_paths import PATHS, heard
from tokenguard.server import MAX_FIELDS, MAX_HEAD_BYTES

CAPACITY = 10**6
TIMEOUT_S = 0.5


@pytest.fixture(scope="module", params=PATHS)
def served(request, upstream_url, tmp_path_factory):
    """A server that goes one of the two ways, and has little patience."""
    with running(
        tmp_path_factory.mktemp("connections"),
        "serve",
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        TOKENGUARD_FASTLANE=PATHS[request.param],
        TOKENGUARD_CALLER_TIMEOUT_S=TIMEOUT_S,
        TOKENGUARD_MAX_BODY_BYTES=1000,
        CAP_GLOBAL="unlimited",
        CAP_TEAM=CAPACITY,
        RATE_TEAM=0,
        CAP_USER=CAPACITY,
        RATE_USER=0,
    ) as server:
        yield server


def connected(server):
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10)


def request(user, *fields, body=None, **members):
    text = {"model": f"model-of-{user}", "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 50}
    body = json.dumps({**text, **members}).encode() if body is None else body
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", *fields, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def in_chunks(user, *fields, trailer=""):
    head, _, body = request(user, *fields, "transfer-encoding: chunked").partition(b"\r\n\r\n")
    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"content-length"))
    return b"%b\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n" % (head, len(body), body, trailer.encode())


def said(server, *pieces):
    """Return what the server says to pieces of bytes until it closes the connection."""
    with connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return heard(connection.makefile("rb").read(), closed=True).answers


def take(connection, count):
    """Take some answers, and leave the connection open."""
    data = b""
    while True:
        data += connection.recv(65536)
        answers = [answer for answer in heard(data, closed=False).answers if answer.whole]
        if len(answers) == count:
            return answers


CLOSE = "connection: close"


@pytest.mark.parametrize(
    "fields",
    [["x-a: " + "b" * MAX_HEAD_BYTES], ["a: b"] * MAX_FIELDS, ["x-a: " + "b" * 1000] * 70],
    ids=["a long field", "many fields", "much of both"],
)
def test_head_that_is_too_large_is_refused(served, fake, user, fields):
    """A head has bounds, in bytes and in fields; what is over them is a 431 that costs nothing."""
    (answer,) = said(served, request(user, f"x-user-id: {user}", *fields))
    assert answer.status == 431
    assert json.loads(answer.body)["error"]["code"] == "head_too_large"
    assert fake.received == []
    assert served.level("user", user) == CAPACITY


def test_head_at_its_bounds_passes(served, fake, user):
    """As many fields as may be, or a field as long as may be, do no harm."""
    for fields in (["a: b"] * (MAX_FIELDS - 4), ["x-a: " + "b" * (MAX_HEAD_BYTES - 200)]):
        (answer,) = said(served, request(user, f"x-user-id: {user}", CLOSE, *fields))
        assert answer.status == 200


def test_field_without_end_is_not_kept(served, fake):
    """Nor does a field that never ends grow for as long as somebody sends."""
    with connected(served) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nx-a: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"b" * 2**26)


@pytest.mark.parametrize("trailer", ["x-user-id: mallory\r\n", "x-team-id: mallory\r\n"])
def test_trailer_does_not_say_who_calls(served, fake, user, trailer):
    """What follows a body is no field of its head, where a proxy in front has checked who calls."""
    answers = said(
        served, in_chunks(user, trailer=trailer), in_chunks(user, f"x-user-id: {user}", CLOSE, trailer=trailer)
    )
    assert [answer.status for answer in answers] == [400, 200]
    assert b"x-user-id is required" in answers[0].body
    assert served.level("user", user) == CAPACITY - 30
    assert served.level("team", "mallory") == served.level("team", "nobody")


@pytest.mark.parametrize("first", [request, in_chunks], ids=["plain", "in chunks"])
def test_garbage_behind_a_call_is_answered_behind_it(served, fake, user, first):
    """A caller does not take the refusal of what it sent next for the answer to its call."""
    answers = said(served, first(user, f"x-user-id: {user}") + b"\0garbage\r\n\r\n")
    assert [answer.status for answer in answers] == [200, 400]


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9", "HTTP/1.2"])
def test_other_versions_are_refused(served, fake, user, version):
    """What is no HTTP/1 is a 400, and no error of ours."""
    asked = request(user, f"x-user-id: {user}").replace(b"HTTP/1.1", version.encode())
    (answer,) = said(served, asked)
    assert answer.status == 400


def test_nothing_behind_an_upgrade_is_taken_for_a_request(served, fake, user):
    """The body of a request that asks for another protocol is not read, and not as a next request either."""
    hidden = request(user, f"x-user-id: {user}")
    asked = request(user, f"x-user-id: {user}", "upgrade: h2c", "connection: upgrade", body=hidden)
    answers = said(served, asked[: -len(hidden)], hidden)
    assert [answer.status for answer in answers] == [400]
    assert fake.received == []


@pytest.mark.parametrize("first", [request, in_chunks], ids=["plain", "in chunks"])
def test_blank_lines_do_not_keep_a_connection(served, fake, user, first):
    """Whoever sends no more than blank lines after its call loses its connection."""
    with connected(served) as connection:
        connection.sendall(in_chunks(user, f"x-user-id: {user}") + first(user, f"x-user-id: {user}"))
        assert [answer.status for answer in take(connection, 2)] == [200, 200]
        connection.sendall(b"\r\n")
        assert connection.recv(1) == b""


def test_rest_of_a_refused_body_does_not_keep_a_connection(served, fake, user):
    """Whoever drips a body that has been refused loses its connection, too."""
    asked = request(user, f"x-user-id: {user}", body=b"x" * 2000)
    with connected(served) as connection:
        connection.sendall(asked[:-1000])
        assert [answer.status for answer in take(connection, 1)] == [413]
        connection.sendall(b"x")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("first", [request, in_chunks], ids=["plain", "in chunks"])
def test_stream_ends_with_its_caller_though_another_request_waits(served, fake, user, first):
    """A caller who has sent its next request already and hangs up is gone: the provider's stream is cut."""
    ended = threading.Event()

    async def script(reply):
        gone = asyncio.create_task(reply.until_gone())
        await reply.head(headers=EVENTS)
        await reply.piece(event(reply.received, delta("word")))
        await gone
        ended.set()

    fake.script = script
    asked = first(user, f"x-user-id: {user}").replace(b'"max_tokens": 50', b'"stream":   true')
    with connected(served) as connection:
        connection.sendall(asked + asked)
        assert connection.recv(1)
    assert ended.wait(5)
    assert quiet(served)["tokenguard_reservations_open"] == 0


def test_answers_that_nobody_takes_are_not_piled_up(served, fake):
    """Whoever sends requests without end and takes no answer is not read on."""
    before = memory(served)
    with connected(served) as connection:
        connection.settimeout(TIMEOUT_S)
        with pytest.raises((TimeoutError, ConnectionError)):
            connection.sendall(request("nobody", body=b"") * 10**6)
        assert memory(served) - before < 30 * 2**20
