"""Clients that guard a program's own calls: the real SDK over each of them, and a provider of the tests' own."""

from __future__ import annotations

import asyncio
import gc
import gzip
import inspect
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import httpx2
import openai
import pytest

from tests.e2e.conftest import THEIR_KEY
from tests.e2e.fake_openai import DONE, EVENTS, JSON, WORDS, completion, usage_of
from tests.e2e.faults import (
    CAPACITY,
    CUT,
    FAULTS,
    MESSAGES,
    PROMPT,
    RESERVED,
    TWO_WORDS,
    USED,
    WHOLE,
    levels_after,
    streamed,
)
from tests.e2e.faults import event as event_of
from tests.e2e.limited_openai import error, rate_limited
from tests.e2e.rogue import Rogue, answer, head, saying
from tests.nodes import until
from tests.provider_limit import Limit, Limits
from tokenguard import Limiter
from tokenguard.errors import InvalidSetting, InvalidValue

KINDS = {
    "httpx": ("httpx_client", openai.OpenAI, httpx),
    "httpx async": ("httpx_async_client", openai.AsyncOpenAI, httpx),
    "httpx2": ("httpx2_client", openai.OpenAI, httpx2),
    "httpx2 async": ("httpx2_async_client", openai.AsyncOpenAI, httpx2),
}
"""The clients: what of a limiter makes each, the SDK's client that it is for, and whose kind it is."""
SYNC = [kind for kind in KINDS if "async" not in kind]
ASYNC = [kind for kind in KINDS if "async" in kind]
IDENTITY = ("x-user-id", "x-team-id", "x-role", "x-llm-rolegroup")


class Program:
    """A program that calls the provider through a guarded client, and is asked alike whether it is async or not.

    Args:
        kind: The client's.
        limiter: What guards it.
        url: The provider's.
        user: Who calls.
        sdk: What the SDK's client takes.
        who: What the guarded client is told of who calls, unless it is the user and a team.
        options: What the guarded client takes.

    Attributes:
        http: The guarded client.
        openai: The SDK's, over it.
        is_async: Whether they are asynchronous.
        kin: httpx, or its kin.
    """

    def __init__(self, kind, limiter, url, user, sdk=None, who=None, **options):
        make, sdk_client, self.kin = KINDS[kind]
        self.is_async = kind in ASYNC
        self._runner = asyncio.Runner() if self.is_async else None
        self._limiter, self.url, self.user, self.model = limiter, url, user, f"model-of-{user}"
        # Certificates, which nobody needs here, would take 30 ms to load.
        whose = {"user": user, "team": f"team-of-{user}", **(who or {})}
        self.http = getattr(limiter, make)(**whose, **{"verify": False, **options})
        sdk = {"api_key": THEIR_KEY, "max_retries": 0, "timeout": 10, **(sdk or {})}
        self.openai = sdk_client(base_url=url, http_client=self.http, **sdk)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.run(self.openai.close())
        if self._runner is not None:
            self._runner.close()

    def run(self, work):
        """Return what is there, or what comes of a coroutine."""
        return self._runner.run(work) if inspect.iscoroutine(work) else work

    def request(self, **more):
        return {"model": self.model, "messages": MESSAGES, "max_tokens": 50, **more}

    def chat(self, client=None, **more):
        """Make a call by the SDK."""
        return self.run((client or self.openai).chat.completions.create(**self.request(**more)))

    def all(self, stream):
        """Return all that a stream yields."""

        async def gather():
            return [piece async for piece in stream]

        return self.run(gather()) if hasattr(stream, "__aiter__") else list(stream)

    def post(self, **more):
        """Make a call without the SDK."""
        request = {"json": self.request(), "headers": {"authorization": f"Bearer {THEIR_KEY}"}, **more}
        return self.run(self.http.post(f"{self.url}/chat/completions", **request))

    def is_charged(self, charged):
        """Return whether the buckets are where the oracle has them once that was settled, and nothing is open."""
        return self.levels == levels_after(charged) and open_reservations(self._limiter) == 0

    @property
    def levels(self):
        states = self._limiter.peek(user=self.user, team=f"team-of-{self.user}")
        return tuple(state.level for state in states)

    @property
    def used(self):
        """What the user's calls were charged, and reserved."""
        return CAPACITY - self.levels[1]


def open_reservations(limiter):
    _, text = limiter._guards._house.metrics.exposition(None)
    return float(re.search(rb"\ntokenguard_reservations_open (\S+)", text)[1])


