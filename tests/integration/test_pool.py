"""The pool of connections to the provider, over real sockets, on both loops."""

import asyncio
import socket
from itertools import count

import pytest

from tests.provider import (
    CHUNKED,
    OK,
    OddLoop,
    Provider,
    ask,
    body_of,
    calling,
    facing,
    full_queue,
    request,
    saying,
    seen,
    state,
)
from tokenguard.errors import UpstreamBusy, UpstreamError, UpstreamTimeout
from tokenguard.upstream import KEEPALIVE_S, _pool

pytestmark = pytest.mark.usefixtures("runner")

BROKE_OFF = r"^the provider's answer broke off \(closed the connection\)$"
UNREACHED = r"^the provider could not be reached"


def fails(error, match, *, sent):
    """Expect an error that says whether the request may have been acted upon."""
    return pytest.raises(error, match=match, check=lambda raised: raised.sent is sent)


# --- connections are kept and shared ----------------------------------------------------------------------------


async def test_connection_is_kept_for_the_next_call():
    """Calls one after the other share one connection."""
    async with facing() as (provider, upstream):
        for _ in range(3):
            assert await ask(upstream) == (200, b"ok")
        assert len(provider.lines) == 1
        assert state(upstream) == (1, 0, 0, 0)


async def test_newest_connection_is_taken_first():
    """So that the others grow old, and are closed."""
    async with facing() as (provider, upstream):
        await asyncio.gather(*(ask(upstream) for _ in range(3)))
        assert len(provider.lines) == 3
        await ask(upstream)
        (last,) = [line for line in provider.lines if len(line.requests) == 2]
        for _ in range(3):
            await ask(upstream)
        assert len(last.requests) == 5


async def test_no_more_connections_than_may_be():
    """Calls beyond that wait, and are served in the order in which they came."""
    order = []

    async def one(upstream, number):
        await ask(upstream, request(body=b"%d" % number))
        order.append(number)

    async with facing(max_connections=1) as (provider, upstream):
        first = [asyncio.create_task(one(upstream, 0))]
        await asyncio.sleep(0)
        assert state(upstream) == (0, 0, 1, 0)
        first.append(asyncio.create_task(one(upstream, 1)))
        await asyncio.gather(*first)
        assert order == [0, 1]
        assert len(provider.lines) == 1
    async with facing(max_connections=3) as (provider, upstream):
        await asyncio.gather(*(ask(upstream) for _ in range(6)))
        assert len(provider.lines) == 3


async def silent(line):
    await line.request()
    await line.gone()


async def test_queue_has_a_bound():
    """No more calls wait than there are connections; whoever comes then is told at once, and nothing was sent."""
    async with facing(silent, max_connections=2) as (_provider, upstream):
        calls = [asyncio.create_task(upstream.open(request())) for _ in range(4)]
        await seen(lambda: state(upstream) == (0, 2, 0, 2))
        with fails(UpstreamBusy, "all 2 connections", sent=False):
            await upstream.open(request())
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)


async def test_whoever_waits_too_long_is_told():
    """It was not sent, and its place in the queue is free."""
    async with facing(silent, max_connections=1, queue_timeout_s=0.05) as (_provider, upstream):
        call = asyncio.create_task(upstream.open(request()))
        await seen(lambda: state(upstream) == (0, 1, 0, 0))
        with fails(UpstreamBusy, r"none became free in 0.05 s", sent=False):
            await upstream.open(request())
        assert state(upstream) == (0, 1, 0, 0)
        call.cancel()
        await asyncio.wait([call])


async def test_failed_connection_makes_room_for_whoever_waits():
    """Where a connection breaks, the next call gets one of its own."""
    async with facing(saying(b"")) as (provider, upstream), facing(max_connections=1) as (_, _):
        assert [
            type(error)
            for error in await asyncio.gather(*(ask(upstream) for _ in range(8)), return_exceptions=True)
        ] == [UpstreamError] * 8
        assert len(provider.lines) == 8


async def test_idle_connections_are_closed():
    """What has been idle for 30 s is closed, by us; what has been used since is kept."""
    loop = OddLoop()
    async with facing(loop=loop, read_timeout_s=1.0) as (_provider, upstream):
        await asyncio.gather(ask(upstream), ask(upstream))
        assert state(upstream) == (2, 0, 0, 0)
        loop.ahead = KEEPALIVE_S / 2
        await ask(upstream)
        assert state(upstream) == (2, 0, 0, 0)
        loop.ahead = KEEPALIVE_S + 1
        await seen(lambda: state(upstream) == (1, 0, 0, 0))
        loop.ahead = 2 * KEEPALIVE_S + 1
        await seen(lambda: state(upstream) == (0, 0, 0, 0))


