"""Requests that mean no good: each is refused in the usual shape, costs nothing, reaches nobody, leaks nothing."""

import json
import socket

import httpx
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY, THEIR_KEY

CAPACITY = 10**6
ADMIN = "let-me-in-0123"
MESSAGES = [{"role": "user", "content": "Say hello"}]
GOOD = {"model": "m", "messages": MESSAGES}


@pytest.fixture(scope="module", params=DRIVERS)
def guarded(request, upstream_url, tmp_path_factory):
    """A server of each driver with an admin token and fixed grants, which logs calls."""
    with DRIVERS[request.param](
        tmp_path_factory.mktemp("hostile"),
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        TOKENGUARD_ADMIN_TOKEN=ADMIN,
        TOKENGUARD_LOG_CALLS="on",
        TOKENGUARD_MAX_BODY_BYTES=2 * 10**6,
        CAP_GLOBAL=CAPACITY,
        RATE_GLOBAL=0,
        CAP_USER=CAPACITY,
        RATE_USER=0,
    ) as server:
        server.driver = request.param
        yield server


def level(server, scope):
    headers = {"authorization": f"Bearer {ADMIN}"}
    return httpx.get(f"{server.url}/config/budget/{scope}", headers=headers).json()["level"]


def body(**members):
    return json.dumps({**GOOD, **members}).encode()


def raw(text):
    """Return a body with ``text`` as a further member."""
    return json.dumps(GOOD).encode()[:-1] + b"," + text + b"}"


BODIES = {
    "nothing": b"",
    "white space": b" \n",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"model"',
    "half of it": body()[:-5],
    "two documents": body() * 2,
    "a trailing comma": body()[:-1] + b",}",
    "NaN": raw(b'"temperature":NaN'),
    "Infinity": raw(b'"temperature":-Infinity'),
    "a NUL": raw(b'"x":"\0"'),
    "no UTF-8": raw(b'"x":"\xff"'),
    "a surrogate as UTF-8": raw(b'"x":"\xed\xa0\x80"'),
    "UTF-16": body().decode().encode("utf-16"),
    "an octet mark": b"\xef\xbb\xbf" + body(),
    "model twice": raw(b'"model":"n"'),
    "model twice, escaped": raw(b'"mod\\u0065l":"n"'),
    "n twice": raw(b'"n":1,"n":128'),
    "a member of a message twice": b'{"model":"m","messages":[{"role":"user","content":"a","content":"b"}]}',
    "include_usage twice": raw(b'"stream":true,"stream_options":{"include_usage":true,"include_usage":false}'),
    "Max_Tokens": raw(b'"Max_Tokens":1'),
    "deep lists": raw(b'"x":' + b"[" * 100_000 + b"]" * 100_000),
    "deep objects": raw(b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep lists without end": raw(b'"x":' + b"[" * 500_000),
    "no model": json.dumps({"messages": MESSAGES}).encode(),
    "no messages": b'{"model":"m"}',
    "a lone surrogate in the model": b'{"model":"\\ud800","messages":[]}',
    "a lone surrogate in a message": b'{"model":"m","messages":[{"content":"\\ud800"}]}',
    "a NUL in the model": b'{"model":"a\\u0000b","messages":[]}',
    "a separator in the model": b'{"model":"a\\u001fb","messages":[]}',
    "an empty model": body(model=""),
    "a model that is too long": body(model="m" * 257),
    "a model that is too long in bytes": body(model="\u20ac" * 86),
    "a model that is a number": body(model=1),
    "messages that are text": body(messages="hello"),
    "messages that are an object": body(messages={"role": "user"}),
    "stream that is text": body(stream="true"),
    "stream that is a number": body(stream=1),
    "stream_options that are a list": body(stream=True, stream_options=[]),
    "include_usage that is text": body(stream=True, stream_options={"include_usage": "no"}),
    **{f"n {value}": body(n=value) for value in (0, -1, 129, 10**18, 1.5, "5", True, [], {})},
    **{
        f"max_tokens {value}": body(max_tokens=value) for value in (0, -1, 10**9 + 1, 10**18, 0.5, "5", False, [1])
    },
    "max_tokens 1e400": raw(b'"max_tokens":1e400'),
    "max_tokens of 5000 digits": raw(b'"max_tokens":' + b"9" * 5000),
    "max_completion_tokens -1 beside max_tokens": body(max_tokens=5, max_completion_tokens=-1),
    "max_tokens -1 beside max_completion_tokens": body(max_tokens=-1, max_completion_tokens=5),
    "a prompt for which no budget is large enough": body(messages=[{"role": "user", "content": "x" * 10**6 * 9}]),
}


def refused(server, fake, content, headers):
    """Send a request that must be refused; return the answer."""
    before, lines = level(server, "global"), len(server.log.splitlines())
    answer = server.post("/v1/chat/completions", content=content, headers=headers)
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert level(server, "global") == before
    assert fake.received == []
    assert len(server.log.splitlines()) - lines <= 1
    assert_no_secret(server, answer.text)
    return answer


def assert_no_secret(server, text):
    for secret in (OUR_KEY, THEIR_KEY, ADMIN):
        assert secret not in text + server.log


@pytest.mark.parametrize("name", BODIES)
def test_hostile_body_is_refused(guarded, fake, user, name):
    """What is no call is a 4xx that charges nobody, whatever is wrong with it."""
    answer = refused(guarded, fake, BODIES[name], {"x-user-id": user, "authorization": f"Bearer {THEIR_KEY}"})
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize("header", ["x-user-id", "x-team-id", "x-role", "x-llm-rolegroup"])
@pytest.mark.parametrize(
    "value",
    [b"", b"a" * 257, "\u20ac".encode() * 86, b"\xff", b"\xed\xa0\x80", b"a\tb", "a\x85b".encode()],
    ids=[
        "empty",
        "too long",
        "too long in bytes",
        "no UTF-8",
        "a surrogate",
        "a tab",
        "a control character",
    ],
)
def test_identity_that_cannot_be_is_refused(guarded, fake, user, header, value):
    """An id is 1 to 256 bytes of UTF-8 without control characters."""
    answer = refused(guarded, fake, body(), {"x-user-id": user, header: value})
    assert answer.json()["error"]["param"] == header


@pytest.mark.parametrize(
    "value", [b"a" * 256, "\u20ac".encode() * 85 + b"a", b"a b", b"../..", b"*", b"%00", b"'--"]
)
def test_identity_at_the_bound_is_somebody(guarded, fake, value):
    """Whatever is within the bounds names somebody, to the byte."""
    answer = guarded.post("/v1/chat/completions", content=body(), headers={"x-user-id": value})
    assert answer.status_code == 200


@pytest.mark.parametrize("header", ["x-user-id", "x-team-id", "x-role", "x-llm-rolegroup"])
def test_identity_that_is_given_twice_is_refused(guarded, fake, user, header):
    """Who sets a header behind a caller who sent it already does not make somebody new of the two."""
    headers = [("x-user-id", user), (header, "alice"), (header, "mallory")]
    answer = refused(guarded, fake, body(), headers)
    assert answer.json()["error"]["param"] in (header, "x-user-id")


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity", "x, gzip"])
def test_body_with_an_encoding_is_refused(guarded, fake, user, encoding):
    """What would have to be unpacked to be read is not read."""
    assert refused(guarded, fake, body(), {"x-user-id": user, "content-encoding": encoding}).status_code == 415


def test_both_caps_may_stand_side_by_side(guarded, fake, user):
    """With both caps the larger one is reserved, and no way of writing null or a whole number is an error."""
    content = raw(b'"max_tokens":5.0,"max_completion_tokens":1e1,"n":null,"stream":null,"stream_options":null')
    assert guarded.post("/v1/chat/completions", content=content, headers={"x-user-id": user}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/../v1/chat/completions",
        "/V1/chat/completions",
        "/%00",
    ],
)
def test_other_ways_to_write_a_path_are_not_served(guarded, fake, user, path):
    """Only the very path is the call's; what is not there is a 404 in the usual shape."""
    answer = exchange(guarded, f"POST {path}?key=secret-{user} HTTP/1.1", body())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert fake.received == []
    assert f"secret-{user}" not in guarded.log


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "CONNECT", "FOO"])
def test_other_methods_are_not_served(guarded, fake, method):
    """A call is a POST, whatever a header says that it is meant to be."""
    answer = exchange(guarded, f"{method} /v1/chat/completions HTTP/1.1", b"", "x-http-method-override: POST")
    assert answer[9:12] in (b"400", b"405", b"501")
    assert fake.received == []