def limiting(url="memory://", **settings):
    """Return a limiter under which every team and every user has a grant."""
    grants = {
        "CAP_GLOBAL": "unlimited",
        "CAP_TEAM": CAPACITY,
        "RATE_TEAM": 0,
        "CAP_USER": CAPACITY,
        "RATE_USER": 0,
    }
    return Limiter(url, **grants, TOKENGUARD_BUCKETS=5000, **settings)


@pytest.fixture(scope="module", params=["memory", "redis"])
def limiter(request):
    """One in each place; a busy machine may hold up a batch for long, and that is no outage."""
    if request.param == "memory":
        started = limiting()
    else:
        started = limiting(request.getfixturevalue("redis_server").url, TOKENGUARD_REDIS_TIMEOUT_S=10)
    with started as limiter:
        yield limiter


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def start(kind, limiter, upstream_url, user):
    """Return what starts a program."""
    with ExitStack() as programs:

        def start_one(url=upstream_url, **options):
            return programs.enter_context(Program(kind, limiter, url, user, **options))

        yield start_one


@pytest.fixture
def program(start):
    return start()


@pytest.fixture(scope="module")
def rogue():
    with Rogue() as rogue:
        yield rogue


@pytest.fixture
def faced(start, rogue):
    """A program that faces the rogue."""
    rogue.reset()
    yield start(f"http://127.0.0.1:{rogue.port}/v1")
    rogue.hung_up()


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Whoever is told by what is raised needs no lines in the log; the key stands in none."""
    caplog.set_level(logging.DEBUG, "tokenguard")
    yield
    records = caplog.get_records("call")
    told = [record.getMessage() for record in records if record.name == "tokenguard"]
    lasting = ("held back", "the provider's limit on")  # which others than this call's program feel
    assert [line for line in told if not any(words in line for words in lasting)] == []
    assert not any(THEIR_KEY in record.getMessage() for record in records)


only_memory = pytest.mark.parametrize("limiter", ["memory"], indirect=True)
only_redis = pytest.mark.parametrize("limiter", ["redis"], indirect=True)
only_sync = pytest.mark.parametrize("kind", SYNC)
only_async = pytest.mark.parametrize("kind", ASYNC)


# --- calls that go well ------------------------------------------------------------------------------------------


def test_call_is_settled_by_its_usage(program, fake):
    """The SDK has its answer, and every bucket what it cost."""
    assert program.chat().choices[0].message.content == "Hello there"
    assert program.is_charged(USED)
    assert fake.received[0].json == program.request()


def test_program_s_own_credentials_travel_and_nothing_of_ours(program, fake):
    """The provider gets the program's key, as often as the program sent it, and not who calls."""
    program.chat(extra_headers={"x-role": "developer", "openai-project": "proj_theirs"})
    (received,) = fake.received
    assert received.header("authorization") == [f"Bearer {THEIR_KEY}"]
    assert received.header("openai-project") == ["proj_theirs"]
    assert received.header("accept-encoding") == ["identity"]
    assert not any(received.header(name) for name in IDENTITY)
    assert not any(name.startswith(b"x-tokenguard") or name == b"x-request-id" for name, _ in received.headers)


@pytest.mark.parametrize("asks", [False, True], ids=["silent", "asks for usage"])
def test_stream_is_settled_by_its_usage(program, fake, asks):
    """Its usage is asked for; the chunk that tells it is the program's only if the program asked too."""
    options = {"stream_options": {"include_usage": True}} if asks else {}
    chunks = program.all(program.chat(stream=True, **options))
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices] == [*WORDS, None]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [USED] * asks
    assert fake.received[0].json["stream_options"] == {"include_usage": True}
    assert program.is_charged(USED)


def test_stream_s_usage_is_not_asked_for_where_that_is_switched_off(kind, upstream_url, fake, user):
    """Then the prompt and what was streamed are charged."""
    with (
        limiting(TOKENGUARD_ASK_FOR_USAGE="off") as limiter,
        Program(kind, limiter, upstream_url, user) as program,
    ):
        program.all(program.chat(stream=True))
        assert "stream_options" not in fake.received[0].json
        assert program.used == PROMPT + len("".join(WORDS)) // 4


@pytest.mark.parametrize(
    ("more", "reserved"),
    [
        ({"max_tokens": 100}, PROMPT + 100),
        ({"max_completion_tokens": 70, "max_tokens": openai.omit}, PROMPT + 70),
        ({"n": 3}, PROMPT + 3 * 50),
        ({"max_tokens": openai.omit}, PROMPT + 256),
    ],
    ids=["max_tokens", "max_completion_tokens", "n", "no cap"],
)
@only_memory
def test_reservation_is_the_proxy_s_estimate(program, limiter, fake, more, reserved):
    """While the provider is at work, so much is reserved."""
    seen = []

    async def script(reply):
        seen.append(program.used)
        await fake.answer(reply)

    fake.script = script
    program.chat(**more)
    assert seen == [reserved]
    assert program.used == USED