# --- a kept connection that is of no more use -------------------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "end", "reset"])
async def test_connection_that_the_provider_closes_is_not_used(way):
    """It goes as soon as that is known."""

    async def script(line):
        await line.request()
        await line.say(OK)
        await asyncio.sleep(0.02)
        getattr(line, way)()

    async with facing(script) as (provider, upstream):
        for calls in range(1, 3):
            assert await ask(upstream) == (200, b"ok")
            await seen(lambda: state(upstream) == (0, 0, 0, 0))
            assert len(provider.lines) == calls


async def test_connection_that_says_something_unasked_is_not_used():
    """What comes when nobody asked is not the next call's answer."""

    async def script(line):
        await line.request()
        await line.say(OK)
        await asyncio.sleep(0.02)
        await line.say(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await line.gone()

    async with facing(script) as (_provider, upstream):
        await ask(upstream)
        await seen(lambda: state(upstream) == (0, 0, 0, 0))
        assert await ask(upstream) == (200, b"ok")


@pytest.mark.parametrize("after", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"\r\n"])
async def test_answer_with_something_behind_ends_its_connection(after):
    """The same where it comes at once."""

    async def script(line):
        await line.request()
        await line.say(OK + after)
        await line.gone()

    async with facing(script) as (provider, upstream):
        assert await ask(upstream) == (200, b"ok")
        assert await ask(upstream) == (200, b"ok")
        assert len(provider.lines) == 2


@pytest.mark.parametrize("way", ["end", "say"])
async def test_kept_connection_is_looked_at_before_it_is_used(way):
    """What the loop has not told yet, since it was held up, is seen all the same."""
    loop = OddLoop()
    async with facing(loop=loop) as (provider, upstream):
        await ask(upstream)
        loop.ahead = _pool.LOOK_AFTER_S + 0.1
        with provider.lines[0].raw() as raw:
            if way == "say":
                raw.send(b"x")
            else:
                raw.shutdown(socket.SHUT_WR)
        call = asyncio.create_task(ask(upstream))  # runs before the loop looks at its sockets
        assert await call == (200, b"ok")
        assert [len(line.requests) for line in provider.lines] == [1, 1]


class Counted:
    """Answers the first request over a connection, and breaks the connection off at the second."""

    def __init__(self, before=b""):
        self.before = before
        self.heads = []

    async def __call__(self, line):
        for number in count():
            head, _ = await line.request()
            self.heads.append(head)
            if number and len(self.heads) == 2:
                await line.say(self.before)
                line.close()
                return
            await line.say(OK)


@pytest.mark.parametrize(
    "again",
    [request("GET"), request("HEAD"), request(idempotency_key="a")],
    ids=["GET", "HEAD", "idempotency-key"],
)
async def test_request_that_may_be_repeated_is_sent_once_more(again):
    """Where a kept connection ends before a byte of an answer has come."""
    script = Counted()
    async with facing(script) as (_provider, upstream):
        await ask(upstream)
        assert (await ask(upstream, again))[0] == 200
        assert len(script.heads) == 3
        assert script.heads[1] == script.heads[2]


async def test_request_that_may_not_be_repeated_is_sent_once():
    """The provider may have acted upon it."""
    script = Counted()
    async with facing(script) as (_provider, upstream):
        await ask(upstream)
        with fails(UpstreamError, BROKE_OFF, sent=True):
            await ask(upstream)
        assert len(script.heads) == 2


async def test_request_is_not_repeated_once_something_came():
    """An interim answer tells that the request has been read."""
    script = Counted(before=b"HTTP/1.1 100 Continue\r\n\r\n")
    async with facing(script) as (_provider, upstream):
        await ask(upstream)
        with fails(UpstreamError, BROKE_OFF, sent=True):
            await ask(upstream, request("GET"))
        assert len(script.heads) == 2


async def test_request_is_not_repeated_over_a_new_connection():
    """Nor a second time: whoever breaks off new connections does so again."""
    async with facing(saying(b"")) as (provider, upstream):
        with fails(UpstreamError, BROKE_OFF, sent=True):
            await ask(upstream, request("GET"))
        assert len(provider.lines) == 1

    async def script(line):
        await line.request()
        if len(provider.lines) == 1:
            await line.say(OK)
            await line.request()
        line.close()

    async with facing(script) as (provider, upstream):
        await ask(upstream)
        with fails(UpstreamError, BROKE_OFF, sent=True):
            await ask(upstream, request("GET"))
        assert len(provider.lines) == 2