@pytest.mark.parametrize(
    "fields",
    [
        ("content-length: 10", "transfer-encoding: chunked"),
        ("content-length: 3", "content-length: 4"),
        ("content-length: -1",),
        ("content-length: x",),
        ("transfer-encoding: chunked, gzip",),
        ("x-user-id : spaced",),
        ("x-broken\x00: 1",),
    ],
    ids=str,
)
def test_head_that_two_servers_may_read_differently_is_refused(guarded, fake, fields):
    """Nothing that could smuggle a request is taken for one."""
    before = level(guarded, "global")
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-user-id: u\r\n" + "\r\n".join(fields)
    with connected(guarded) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or answer[9:10] in (b"4", b"5")
    assert b"HTTP/1.1 200" not in answer
    assert fake.received == []
    assert level(guarded, "global") == before


def exchange(server, line, content, *fields):
    """Send a request as it is written; return the whole answer."""
    head = [line, "host: x", "x-user-id: u", "connection: close", f"content-length: {len(content)}", *fields]
    with connected(server) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
        return connection.makefile("rb").read()


def connected(server):
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10)


def test_line_of_a_hostile_call_is_one_line(guarded, fake):
    """Whatever a caller is called, its call's line in the log is one, and cannot be taken for another."""
    before = len(guarded.log.splitlines())
    users = ["\u2028ERROR fake", "a b=c", 'quo"te', "\u202egnp"]
    for user in users:
        content = json.dumps({**GOOD, "model": f"m {user}"}).encode()
        guarded.post("/v1/chat/completions", content=content, headers={"x-user-id": user.encode()})
    guarded.post("/v1/chat/completions", content=body(), headers={"x-user-id": "last"})
    lines = guarded.log.split("\n")[:-1]
    assert before + len(users) <= len(lines) <= before + len(users) + 1
    assert all(line.isascii() for line in lines)