def test_tools_are_counted(program, limiter):
    """What describes a tool is part of the prompt."""
    tool = {"type": "function", "function": {"name": "look_up", "description": "Look something up. " * 20}}
    without, with_tools = (limiter.estimate(program.request(**more))["tokens"] for more in ({}, {"tools": [tool]}))
    assert with_tools > without + 50
    program.chat(tools=[tool])
    assert program.used == USED


def test_raw_response(program):
    """It has the head that the program would see without us, and what we tell of budgets."""
    raw = program.run(program.openai.chat.completions.with_raw_response.create(**program.request()))
    assert raw.parse().usage.total_tokens == USED
    assert raw.headers["x-upstream-ratelimit-limit-requests"] == "10000"
    assert raw.headers["x-ratelimit-limit-tokens"] == str(CAPACITY)
    assert raw.headers["x-ratelimit-remaining-tokens"] == str(CAPACITY - RESERVED)
    assert raw.http_response.elapsed.total_seconds() > 0
    assert raw.http_response.json()["id"] == "chatcmpl-1"


def test_streaming_response(program):
    """An answer that is read by and by is settled once it has been read."""
    manager = program.openai.chat.completions.with_streaming_response.create(**program.request())

    async def read_soon():
        async with manager as response:
            return await response.read()

    def read():
        with manager as response:
            return response.read()

    body = program.run(read_soon() if hasattr(manager, "__aenter__") else read())
    assert json.loads(body)["usage"]["total_tokens"] == USED
    assert program.is_charged(USED)


def test_response_is_the_one_that_the_program_asked_for(program, fake):
    """Its request is the program's, its id and its cookies the provider's."""

    async def script(reply):
        fields = [(b"x-request-id", b"req_theirs"), (b"set-cookie", b"a=b"), (b"server", b"them"), *JSON]
        await reply.whole(200, fields, completion(reply.received, usage_of(10, 20)))

    fake.script = script
    request = program.http.build_request("POST", f"{program.url}/chat/completions", json=program.request())
    response = program.run(program.http.send(request))
    assert response.request is request
    assert response.headers.get_list("x-request-id") == ["req_theirs"]
    assert (response.cookies["a"], program.http.cookies["a"]) == ("b", "b")
    assert "them" in response.headers["server"]
    assert response.elapsed.total_seconds() > 0
    assert request.headers.get("accept-encoding") == program.http.headers["accept-encoding"]
    assert program.run(program.http.send(request)).status_code == 200
    assert program.used == 2 * USED


@pytest.mark.parametrize("is_stream", [False, True], ids=["JSON", "stream"])
def test_body_that_comes_in_pieces(program, fake, is_stream):
    """A request whose body is a generator is read, and travels with its length."""
    body = json.dumps(program.request(stream=is_stream)).encode()

    async def pieces_soon():
        yield body[:20]
        yield body[20:]

    pieces = pieces_soon() if program.is_async else iter([body[:20], body[20:]])
    assert program.post(json=None, content=pieces).status_code == 200
    (received,) = fake.received
    assert received.header("transfer-encoding") == []
    assert received.header("content-length") == [str(len(received.body))]
    assert program.is_charged(USED)


def test_hooks_and_auth_of_the_program_s(start, fake):
    """They are called as ever: a hook that reads the answer, one that logs the request, and credentials."""
    seen = []
    is_async = []

    def hook(of):
        async def soon(what):
            seen.append((of, what.url.path))
            if of == "response":
                await what.aread()

        def now(what):
            seen.append((of, what.url.path))
            if of == "response":
                what.read()

        return soon if is_async else now

    probe = start()
    is_async += [True] * probe.is_async
    hooks = {"request": [hook("request")], "response": [hook("response")]}
    program = start(event_hooks=hooks, auth=("me", "secret"))
    response = program.post(headers={})
    assert response.json()["usage"]["total_tokens"] == USED
    assert seen == [("request", "/v1/chat/completions"), ("response", "/v1/chat/completions")]
    assert fake.received[0].header("authorization")[0].startswith("Basic ")
    assert program.is_charged(USED)