# --- answers ----------------------------------------------------------------------------------------------------


async def test_answer_that_comes_before_the_request_is_whole():
    """A 413 reaches the caller though 20 MB are still on their way; the connection is not used again."""

    async def script(line):
        await line.head()
        await line.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await line.gone()

    async with facing(script) as (_provider, upstream):
        assert await ask(upstream, request(body=bytes(20_000_000))) == (413, b"no")
        await seen(lambda: state(upstream) == (0, 0, 0, 0))


async def test_answer_to_head_has_no_body():
    """Its length is that of what does not come."""
    async with facing(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")) as (_, upstream):
        assert await ask(upstream, request("HEAD")) == (200, b"")


async def test_interim_answers_are_passed_over():
    """100 and 103 are not the answer."""
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    async with facing(saying(early, OK)) as (_, upstream):
        assert await ask(upstream) == (200, b"ok")


@pytest.mark.parametrize("old", [False, True])
async def test_answer_without_length_ends_with_its_connection(old):
    """What has come until then is the body."""
    head = b"HTTP/1.%d 200 OK\r\n\r\n" % (not old)
    async with facing(saying(head, b"hello, ", b"world")) as (_, upstream):
        assert await ask(upstream) == (200, b"hello, world")


CUTS = {
    "by length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", b"hel"),
    "in chunks": (CHUNKED + b"5\r\nhello\r\n", b"hello"),
    "in a chunk": (CHUNKED + b"5\r\nhel", b"hel"),
    "before the end of the last chunk": (CHUNKED + b"5\r\nhello\r\n0\r\n", b"hello"),
}


@pytest.mark.parametrize(("sent", "came"), CUTS.values(), ids=CUTS)
async def test_body_that_is_cut_is_no_whole_one(sent, came):
    """What came is passed on, and then it is said that it broke off."""
    async with facing(saying(sent)) as (_, upstream):
        response = await upstream.open(request())
        assert await anext(response) == came
        with fails(UpstreamError, BROKE_OFF, sent=True):
            await anext(response)
        await response.close()


async def test_answer_whose_body_is_none_from_its_beginning():
    """Its head has come, and is passed on."""
    async with facing(saying(CHUNKED + b"zz\r\n")) as (_, upstream):
        response = await upstream.open(request())
        assert response.status == 200
        with fails(UpstreamError, "is no HTTP .a chunk has no size.", sent=True):
            await anext(response)
        await response.close()


async def test_connection_that_breaks_says_how():
    """A reset is told from an end."""

    async def script(line):
        await line.request()
        line.reset()

    async with facing(script) as (_, upstream):
        with fails(UpstreamError, r"broke off \(ConnectionResetError: Connection reset by peer\)$", sent=True):
            await ask(upstream)


@pytest.mark.parametrize("status", [b"600 X", b"999 X", b"101 Switching Protocols"])
async def test_status_that_is_none_is_an_error(status):
    """It cannot be passed on."""
    async with facing(saying(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % status)) as (_, upstream):
        with fails(UpstreamError, "the provider", sent=True):
            await ask(upstream)


# --- time -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full():
    """The port of an address where no connection comes about."""
    sockets = full_queue()
    yield sockets[0].getsockname()[1]
    for one in sockets:
        one.close()


async def test_connection_that_does_not_come_about(full):
    """After the time for it the call is told; nothing was sent."""
    async with calling(f"http://127.0.0.1:{full}", connect_timeout_s=0.1) as upstream:
        with fails(UpstreamTimeout, "^the provider could not be reached in time$", sent=False):
            await ask(upstream)


async def test_dead_address_does_not_take_all_the_time(full):
    """The next address is tried while there is time for it, and first from then on."""
    async with Provider(saying(OK)) as provider:
        loop = OddLoop(("127.0.0.1", full), ("127.0.0.1", provider.port))
        async with calling("http://nobody.invalid", loop, connect_timeout_s=0.4) as upstream:
            for least, most in (0.2, 0.4), (0, 0.2):
                before = loop.time()
                assert await ask(upstream) == (200, b"ok")
                assert least <= loop.time() - before < most
                await seen(lambda: state(upstream) == (0, 0, 0, 0))
        assert len(provider.lines) == 2


