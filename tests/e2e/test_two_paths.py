"""The fast lane and Falcon are one server to callers: the same bytes get the same answers, charges and counts."""

import asyncio
import gzip
import itertools
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.e2e.two_paths import (
    DONE,
    MAX_BODY_BYTES,
    TOLD,
    WHOLE,
    WORD,
    agree,
    assert_equal,
    assert_same,
    both,
    chunked,
    converse,
    said,
    told_by_both,
)

EXAMPLES = int(os.environ.get("TOKENGUARD_TEST_EXAMPLES", "0"))
"""How many times to hold ten random conversations; by default 15, always the same ones."""

_numbers = itertools.count(1)

ERROR = b'{"error":{"message":"no"}}'
TYPELESS = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
SAYINGS = {
    b"whole": (said(WHOLE), False),
    b"whole, then closes": (said(WHOLE, b"connection: close"), True),
    b"until closed": (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + WHOLE, True),
    b"in chunks": (chunked(WHOLE[:7], WHOLE[7:], fields=(b"content-type: application/json",)), False),
    b"no type": (TYPELESS, False),
    b"an empty type": (said(WHOLE, kind=b""), False),
    b"nothing": (said(), False),
    b"204": (b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n", False),
    b"204 with a length": (b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", False),
    b"304": (b"HTTP/1.1 304 Not Modified\r\netag: 1\r\n\r\n", False),
    b"205": (b"HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n", False),
    b"299": (said(WHOLE, status=b"299 Odd"), False),
    b"599": (said(ERROR, status=b"599 Odd"), False),
    b"799": (said(ERROR, status=b"799 Odd"), False),
    b"101": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", False),
    b"100 first": (b"HTTP/1.1 100 Continue\r\n\r\n" + said(WHOLE), False),
    b"103 first": (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + said(WHOLE), False),
    b"fields twice": (said(WHOLE, b"x-a: 1", b"x-a: 2", b"x-b: ", b"X-C:3", b"vary: a", b"Vary: b"), False),
    b"types twice": (said(WHOLE, b"content-type: text/plain"), False),
    b"odd values": (said(WHOLE, b"x-a: \xe9\xff", b"x-b: a\tb", b"x-c: \xe2\x82\xac"), False),
    b"hop by hop": (
        said(WHOLE, b"keep-alive: timeout=5", b"set-cookie: a=b", b"date: then", b"server: them", b"te: x"),
        False,
    ),
    b"our fields": (
        said(WHOLE, b"x-request-id: theirs", b"x-ratelimit-limit-tokens: 7", b"retry-after: 3"),
        False,
    ),
    b"gzip": (said(gzip.compress(WHOLE, mtime=0), b"content-encoding: gzip"), False),
    b"damaged gzip": (said(b"\x1f\x8bdamaged!", b"content-encoding: gzip"), False),
    b"br": (said(b"\x0b\x02\x80{}\x03", b"content-encoding: br"), False),
    b"no JSON": (said(b"<html>"), False),
    b"cut": (said(WHOLE, length=len(WHOLE) + 1), True),
    b"cut chunks": (chunked(WHOLE[:9], fields=(b"content-type: application/json",), last=b""), True),
    b"bad chunks": (chunked(fields=(), last=b"zz\r\n"), True),
    b"a word too many": (said(WHOLE) + b"x", False),
    b"no HTTP": (b"what?\r\n\r\n", True),
    b"no word": (b"", True),
    b"two lengths": (said(WHOLE, b"content-length: 1"), True),
    b"a stream": (chunked(WORD, WORD, TOLD, DONE), False),
    b"a stream in one": (said(WORD + TOLD + DONE, kind=b"text/event-stream"), False),
    b"a stream without usage": (chunked(WORD, WORD, DONE), False),
    b"an empty stream": (chunked(), False),
    b"a cut stream": (chunked(WORD, WORD, last=b""), True),
    b"a stream cut at once": (chunked(last=b""), True),
    b"a stream until closed": (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + WORD + DONE, True),
    b"a stream with a trailer": (chunked(WORD, TOLD, DONE, last=b"0\r\nx-a: 1\r\n\r\n"), False),
    b"a 100 kB stream": (chunked(*[WORD] * 1400, TOLD, DONE), False),
    **{
        b"%d" % status: (said(ERROR, b"retry-after: 7", status=b"%d No" % status), False)
        for status in (301, 400, 401, 403, 404, 409, 418, 422, 429, 500, 502, 503)
    },
}
"""What the provider can be made to say, and whether it hangs up then."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    with both(tmp_path_factory.mktemp("paths"), SAYINGS) as paths:
        yield paths


def body_of(name, /, **members):
    text = {"model": f"model-of-{name}", "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 50}
    return json.dumps({**text, **members}).encode()


def chat(name, /, *fields, body=None, line=b"POST /v1/chat/completions HTTP/1.1", length=True, **members):
    """Return a request as bytes; ``length`` tells whether it says how long its body is."""
    body = body_of(name, **members) if body is None else body
    lines = [line, b"host: x", b"x-user-id: %b" % name.encode(), *fields]
    lines += [b"content-length: %d" % len(body)] if length else []
    return b"\r\n".join([*lines, b"", body])


def in_chunks(name, /, *fields, extension=b"", trailer=b"", last=b"0\r\n", **members):
    body = body_of(name, **members)
    pieces = (body[:10], body[10:])
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return chat(name, b"transfer-encoding: chunked", *fields, body=data + last + trailer + b"\r\n", length=False)


# --- what the provider says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("saying", SAYINGS, ids=bytes.decode)
def test_answer_of_the_provider_passes_the_same_way(paths, user, saying, stream):
    """Whatever the provider says, callers on both paths are told the same and pay the same, one call or two."""
    asked = chat(user, b"x-says: " + saying, stream=stream)
    assert_same(paths, [asked], user)
    assert_same(paths, [asked + asked], user)


# --- what callers say ---------------------------------------------------------------------------------------

GET = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n"
REQUESTS = {
    "plain": chat,
    "a stream": lambda user: chat(user, stream=True),
    "a stream with usage": lambda user: chat(user, stream=True, stream_options={"include_usage": True}),
    "an id": lambda user: chat(user, b"x-request-id: mine-1"),
    "an id twice": lambda user: chat(user, b"x-request-id: a", b"x-request-id: b"),
    "an odd id": lambda user: chat(user, b"x-request-id: a b"),
    "an empty id": lambda user: chat(user, b"x-request-id:"),
    "a long id": lambda user: chat(user, b"x-request-id: " + b"a" * 129),
    "all identities": lambda user: chat(user, b"x-team-id: t", b"x-role: r", b"x-llm-rolegroup: g"),
    "the user twice": lambda user: chat(user, b"x-user-id: mallory"),
    "no user": lambda user: chat(user).replace(b"x-user-id", b"x-nobody"),
    "an empty user": lambda user: chat(user).replace(b"x-user-id: " + user.encode(), b"x-user-id:"),
    "a user of no UTF-8": lambda user: chat(user, b"x-team-id: \xff"),
    "a user with spaces around": lambda user: chat(user, b"x-team-id: \t t \t"),
    "odd spelling": lambda user: chat(user).replace(b"x-user-id", b"X-USER-id").replace(b"host", b"HoSt"),
    "odd length": lambda user: chat(user).replace(b"content-length", b"CONTENT-LENGTH"),
    "no space behind colons": lambda user: chat(user).replace(b": ", b":", 3),
    "many spaces behind colons": lambda user: chat(user, b"x-a: \t  b"),
    "trailing spaces": lambda user: chat(user, b"x-a: b  \t"),
    "spaces behind the length": lambda user: chat(user).replace(b"\r\n\r\n", b" \r\n\r\n"),
    "empty values": lambda user: chat(user, b"x-a:", b"x-b: ", b"x-c:"),
    "no text": lambda user: chat(user, b"x-a: \xe9\xff\x80"),
    "underscores": lambda user: chat(user, b"x_user_id: mallory"),
    "all token characters": lambda user: chat(user, b"!#$%&'*+-.^_`|~09aZ: 1"),
    "close": lambda user: chat(user, b"connection: close"),
    "Close": lambda user: chat(user, b"Connection: Close"),
    "close among others": lambda user: chat(user, b"connection: x, close ,y"),
    "close in a second field": lambda user: chat(user, b"connection: x", b"connection: close"),
    "keep-alive and close": lambda user: chat(user, b"connection: keep-alive, close"),
    "keep-alive": lambda user: chat(user, b"connection: keep-alive"),
    "closed": lambda user: chat(user, b"connection: closed"),
    "close, then more": lambda user: chat(user, b"connection: close") + chat(user),
    "close, then garbage": lambda user: chat(user, b"connection: close") + b"\0garbage\r\n\r\n",
    "HTTP/1.0": lambda user: chat(user, line=b"POST /v1/chat/completions HTTP/1.0"),
    "HTTP/1.0 that keeps": lambda user: chat(
        user, b"connection: keep-alive", line=b"POST /v1/chat/completions HTTP/1.0"
    ),
    "HTTP/1.2": lambda user: chat(user, line=b"POST /v1/chat/completions HTTP/1.2"),
    "HTTP/2.0": lambda user: chat(user, line=b"POST /v1/chat/completions HTTP/2.0"),
    "http/1.1": lambda user: chat(user, line=b"POST /v1/chat/completions http/1.1"),
    "no version": lambda user: chat(user, line=b"POST /v1/chat/completions"),
    "two spaces": lambda user: chat(user, line=b"POST  /v1/chat/completions HTTP/1.1"),
    "a space in front": lambda user: chat(user, line=b" POST /v1/chat/completions HTTP/1.1"),
    "blank lines in front": lambda user: b"\r\n\r\n" + chat(user),
    "blank lines in between": lambda user: chat(user) + b"\r\n\r\n\r\n" + chat(user) + b"\r\n" + chat(user),
    "post": lambda user: chat(user, line=b"post /v1/chat/completions HTTP/1.1"),
    "absolute form": lambda user: chat(user, line=b"POST http://x/v1/chat/completions HTTP/1.1"),
    "absolute form of elsewhere": lambda user: chat(user, line=b"POST http://y:1/v1/chat/completions HTTP/1.1"),
    "a query": lambda user: chat(user, line=b"POST /v1/chat/completions?a=b HTTP/1.1"),
    "an empty query": lambda user: chat(user, line=b"POST /v1/chat/completions? HTTP/1.1"),
    "a fragment": lambda user: chat(user, line=b"POST /v1/chat/completions#a HTTP/1.1"),
    "an escaped path": lambda user: chat(user, line=b"POST /v1/chat%2fcompletions HTTP/1.1"),
    "an escaped letter": lambda user: chat(user, line=b"POST /v1/ch%61t/completions HTTP/1.1"),
    "dots": lambda user: chat(user, line=b"POST /v1/../v1/chat/completions HTTP/1.1"),
    "a slash behind": lambda user: chat(user, line=b"POST /v1/chat/completions/ HTTP/1.1"),
    "a path of no text": lambda user: chat(user, line=b"POST /v1/chat/completions\xff HTTP/1.1"),
    "a star": lambda user: chat(user, line=b"OPTIONS * HTTP/1.1"),
    "CONNECT": lambda _: b"CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\n\r\n",
    **{
        f"{method} instead": lambda user, method=method: chat(
            user, line=f"{method} /v1/chat/completions HTTP/1.1".encode()
        )
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "PRI")
    },
    "HEAD": lambda _: b"HEAD /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "404": lambda user: chat(user, line=b"POST /v1/completions HTTP/1.1"),
    "models": lambda _: b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "Expect": lambda user: chat(user, b"expect: 100-continue"),
    "an odd Expect": lambda user: chat(user, b"expect: something"),
    "Upgrade": lambda user: chat(user, b"upgrade: h2c", b"connection: upgrade"),
    "Upgrade alone": lambda user: chat(user, b"upgrade: websocket"),
    "Upgrade, then more": lambda user: chat(user, b"upgrade: h2c", b"connection: upgrade") + chat(user),
    "GET with Upgrade, then more": lambda user: (
        b"GET /nowhere HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n" + chat(user)
    ),
    "no host": lambda user: chat(user).replace(b"host: x\r\n", b""),
    "two hosts": lambda user: chat(user, b"host: y"),
    "an empty host": lambda user: chat(user).replace(b"host: x", b"host:"),
    "an odd host": lambda user: chat(user).replace(b"host: x", b"host: a/b@c d"),
    "a continued line": lambda user: chat(user, b"x-a: b\r\n c"),
    "a continued line of the length": lambda user: chat(user).replace(
        b"content-length: ", b"content-length:\r\n "
    ),
    "bare LF in the head": lambda user: chat(user).replace(b"\r\nx-user", b"\nx-user"),
    "bare LF everywhere": lambda user: chat(user).replace(b"\r\n", b"\n"),
    "bare LF at the end": lambda user: chat(user).replace(b"\r\n\r\n", b"\r\n\n"),
    "bare CR": lambda user: chat(user, b"x-a: b\rx-b: c"),
    "bare CR before a line's end": lambda user: chat(user, b"x-a: b\r"),
    "a space before the colon": lambda user: chat(user, b"x-a : b"),
    "a tab before the colon": lambda user: chat(user, b"x-a\t: b"),
    "no colon": lambda user: chat(user, b"x-a"),
    "no name": lambda user: chat(user, b": b"),
    "NUL in a value": lambda user: chat(user, b"x-a: b\0c"),
    "NUL in a name": lambda user: chat(user, b"x-\0a: b"),
    "NUL in the line": lambda user: chat(user, line=b"POST /v1/chat/completions\0 HTTP/1.1"),
    "control bytes in a value": lambda user: chat(user, b"x-a: \x01\x1f"),
    "DEL in a value": lambda user: chat(user, b"x-a: b\x7f"),
    "an odd name": lambda user: chat(user, b"x\xe9: b"),
    "a name with brackets": lambda user: chat(user, b"x(a): b"),
    "a long name": lambda user: chat(user, b"a" * 255 + b": b"),
    "a longer name": lambda user: chat(user, b"a" * 256 + b": b"),
    "a very long name": lambda user: chat(user, b"a" * 3000 + b": b"),
    "a long value": lambda user: chat(user, b"x-a: " + b"b" * 15_000),
    "a longer value": lambda user: chat(user, b"x-a: " + b"b" * 17_000),
    "a very long value": lambda user: chat(user, b"x-a: " + b"b" * 70_000),
    "many fields": lambda user: chat(user, *(b"x-%d: 1" % i for i in range(250))),
    "as many fields as may be": lambda user: chat(user, *(b"x-%d: 1" % i for i in range(253))),
    "a field too many": lambda user: chat(user, *(b"x-%d: 1" % i for i in range(254))),
    "a field too many behind a broken answer": lambda user: (
        chat(user, b"x-says: no HTTP") + chat(user, *(b"x-%d: 1" % i for i in range(254)))
    ),
    "a bomb of fields": lambda user: chat(user, *(b"a: 1" for _ in range(9000))),
    "a long target": lambda user: chat(user, line=b"POST /%b HTTP/1.1" % (b"a" * 70_000)),
    "no length": lambda user: chat(user, length=False),
    "an empty length": lambda user: chat(user, b"content-length:", length=False),
    "a length of zero": lambda user: chat(user, body=b""),
    "a length of zeros": lambda user: chat(user).replace(b"content-length: ", b"content-length: 0000"),
    "a length of many zeros": lambda user: chat(user).replace(
        b"content-length: ", b"content-length: " + b"0" * 30
    ),
    "the length twice": lambda user: chat(user, b"content-length: %d" % len(body_of(user))),
    "two lengths": lambda user: chat(user, b"content-length: 1"),
    "a list of lengths": lambda user: chat(user).replace(b"content-length: ", b"content-length: 5, "),
    "a signed length": lambda user: chat(user).replace(b"content-length: ", b"content-length: +"),
    "a negative length": lambda user: chat(user).replace(b"content-length: ", b"content-length: -"),
    "a length in hex": lambda user: chat(user).replace(b"content-length: ", b"content-length: 0x"),
    "a length with a space": lambda user: chat(user, b"content-length: 1 2", length=False),
    "a length with a point": lambda user: chat(user, b"content-length: 5.0", length=False),
    "a length beyond 64 bits": lambda user: chat(user, b"content-length: 18446744073709551620", length=False),
    "a length that is too large": lambda user: chat(user, b"content-length: 999999", length=False),
    "chunks": in_chunks,
    "chunks with extensions": lambda user: in_chunks(user, extension=b';a=b;c="d e"'),
    "chunks with a huge extension": lambda user: in_chunks(user, extension=b";" + b"a" * 60_000),
    "chunks with a trailer": lambda user: in_chunks(user, trailer=b"x-a: b\r\n"),
    "chunks that name the user last": lambda user: in_chunks(user, trailer=b"x-user-id: mallory\r\n"),
    "chunks that name a team last": lambda user: in_chunks(user, trailer=b"x-team-id: mallory\r\n") + chat(user),
    "chunks with a bomb of trailers": lambda user: in_chunks(user, trailer=b"a: b\r\n" * 20_000),
    "Chunked": lambda user: in_chunks(user).replace(b": chunked", b": Chunked"),
    "chunked twice": lambda user: in_chunks(user, b"transfer-encoding: chunked"),
    "chunked, chunked": lambda user: in_chunks(user).replace(b": chunked", b": chunked, chunked"),
    "gzip, chunked": lambda user: in_chunks(user).replace(b": chunked", b": gzip, chunked"),
    "chunked, gzip": lambda user: in_chunks(user).replace(b": chunked", b": chunked, gzip"),
    "identity": lambda user: in_chunks(user).replace(b": chunked", b": identity"),
    "xchunked": lambda user: in_chunks(user).replace(b": chunked", b": xchunked"),
    "chunked with a vertical tab": lambda user: in_chunks(user).replace(b": chunked", b": \x0bchunked"),
    "chunked and a length": lambda user: in_chunks(user, b"content-length: 5"),
    "a length and chunked": lambda user: in_chunks(user).replace(b"transfer", b"content-length: 9\r\ntransfer"),
    "chunked with a space before the colon": lambda user: in_chunks(user).replace(b"encoding:", b"encoding :"),
    "chunked over HTTP/1.0": lambda user: in_chunks(user).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a chunk of no size": lambda user: in_chunks(user, last=b"\r\n"),
    "a chunk of a negative size": lambda user: in_chunks(user, last=b"-1\r\n"),
    "a chunk in 0x": lambda user: in_chunks(user, last=b"0x0\r\n"),
    "chunks with bare LF": lambda user: in_chunks(user, last=b"0\n"),
    "415": lambda user: chat(user, b"content-encoding: gzip"),
    "415, empty": lambda user: chat(user, b"content-encoding:"),
    "413": lambda user: chat(user, body=b"x" * (MAX_BODY_BYTES + 1)),
    "just not 413": lambda user: chat(user, user="x" * (MAX_BODY_BYTES - len(body_of(user, user="")))),
    "413 in chunks": lambda user: in_chunks(user, user="x" * MAX_BODY_BYTES),
    "413, then more": lambda user: chat(user, body=b"x" * (MAX_BODY_BYTES + 1)) + chat(user),
    "no JSON": lambda user: chat(user, body=b"what"),
    "no call": lambda user: chat(user, body=b"{}"),
    "null": lambda user: chat(user, body=b"null"),
    "half of a call": lambda user: chat(user, body=body_of(user)[:-3]),
    "no model": lambda user: chat(user, model=None),
    "an odd stream": lambda user: chat(user, stream="yes"),
    "429": lambda user: chat(user, max_tokens=2000),
    "429, streamed": lambda user: chat(user, max_tokens=2000, stream=True),
    "429 and what fits": lambda user: chat(user, max_tokens=2000) + chat(user),
    "calls until 429": lambda user: chat(user, max_tokens=900) * 4,
    "a type": lambda user: chat(user, b"content-type: text/plain"),
    "what is not passed on": lambda user: chat(
        user, b"authorization: Bearer x", b"cookie: a", b"te: trailers", b"via: x", b"x-http-method-override: GET"
    ),
    "two calls": lambda user: chat(user) * 2,
    "nine calls": lambda user: chat(user) * 9,
    "calls and more": lambda user: chat(user) + GET + chat(user, stream=True) + GET + in_chunks(user) + chat(user),
    "more and calls": lambda user: GET + GET + chat(user) + b"GET /nowhere HTTP/1.1\r\n\r\n" + chat(user),
    "refusals and calls": lambda user: chat(user, body=b"") + chat(user) + chat(user, body=b"[]") + chat(user),
    "garbage": lambda _: b"\x16\x03\x01garbage\r\n\r\n",
    "garbage behind a call": lambda user: chat(user) + b"garbage\r\n\r\n",
    "garbage behind calls": lambda user: chat(user) + GET + chat(user) + b"\0\0\0\0",
    "garbage behind Falcon's": lambda user: GET + in_chunks(user) + b"garbage\r\n\r\n",
    "garbage behind a stream": lambda user: in_chunks(user, stream=True) + b"garbage\r\n\r\n",
    "a bad chunk behind a call": lambda user: chat(user) + in_chunks(user, last=b"what\r\n"),
    "a bad chunk behind Falcon's": lambda user: GET + in_chunks(user) + in_chunks(user, last=b"what\r\n"),
    "HTTP/2": lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a smuggler": lambda user: chat(user, body=chat(user), length=True) + chat(user),
    "a smuggler without a length": lambda user: chat(user, length=False, body=chat(user)),
}
"""What callers may send: functions of the user's name."""


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_answered_the_same_way(paths, user, name):
    """Whatever a caller sends gets the same answers, is forwarded, charged and counted alike, and ends alike."""
    assert_same(paths, [REQUESTS[name](user)], user)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_with_another_behind_is_answered_the_same_way(paths, user, name):
    """Where one message ends and the next begins is the same on both paths."""
    assert_same(paths, [REQUESTS[name](user)], user, at_once=True)


@pytest.mark.parametrize(
    "name", ["plain", "a stream", "two calls", "chunks", "calls and more", "garbage", "no length"]
)
def test_caller_who_sends_no_more_is_treated_the_same_way(paths, user, name):
    """A caller who closes its side is gone, on both paths: what it had sent whole is charged, or not begun."""
    told = told_by_both(paths, [REQUESTS[name](user)], ends=True)
    assert told[0].closed
    assert told[1].closed
    for path in paths:
        assert "tokenguard_reservations_open" not in path.books(user)[1]
        path.forwarded()


# --- how it comes -------------------------------------------------------------------------------------------


def apart(paths, conversations):
    """Hold many conversations at once on both paths; assert that each is the same, and what they took, too.

    Args:
        paths: Both.
        conversations: A list of pieces for each, and the name of its user.
    """

    async def hold():
        free = asyncio.Semaphore(64)

        async def one(pieces):
            async with free:
                return await asyncio.gather(*(converse(path.port, pieces, gap_s=0.003) for path in paths))

        return await asyncio.gather(*(one(pieces) for pieces, _ in conversations))

    told = asyncio.run(hold())
    exact = True
    for (pieces, _), (lane, falcon) in zip(conversations, told, strict=True):
        sent = b"".join(pieces)
        assert agree(lane, falcon, sent), f"{pieces}\n    lane: {lane}\n  Falcon: {falcon}"
        exact &= lane.masked(sent) == falcon.masked(sent)
    books = [path.books(*(user for _, user in conversations)) for path in paths]
    assert_equal(*(levels for levels, _ in books))
    if exact:
        assert_equal(*books)
    assert_equal(*(path.forwarded() for path in paths))


def cut(asked, *offsets):
    return [asked[start:end] for start, end in zip((0, *offsets), (*offsets, len(asked)), strict=True)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_request_may_be_cut_anywhere(paths, user, stream):
    """It makes no difference at which byte of head or body the network cuts a request in two."""
    length = len(chat(f"{user}-000", stream=stream))
    users = [f"{user}-{offset:03}" for offset in range(1, length)]
    apart(paths, [(cut(chat(name, stream=stream), int(name[-3:])), name) for name in users])


def test_requests_in_a_row_may_be_cut_anywhere(paths, user):
    """Nor at which byte it cuts a row of requests of several kinds."""

    def row(name):
        return chat(name) + GET + in_chunks(name) + chat(name, stream=True) + chat(name, body=b"{}")

    length = len(row(f"{user}-000"))
    users = [f"{user}-{offset:04}" for offset in range(1, length, 3)]
    apart(paths, [(cut(row(name), int(name[-4:])), name) for name in users])


# --- by chance ----------------------------------------------------------------------------------------------


def lines():
    names = st.sampled_from(
        b"content-length transfer-encoding connection host expect upgrade x-user-id x-team-id x-role te trailer "
        b"content-encoding content-type x-request-id x-a Content-Length accept".split()
    )
    values = st.sampled_from(
        b"chunked,close,keep-alive,0,5,120,identity,gzip,100-continue,h2c,upgrade,x,,t ,chunked\x0b,\xff".split(
            b","
        )
    )
    colons = st.sampled_from([b": ", b":", b" : ", b":\t", b": \r\n "])
    return st.tuples(names, colons, values).map(b"".join)


@st.composite
def mutated(draw, requests):
    """Draw requests with a few bytes of them replaced, dropped, doubled or put in."""
    data = draw(requests)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 4)))
        put = draw(
            st.sampled_from(
                [b"", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\xff", b"0", b"9", b"a", b","]
            )
            | st.just(data[start:end] * 2)
            | st.binary(max_size=3)
        )
        data = data[:start] + put + data[end:]
    return data


@st.composite
def requests(draw):
    """Draw a request that may be odd: its line, its fields, the framing of its body."""
    method = draw(st.sampled_from([b"POST"] * 8 + [b"GET", b"PUT", b"OPTIONS", b"post"]))
    target = draw(
        st.sampled_from([b"/v1/chat/completions"] * 8 + [b"/v1/models", b"/nowhere", b"/v1/chat/completions?"])
    )
    version = draw(st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/1.1 "]))
    fields = draw(st.lists(lines(), max_size=3))
    saying = draw(st.sampled_from([b"", b"", b"a stream", b"429", b"204", b"cut", b"gzip", b"in chunks"]))
    fields += [b"x-says: " + saying] if saying else []
    made = in_chunks if draw(st.integers(0, 3)) == 0 else chat
    asked = made("@", *fields, stream=draw(st.booleans()))
    return asked.replace(b"POST /v1/chat/completions HTTP/1.1", b" ".join((method, target, version)), 1)


conversations = st.lists(
    mutated(st.lists(requests(), min_size=1, max_size=3).map(b"".join)), min_size=10, max_size=10
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=EXAMPLES or 15, derandomize=not EXAMPLES, deadline=None, database=None)
@given(drawn=conversations, offset=st.integers(1, 400))
def test_odd_conversation_goes_the_same_way(paths, drawn, offset):
    """Whatever is drawn by grammar and then mutated gets the same answers and costs the same on both paths."""
    users = [f"drawn-{next(_numbers)}" for _ in drawn]
    apart(
        paths,
        [
            (cut(asked.replace(b"@", user.encode()), offset), user)
            for asked, user in zip(drawn, users, strict=True)
        ],
    )