def test_hook_that_raises_for_a_status(start, fake):
    """What it refuses the program is refunded as what the provider refused."""

    async def soon(response):
        response.raise_for_status()

    def now(response):
        response.raise_for_status()

    async def script(reply):
        await reply.whole(400, JSON, error("no", "invalid_request_error", None))

    fake.script = script
    for hook in (soon, now):
        program = start(event_hooks={"response": [hook]})
        if program.is_async == (hook is soon):
            with pytest.raises(program.kin.HTTPStatusError):
                program.post()
            assert program.is_charged(0)


@pytest.mark.parametrize("is_stream", [False, True], ids=["JSON", "stream"])
def test_response_that_a_transport_has_read(start, kind, fake, is_stream):
    """A transport of tests answers at once with all of a body; that is settled too, gzip or not."""
    body = TWO_WORDS + event_of(usage=usage_of(10, 20)) + DONE if is_stream else WHOLE
    plain = dict(EVENTS if is_stream else JSON)
    packed = {**plain, b"content-encoding": b"gzip"}
    kin = KINDS[kind][2]
    for content, headers in ((body, plain), (gzip.compress(body), packed)):
        response = kin.Response(200, content=content, headers=headers)
        program = start(
            "http://provider.invalid/v1", transport=kin.MockTransport(lambda _, response=response: response)
        )
        if is_stream:
            chunks = program.all(program.chat(stream=True))
            assert [chunk.choices[0].delta.content for chunk in chunks] == ["one", " two"]
        else:
            assert program.post().content == WHOLE
    assert program.used == 2 * USED
    assert fake.received == []


# --- programs that leave -----------------------------------------------------------------------------------------


def leave_loop(program, stream):
    async def soon():
        async for _ in stream:
            break
        await stream.close()

    if hasattr(stream, "__aiter__"):
        return program.run(soon())
    for _ in stream:
        break
    return stream.close()


def leave_block(program, stream):
    async def soon():
        async with stream:
            async for _ in stream:
                break

    if hasattr(stream, "__aiter__"):
        return program.run(soon())
    with stream:
        for _ in stream:
            break
    return None


def leave_it_to_the_collector(program, stream):
    async def soon():
        async for _ in stream:
            break

    if hasattr(stream, "__aiter__"):
        return program.run(soon())
    for _ in stream:
        break
    return None


def streaming_on(connection):
    """Stream some words, and then nothing, until nobody listens."""
    connection.sendall(streamed(TWO_WORDS, cut=True))
    connection.recv(1)


@pytest.mark.parametrize("leave", [leave_loop, leave_block, leave_it_to_the_collector])
def test_stream_that_is_left(faced, rogue, leave):
    """The prompt and what was streamed are charged, and the provider's stream ends."""
    rogue.behave = streaming_on
    leave(faced, faced.chat(stream=True))

    def is_settled():
        if leave is leave_it_to_the_collector:
            gc.collect()
            if faced.is_async:
                faced.run(asyncio.sleep(0))  # a generator that is collected ends in a task
        return faced.is_charged(PROMPT + 2)

    until(is_settled, "it is not settled")
    faced.run(faced.openai.close())


def test_stream_that_nobody_ever_reads(faced, rogue):
    """What was reserved stays spent, and is not left open."""
    rogue.behave = streaming_on
    faced.chat(stream=True)
    gc.collect()
    assert faced.is_charged(RESERVED)
    faced.run(faced.openai.close())  # the connection stays the client's


@only_sync
@only_redis
def test_stream_that_is_collected_in_the_thread_that_talks_to_redis(faced, rogue, limiter):
    """It is settled there without waiting for itself."""
    rogue.behave = streaming_on
    streams = [faced.chat(stream=True)]
    next(iter(streams[0]))

    async def collect():
        streams.clear()
        gc.collect()

    gc.disable()
    try:
        limiter._engine.backend._thread.run(asyncio.wait_for(collect(), 5))
    finally:
        gc.enable()
    until(lambda: faced.is_charged(PROMPT + 2), "it is not settled")


@only_async
def test_call_that_is_cancelled_before_the_answer(faced, rogue):
    """It was sent, and stays spent."""
    rogue.behave = lambda connection: connection.recv(1)

    async def cancelled():
        call = asyncio.create_task(faced.openai.chat.completions.create(**faced.request()))
        await asyncio.to_thread(until, lambda: rogue.received, "nothing is sent")
        call.cancel()
        await call

    with pytest.raises(asyncio.CancelledError):
        faced.run(cancelled())
    assert faced.is_charged(RESERVED)