async def test_error_is_that_of_the_last_address():
    """Where no address answers, it says what came of the last one; a family that is unknown is no end."""
    async with Provider() as provider:
        port = provider.port
    loop = OddLoop(("127.0.0.1", port), ("127.0.0.1", port))
    async with calling("http://nobody.invalid", loop) as upstream:
        with fails(UpstreamError, rf"{UNREACHED} \(ConnectionRefusedError: .*\)$", sent=False):
            await ask(upstream)


async def test_refused_connection_says_so():
    """Nothing was sent, and the next call tries anew."""
    async with Provider() as provider:
        port = provider.port
    async with calling(f"http://127.0.0.1:{port}") as upstream:
        for _ in range(2):
            with fails(UpstreamError, rf"{UNREACHED} \(ConnectionRefusedError: .*\)$", sent=False):
                await ask(upstream)


async def test_refused_connection_makes_room_for_whoever_waits():
    """The next attempt is that of whoever waits."""
    async with Provider() as provider:
        port = provider.port
    async with calling(f"http://127.0.0.1:{port}", max_connections=1) as upstream:
        errors = await asyncio.gather(ask(upstream), ask(upstream), return_exceptions=True)
        assert all("ConnectionRefusedError" in str(error) for error in errors)


@pytest.mark.parametrize("host", ["nobody.invalid", "a..b", "x" * 64])
async def test_host_that_is_none_says_so(host):
    """Whatever goes wrong before a connection is there, the call is told."""
    async with calling(f"http://{host}") as upstream:
        with fails(UpstreamError, UNREACHED, sent=False):
            await ask(upstream)


async def test_provider_that_closes_at_once():
    """A connection that is gone before it carries a request counts for nothing."""

    async def script(line):
        line.reset()

    async with facing(script) as (_provider, upstream):
        for _ in range(20):
            with pytest.raises(UpstreamError):
                await ask(upstream)


async def test_answer_that_does_not_begin():
    """After the time between two pieces the call is told; the request had been sent."""
    async with facing(silent, read_timeout_s=0.1) as (_, upstream):
        with fails(UpstreamTimeout, "^the provider did not answer in time$", sent=True):
            await ask(upstream)


async def test_answer_that_does_not_go_on():
    """The same in the middle of a body; what came is passed on."""

    async def script(line):
        await line.request()
        await line.say(CHUNKED + b"5\r\nhello\r\n")
        await line.gone()

    async with facing(script, read_timeout_s=0.5) as (_, upstream):
        response = await upstream.open(request())
        assert await anext(response) == b"hello"
        with fails(UpstreamTimeout, "^the provider did not answer in time$", sent=True):
            await anext(response)
        await response.close()


async def test_answer_that_does_not_end():
    """However steadily it comes, there is a time for the whole."""

    async def script(line):
        await line.request()
        await line.say(CHUNKED)
        while True:
            await line.say(b"1\r\nx\r\n")
            await asyncio.sleep(0.01)

    async with facing(script, read_timeout_s=0.7, total_timeout_s=1.0) as (_, upstream):
        with fails(UpstreamTimeout, "^the provider did not end its answer in time$", sent=True):
            await ask(upstream)


async def test_request_that_takes_long_to_be_sent_is_no_answer_that_is_late():
    """While the provider takes in the request, it has time to answer."""
    size = 12_000_000

    async def script(line):
        await line.head()
        taken = 0
        for _ in range(60):
            taken += len(await line.some(32_768))
            await asyncio.sleep(0.02)
        while taken < size:
            taken += len(await line.some(size))
        await line.say(OK)

    async with (
        Provider(script, room=65536) as provider,
        calling(f"http://127.0.0.1:{provider.port}/v1", read_timeout_s=0.5) as upstream,
    ):
        assert await ask(upstream, request(body=bytes(size))) == (200, b"ok")


# --- whoever reads slowly, or not at all ------------------------------------------------------------------------


async def test_reader_that_does_not_read_holds_the_provider_up():
    """Of 200 MB no more is taken than fits the sockets; what is left comes once it is read."""
    size, piece = 200_000_000, bytes(1_000_000)
    sent = 0

    async def script(line):
        nonlocal sent
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            await line.say(piece)
            sent += len(piece)

    async with facing(script, read_timeout_s=0.3, total_timeout_s=60) as (_, upstream):
        response = await upstream.open(request())
        await asyncio.sleep(0.8)
        assert 0 < sent < 16_000_000
        assert sum([len(got) async for got in response]) == size
        await response.close()
        assert state(upstream) == (1, 0, 0, 0)