@only_async
def test_call_that_is_cancelled_within_its_stream(faced, rogue):
    """The prompt and what was streamed are charged."""
    rogue.behave = streaming_on

    async def cancelled():
        began = asyncio.Event()

        async def call():
            async for _ in await faced.openai.chat.completions.create(**faced.request(stream=True)):
                began.set()

        calling = asyncio.create_task(call())
        await began.wait()
        calling.cancel()
        await calling

    with pytest.raises(asyncio.CancelledError):
        faced.run(cancelled())
    assert faced.is_charged(PROMPT + 2)


# --- what the provider does wrong --------------------------------------------------------------------------------


def outcome(program, stream):
    """Return the status of a call without the SDK, or ``CUT``."""

    async def read_soon():
        async with program.http.stream("POST", f"{program.url}/chat/completions", json=request) as response:
            await response.aread()
            return response.status_code

    def read():
        with program.http.stream("POST", f"{program.url}/chat/completions", json=request) as response:
            response.read()
            return response.status_code

    request = program.request(stream=stream)
    try:
        return program.run(read_soon() if program.is_async else read())
    except program.kin.HTTPError:
        return CUT


@only_memory
@pytest.mark.parametrize("kind", ["httpx", "httpx2 async"])  # each kin, and both ways to read
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault(faced, rogue, fault):
    """A guarded client charges what the proxy charges; where that answers for the provider, an error is raised."""
    rogue.behave = saying(fault.sent)
    status = re.match(rb"HTTP/1.1 (\d{3})", fault.sent)
    passes = fault.gets != CUT and fault.code is None
    got = outcome(faced, fault.stream)
    assert got == fault.gets if passes else got == CUT or got == int(status[1])
    assert faced.is_charged(fault.charged)


@only_memory
def test_answer_that_cannot_be_read_leaves_its_connection_free(start, kind, rogue):
    """The next call has it, though the program still looks at what was raised."""
    kin = KINDS[kind][2]
    rogue.reset()
    rogue.behave = saying(answer(b"\x1f\x8bdamaged!", "content-encoding: gzip"))
    options = {"limits": kin.Limits(max_connections=1), "timeout": kin.Timeout(10, pool=0.5)}
    program = start(f"http://127.0.0.1:{rogue.port}/v1", **options)
    with pytest.raises(kin.DecodingError) as raised:
        program.post()
    rogue.behave = saying(answer(WHOLE))
    assert program.post().content == WHOLE
    assert "damaged" in str(raised.value)
    assert program.used == RESERVED + USED


def test_error_of_the_provider_passes_whole_and_is_refunded(faced, rogue):
    """The SDK raises what it raises without us."""
    body = b'{"error":{"message":"no such thing","type":"invalid_request_error","param":"model","code":"odd"}}'
    rogue.behave = saying(answer(body, "x-request-id: req_theirs", "x-odd: 1", status="400 No"))
    with pytest.raises(openai.BadRequestError, match="no such thing") as raised:
        faced.chat()
    assert (raised.value.code, raised.value.param, raised.value.request_id) == ("odd", "model", "req_theirs")
    assert raised.value.response.content == body
    assert raised.value.response.headers["x-odd"] == "1"
    assert faced.is_charged(0)


def test_timeout(start, rogue):
    """The SDK raises its own, and what was sent stays spent."""
    rogue.behave = lambda connection: connection.recv(1)
    program = start(f"http://127.0.0.1:{rogue.port}/v1", sdk={"timeout": 0.1})
    with pytest.raises(openai.APITimeoutError) as raised:
        program.chat()
    assert isinstance(raised.value.__cause__, program.kin.ReadTimeout)
    assert program.is_charged(RESERVED)


def test_timeout_within_a_stream(start, rogue):
    """Likewise, and what was streamed is charged."""
    rogue.behave = streaming_on
    program = start(f"http://127.0.0.1:{rogue.port}/v1", sdk={"timeout": 0.1})
    with pytest.raises(openai.APITimeoutError):
        program.all(program.chat(stream=True))
    assert program.is_charged(PROMPT + 2)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "ftp://127.0.0.1/v1"], ids=["nobody there", "ftp"])
def test_no_connection(start, url):
    """The SDK raises its own with the cause that it has without us, and all tokens come back."""
    program = start(url)
    with pytest.raises(openai.APIConnectionError) as raised:
        program.chat()
    assert isinstance(raised.value.__cause__, program.kin.ConnectError | program.kin.UnsupportedProtocol)
    assert raised.value.__cause__.__cause__ is not None
    assert THEIR_KEY not in f"{raised.value!r} {raised.value.__cause__!r}"
    assert program.is_charged(0)


@only_memory
def test_no_connection_free(start, rogue, kind):
    """A call that waits in vain for a connection of the client's own was never sent: all tokens come back."""
    rogue.behave = streaming_on
    kin = KINDS[kind][2]
    timeout = kin.Timeout(10, pool=0.1)
    limits = kin.Limits(max_connections=1)
    program = start(f"http://127.0.0.1:{rogue.port}/v1", limits=limits, sdk={"timeout": timeout})
    stream = program.chat(stream=True)
    with pytest.raises(openai.APITimeoutError):
        program.chat()
    assert program.used == RESERVED
    program.run(stream.close())
    assert program.is_charged(RESERVED)


def test_client_keeps_a_forgotten_limiter_open(kind, fake, upstream_url, user, tmp_path, caplog):
    """A limiter that nobody but its client knows is open as long as the client is, and saves what that took."""
    url = f"file://{tmp_path}/state"
    with Program(kind, limiting(url), upstream_url, user) as program:
        program._limiter = None
        gc.collect()
        program.chat()
        with pytest.raises(InvalidSetting):
            limiting(url)
    del program
    gc.collect()
    with limiting(url) as limiter:
        assert limiter.peek(user=user)[-1].level == CAPACITY - USED
    caplog.clear()  # it told of the state that it went on from


@only_memory
def test_call_that_gives_back_wakes_who_waits(faced, rogue, limiter, user):
    """A call of the library's that waits for what a client's call has reserved is served when that is settled."""
    served = []

    def behave(connection):
        served.append(waiting.submit(wait))
        until(lambda: len(limiter._desk.line) == 1, "nobody waits")
        connection.sendall(answer(WHOLE))

    def wait():
        with limiter.reserve(user=user, tokens=CAPACITY - USED, wait=60) as call:
            call.refund()

    rogue.behave = behave
    with ThreadPoolExecutor(1) as waiting:
        faced.chat()
        served.pop().result(30)


def test_client_of_a_closed_limiter(kind, upstream_url, user, fake):
    """It sends nothing, and says so."""
    limiter = limiting()
    with Program(kind, limiter, upstream_url, user) as program:
        limiter.close()
        with pytest.raises((RuntimeError, openai.APIConnectionError)) as refused:
            program.chat()
    assert "the limiter is closed" in f"{refused.value} {refused.value.__cause__}"
    assert fake.received == []


@only_memory
def test_client_that_is_closed(start):
    """It says so, and takes nothing."""
    program = start()
    program.run(program.openai.close())
    with pytest.raises(RuntimeError, match="closed"):
        program.post()
    assert program.used == 0


@only_memory
def test_retries_of_the_sdk_are_guarded_each(start, fake):
    """Each attempt is reserved for and settled; one that failed costs nothing."""
    failures = iter([True, True, False])

    async def script(reply):
        if next(failures):
            await reply.whole(500, [(b"retry-after-ms", b"1"), *JSON], b"{}")
        else:
            await fake.answer(reply)

    fake.script = script
    program = start(sdk={"max_retries": 2})
    assert program.chat().usage.total_tokens == USED
    assert len(fake.received) == 3
    assert program.is_charged(USED)


# --- the way there -----------------------------------------------------------------------------------------------


def test_redirects_that_are_followed(start, fake):
    """A call that is sent on is one call."""

    async def script(reply):
        if reply.received.path == "/v1/chat/completions":
            await reply.whole(307, [(b"location", b"/elsewhere/chat")], b"")
        else:
            await fake.answer(reply)

    fake.script = script
    program = start(follow_redirects=True)
    response = program.post()
    assert response.json()["usage"]["total_tokens"] == USED
    assert (response.url.path, len(response.history)) == ("/elsewhere/chat", 1)
    assert [received.path for received in fake.received] == ["/v1/chat/completions", "/elsewhere/chat"]
    assert not any(received.header(name) for received in fake.received for name in IDENTITY)
    assert program.is_charged(USED)


def test_redirect_that_is_not_followed(faced, rogue):
    """The program sees where to, and pays nothing."""
    rogue.behave = saying(answer(b"", "location: /elsewhere", status="302 Found"))
    response = faced.post()
    assert (response.is_redirect, response.headers["location"]) == (True, "/elsewhere")
    assert response.next_request.url.path == "/elsewhere"
    assert faced.is_charged(0)