# --- whoever goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(12))
async def test_call_may_be_cancelled_at_any_moment(turns):
    """Nothing is left of it: its connection is dropped, or kept if it carried nothing yet."""
    async with facing() as (_provider, upstream):
        calls = [asyncio.create_task(ask(upstream)) for _ in range(6)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.wait(calls)
        await seen(lambda: state(upstream)[1:] == (0, 0, 0))
        assert all(call.cancelled() or call.result() == (200, b"ok") for call in calls)
        assert not any(call.cancelled() for call in calls[1::2])
        assert await ask(upstream) == (200, b"ok")


async def test_answer_that_nobody_wants_drops_its_connection():
    """Closed in the middle of a body, it takes its connection with it; after the end, it does not."""

    async def script(line):
        await line.request()
        await line.say(CHUNKED + b"5\r\nhello\r\n")
        await line.gone()

    async with facing(script) as (_provider, upstream):
        response = await upstream.open(request())
        reading = asyncio.create_task(body_of(response))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait([reading])
        await seen(lambda: state(upstream) == (0, 0, 0, 0))
        await response.close()  # once more does no harm


async def test_pool_that_is_closed_tells_all_that_wait():
    """Whoever waits for a connection, for its turn, a head or a body hears of it; nothing begins after that."""

    async def script(line):
        await line.request()
        if len(provider.lines) == 1:
            await line.say(CHUNKED + b"5\r\nhello\r\n")
        await line.gone()

    async with facing(script, max_connections=2) as (provider, upstream):
        read = await upstream.open(request())
        waits = [asyncio.create_task(upstream.open(request("GET"))) for _ in range(3)]
        await seen(lambda: state(upstream) == (0, 2, 0, 2))
        await upstream.close()
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert [(type(error), error.sent) for error in errors] == [
            (UpstreamError, True),
            (UpstreamError, False),
            (UpstreamError, False),
        ]
        assert await anext(read) == b"hello"
        with fails(UpstreamError, "the server stops", sent=True):
            await anext(read)
        with fails(UpstreamError, "the server stops", sent=False):
            await upstream.open(request())
        await asyncio.sleep(0.01)
        assert state(upstream) == (0, 0, 0, 0)
        assert len(provider.lines) == 2


@pytest.mark.parametrize("turns", range(12))
async def test_pool_may_be_closed_while_it_connects(turns):
    """Even before an attempt has begun, whoever waits for it is told."""
    async with facing() as (_, upstream):
        call = asyncio.create_task(upstream.open(request()))
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await upstream.close()
        (ended,) = await asyncio.gather(call, return_exceptions=True)
        assert getattr(ended, "status", None) == 200 or "the server stops" in str(ended)


# --- what travels -----------------------------------------------------------------------------------------------


TARGETS = {
    "http://127.0.0.1:{port}/v1": (b"/v1/chat/completions", b"127.0.0.1:{port}"),
    "http://127.0.0.1:{port}/v1/": (b"/v1/chat/completions", b"127.0.0.1:{port}"),
    "http://127.0.0.1:{port}": (b"/chat/completions", b"127.0.0.1:{port}"),
    "http://LOCALHOST:{port}/a/b?api-version=2024-10-21": (
        b"/a/b/chat/completions?api-version=2024-10-21",
        b"localhost:{port}",
    ),
    "http://127.0.0.1:{port}/a%20b": (b"/a%20b/chat/completions", b"127.0.0.1:{port}"),
}


@pytest.mark.parametrize("url", TARGETS)
async def test_request_travels_byte_for_byte(url):
    """The first line, our host, the fields as they are given, the length, and the body."""
    target, host = TARGETS[url]
    async with Provider() as provider, calling(url.format(port=provider.port)) as upstream:
        await ask(upstream, request(body=b"hello", x_a="b", accept="c"))
        ((head, body),) = provider.lines[0].requests
    assert body == b"hello"
    assert (
        head
        == (b"POST " + target + b" HTTP/1.1\r\nhost: " + host.replace(b"{port}", b"%d" % provider.port))
        + b"\r\nx-a: b\r\naccept: c\r\ncontent-length: 5\r\n\r\n"
    )


async def test_request_travels_to_an_address_of_ipv6():
    """Its host is named in brackets; a GET has no length."""
    async with Provider(host="::1") as provider, calling(f"http://[::1]:{provider.port}/v1") as upstream:
        await ask(upstream, request("GET", "/models"))
        ((head, _),) = provider.lines[0].requests
    assert head == b"GET /v1/models HTTP/1.1\r\nhost: [::1]:%d\r\n\r\n" % provider.port