@pytest.mark.parametrize("by", ["option", "environment"])
@only_memory
def test_proxy_of_http(start, rogue, by, monkeypatch):
    """A client goes through it as ever, whoever told of it; it is not told who calls."""
    proxy = f"http://127.0.0.1:{rogue.port}"
    rogue.reset()
    rogue.behave = saying(answer(WHOLE))
    if by == "environment":
        monkeypatch.setenv("HTTP_PROXY", proxy)
    program = start("http://provider.invalid/v1", **({"proxy": proxy} if by == "option" else {}))
    assert program.chat().usage.total_tokens == USED
    ((asked, _),) = rogue.received
    assert asked.startswith(b"POST http://provider.invalid/v1/chat/completions HTTP/1.1\r\n")
    assert not any(name.encode() in asked.lower() for name in IDENTITY)
    assert program.is_charged(USED)


@only_memory
def test_proxy_of_http_that_refuses(start, rogue):
    """What never got to the provider costs nothing."""
    rogue.behave = saying(head("content-length: 0", status="403 Forbidden"))
    program = start("https://provider.invalid/v1", proxy=f"http://127.0.0.1:{rogue.port}")
    with pytest.raises(openai.APIConnectionError):
        program.chat()
    assert program.is_charged(0)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True], ids=["JSON", "stream"])
def test_refusal_is_the_sdk_s_own(program, limiter, fake, is_stream):
    """It says whose limit it was and when to come back, and nothing is sent or taken."""
    limiter.budgets.set("user", program.user, capacity=100, refill_per_sec=1, level=20)
    with pytest.raises(
        openai.RateLimitError, match=f"user:{program.user} on tokens: limit 100, remaining 20"
    ) as raised:
        program.chat(stream=is_stream)
    refused = raised.value
    assert (refused.type, refused.code) == ("tokens", "rate_limit_exceeded")
    assert 30 <= int(refused.response.headers["retry-after"]) <= 33
    assert refused.response.elapsed.total_seconds() == 0
    assert refused.response.json()["tokenguard"]["scope"] == f"user:{program.user}"
    assert fake.received == []
    assert program.levels[0] == CAPACITY


@only_memory
def test_refusal_is_waited_for_by_the_sdk(start, limiter, fake, user):
    """It retries when we said, and not before: one refusal, one call."""
    limiter.budgets.set("user", user, capacity=1000, refill_per_sec=500, level=0)
    program = start(sdk={"max_retries": 1})
    refusals = metric(limiter, 'tokenguard_refusals_total{meter="tokens",scope="user"}')
    assert program.chat().usage.total_tokens == USED
    assert metric(limiter, 'tokenguard_refusals_total{meter="tokens",scope="user"}') == refusals + 1
    assert len(fake.received) == 1


def metric(limiter, name):
    _, text = limiter._guards._house.metrics.exposition(None)
    found = re.search(rf"\n{re.escape(name)} (\S+)", text.decode())
    return float(found[1]) if found else 0.0


# --- who calls ---------------------------------------------------------------------------------------------------


def test_call_may_say_who_calls(start, limiter, fake, user):
    """What it says stands above what the client says, and does not travel."""
    program = start(who={"user": f"{user}-client", "team": None})
    program.chat(extra_headers={"x-user-id": user, "x-team-id": f"team-of-{user}"})
    assert program.is_charged(USED)
    assert limiter.peek(user=f"{user}-client")[0].level == CAPACITY
    assert not any(fake.received[0].header(name) for name in IDENTITY)


@pytest.mark.parametrize(
    ("who", "headers", "said"),
    [
        ({"user": None, "team": None}, {}, "x-user-id"),
        ({}, {"x-user-id": ""}, "user"),
        ({}, {"x-role": "x" * 257}, "256"),
    ],
    ids=["nobody", "empty", "too long"],
)
@only_memory
def test_identity_that_is_missing_or_bad(start, fake, who, headers, said):
    """It is the program's mistake: a 400, and nothing is sent."""
    program = start(who=who)
    with pytest.raises(openai.BadRequestError, match=said):
        program.chat(extra_headers=headers)
    assert fake.received == []
    assert open_reservations(program._limiter) == 0


@only_memory
def test_client_s_identity_is_checked_when_it_is_made(kind, limiter):
    """A name out of bounds makes no client."""
    with pytest.raises(InvalidValue, match="user"):
        getattr(limiter, KINDS[kind][0])(user="")
    with pytest.raises(InvalidValue, match="team must be a string, got 5"):
        getattr(limiter, KINDS[kind][0])(user="alice", team=5)


# --- other endpoints ---------------------------------------------------------------------------------------------


@only_memory
def test_what_runs_no_model_passes_uncharged(program, fake):
    """Models are listed, and things removed, as ever; who calls stays here."""
    program.run(
        program.openai.models.with_raw_response.list(extra_headers={"x-user-id": "else", "x-team-id": "t"})
    )
    program.run(program.http.delete(f"{program.url}/models/mine"))
    assert [(received.method, received.path) for received in fake.received] == [
        ("GET", "/v1/models"),
        ("DELETE", "/v1/models/mine"),
    ]
    assert fake.received[0].header("authorization") == [f"Bearer {THEIR_KEY}"]
    assert not any(received.header(name) for received in fake.received for name in IDENTITY)
    assert program.used == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.embeddings.create(model="m", input="hello"),
        lambda client: client.responses.create(model="m", input="hello"),
        lambda client: client.completions.create(model="m", prompt="hello"),
        lambda client: client.post("/chat/completions/", body={}, cast_to=object),
        lambda client: client.put("/chat/completions", body={}, cast_to=object),
        lambda client: client.get("/realtime", options={"headers": {"upgrade": "websocket"}}, cast_to=object),
    ],
    ids=["embeddings", "responses", "completions", "another path", "another method", "a socket"],
)
@only_memory
def test_nothing_gets_around_the_budgets(program, fake, call):
    """What is not guarded is not sent; the SDK's error says what to do."""
    with pytest.raises(openai.NotFoundError, match="not guarded: TokenGuard guards POST …/chat/completions only"):
        program.run(call(program.openai))
    assert fake.received == []


# --- many at once, and one after the other -----------------------------------------------------------------------


@only_sync
def test_threads_share_a_client(program, limiter):
    """Their levels are exact."""
    with ThreadPoolExecutor(16) as threads:
        answers = list(
            threads.map(lambda i: program.all(program.chat(stream=True)) if i % 2 else program.chat(), range(96))
        )
    assert len(answers) == 96
    assert program.levels == (CAPACITY - 96 * USED,) * 2
    assert open_reservations(limiter) == 0


@only_async
def test_tasks_share_a_client(program, limiter):
    """Likewise."""

    async def many():
        calls = (program.openai.chat.completions.create(**program.request()) for _ in range(48))
        return await asyncio.gather(*calls)

    assert len(program.run(many())) == 48
    assert program.levels == (CAPACITY - 48 * USED,) * 2
    assert open_reservations(limiter) == 0


@only_async
def test_event_loops_one_after_the_other(kind, limiter, upstream_url, user):
    """One limiter serves them all."""
    for turn in range(1, 6):
        with Program(kind, limiter, upstream_url, user) as program:
            program.all(program.chat(stream=True))
            program.chat()
            assert program.used == turn * 2 * USED
    assert open_reservations(limiter) == 0


# --- what is learned ---------------------------------------------------------------------------------------------


@only_memory
def test_estimate_learns_of_usage(program, limiter, fake):
    """What answers took is expected of the next ones."""
    request = program.request()
    del request["max_tokens"]
    assert limiter.estimate(request, user=program.user) == {
        "tokens": PROMPT + 256,
        "prompt": PROMPT,
        "model": program.model,
    }
    for _ in range(30):
        program.chat()
    assert limiter.estimate(request, user=program.user)["tokens"] < PROMPT + 50


def test_limits_of_the_provider_are_learned(start, limiter, provider, behind_limits):
    """What its answers tell of a model is a budget of that model's."""
    program = start(behind_limits["OPENAI_BASE_URL"])
    provider.limits[program.model] = Limits(Limit(600), Limit(30_000))
    program.chat()

    def learned():
        budgets = [state.budget for state in limiter.budgets.list() if state.budget.name.model == program.model]
        return sorted((*budget.name[1:], budget.scale.capacity) for budget in budgets)

    of_headers = [("requests", program.model, "headers", 600), ("tokens", program.model, "headers", 30_000)]
    until(lambda: learned() == of_headers, "it is not learned")


def test_refusal_of_the_provider_closes_its_gate(program, fake):
    """The next call of the model is told to wait, and not sent."""
    fake.script = rate_limited(40)
    with pytest.raises(openai.RateLimitError, match="Limit 3, Used 3"):
        program.chat()
    with pytest.raises(openai.RateLimitError, match="The provider asked to wait"):
        program.chat()
    assert len(fake.received) == 1
    assert program.is_charged(0)


def test_limits_of_the_provider_can_be_left_alone(kind, upstream_url, fake, user):
    """Then nothing is learned, and no gate closes."""
    with limiting(TOKENGUARD_PROVIDER_LIMITS="off") as limiter:
        with Program(kind, limiter, upstream_url, user) as program:
            program.chat()
            assert limiter.budgets.list() == []
            fake.script = rate_limited(40)
            for _ in range(2):
                with pytest.raises(openai.RateLimitError, match="Limit 3, Used 3"):
                    program.chat()
        assert len(fake.received) == 3
