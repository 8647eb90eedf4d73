"""A guarded chat completion, from the caller's side and from the provider's."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.conftest import OUR_KEY, THEIR_KEY, running
from tests.e2e.fake_openai import EVENTS, JSON, WORDS, completion, delta, event, in_two_parts, usage_of

MESSAGES = [{"role": "user", "content": "Say hello"}]
CAPACITY = 10**6


def chat(client, model="gpt-4o-mini", **more):
    return client.chat.completions.create(model=model, messages=MESSAGES, **more)


def test_completion_comes_back_and_its_usage_is_charged(server, fake, user):
    """A call returns the provider's answer, and every bucket on its path pays what it took."""
    server.set_budget("team", f"team-of-{user}", 5000)
    answer = chat(server.client(user, **{"x-team-id": f"team-of-{user}"}))
    assert answer.choices[0].message.content == "Hello there"
    assert answer.usage.total_tokens == 30
    assert server.level("user", user) == CAPACITY - 30
    assert server.level("team", f"team-of-{user}") == 5000 - 30


def test_async_client_gets_its_answer(server, fake, user):
    """The asynchronous SDK works as the synchronous one does."""

    async def call():
        async with server.client(user, openai.AsyncOpenAI) as client:
            return await chat(client)

    assert asyncio.run(call()).usage.total_tokens == 30


def test_body_travels_byte_for_byte(server, fake, user):
    """What is not ours to change reaches the provider as it came, spaces, escapes and unknown members too."""
    body = b'{ "messages":[{"role":"user","content":"h\\u00e9\\n"}] ,"model":"m", "future" : {"x":1.50}}'
    answer = server.post("/v1/chat/completions", content=body, headers={"x-user-id": user})
    assert answer.status_code == 200
    assert fake.received[-1].body == body


def test_only_our_credentials_travel(server, fake, user):
    """The provider sees our key, and neither the caller's nor who the caller is."""
    headers = {
        "x-user-id": user,
        "x-team-id": "t",
        "x-role": "r",
        "x-llm-rolegroup": "g",
        "authorization": f"Bearer {THEIR_KEY}",
        "cookie": "session=secret",
        "openai-organization": "org-theirs",
        "x-forwarded-for": "10.1.2.3",
        "x-trace": "kept",
        "accept-encoding": "gzip, br",
    }
    server.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES}, headers=headers
    ).raise_for_status()
    received = fake.received[-1]
    assert received.header("authorization") == [f"Bearer {OUR_KEY}"]
    assert received.header("accept-encoding") == ["identity"]
    assert received.header("content-type") == ["application/json"]
    assert received.header("x-trace") == ["kept"]
    for name in headers.keys() - {"authorization", "accept-encoding", "x-trace"}:
        assert received.header(name) == []
    assert THEIR_KEY not in str(received.headers)


def test_headers_tell_our_limits_and_the_providers_apart(server, fake, user):
    """Our limits stand in the usual fields, the provider's under a name of their own."""
    server.set_budget("user", user, 1000, refill=100)
    server.set_budget("user", user, 50, meter="requests")
    raw = server.client(user).chat.completions.with_raw_response.create(
        model=f"model-of-{user}", messages=MESSAGES
    )
    assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
    assert 700 <= int(raw.headers["x-ratelimit-remaining-tokens"]) <= 750
    assert raw.headers["x-ratelimit-reset-tokens"].endswith("s")
    assert raw.headers["x-ratelimit-limit-requests"] == "50"
    assert raw.headers["x-ratelimit-remaining-requests"] == "49"
    assert raw.headers["x-upstream-ratelimit-limit-requests"] == "10000"
    assert raw.headers["x-upstream-ratelimit-reset-requests"] == "8.64s"


def test_stream_is_complete_and_its_usage_is_charged_unseen(server, fake, user):
    """A stream comes back as the caller asked for it, and is charged though it asked for no usage."""
    chunks = list(chat(server.client(user), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(WORDS)
    assert all(chunk.choices for chunk in chunks)
    assert fake.received[-1].json["stream_options"] == {"include_usage": True}
    assert server.level("user", user) == CAPACITY - 30


def test_usage_of_a_stream_is_passed_on_if_asked_for(server, fake, user):
    """A caller who asks for the usage gets the chunk that tells it, and the body is not touched."""
    options = {"include_usage": True, "include_obfuscation": False}
    chunks = list(chat(server.client(user), stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 30
    assert fake.received[-1].json["stream_options"] == options


def test_other_stream_options_are_kept(server, fake, user):
    """Asking for the usage leaves the caller's other options, and all other bytes, as they were."""
    body = '{"stream": true,"stream_options" : {"include_obfuscation": false}, "messages":[],  "model":"m"}'
    server.post("/v1/chat/completions", content=body, headers={"x-user-id": user}).raise_for_status()
    before, after = '{"include_obfuscation"', '{"include_usage":true,"include_obfuscation"'
    assert fake.received[-1].body == body.replace(before, after).encode()


def test_chunks_are_relayed_as_they_come(server, fake, user, upstream_loop):
    """The first chunk reaches the caller while the provider still holds back the second."""
    go_on = asyncio.Event()

    fake.script = in_two_parts("first", "second", go_on)
    stream = chat(server.client(user), stream=True)
    assert next(stream).choices[0].delta.content == "first"
    upstream_loop.call_soon_threadsafe(go_on.set)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["second"]


def test_models_are_passed_through_uncharged(server, fake):
    """The list of models and one model need no user and cost nothing."""
    before = server.level("global", "*")
    assert httpx.get(f"{server.url}/v1/models").json() == {"object": "list", "data": []}
    assert httpx.get(f"{server.url}/v1/models/org/some-model").json() == {"id": "org/some-model"}
    assert fake.received[-1].header("authorization") == [f"Bearer {OUR_KEY}"]
    assert server.level("global", "*") >= before


@pytest.mark.parametrize("path", ["../files", "%2e%2e/files", "a/../../files", "a//b", "a/%2e"])
def test_path_of_a_model_opens_no_other_door(server, fake, path):
    """Our key reaches the models endpoint of the provider and no other, however the id is written."""
    with socket.create_connection(httpx.URL(server.url).netloc.decode().split(":")) as connection:
        connection.sendall(f"GET /v1/models/{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert b" 400 " in connection.makefile("rb").readline()
    assert fake.received == []


# --- refusals -----------------------------------------------------------------------------------------------


def test_call_after_the_budget_is_gone_is_refused_with_whose_and_when(server, fake, user):
    """The SDK raises RateLimitError, which says whose limit it was, how much is missing, and when to return."""
    server.set_budget("user", user, 100, refill=2, level=10)
    with pytest.raises(openai.RateLimitError) as refusal:
        chat(server.client(user), max_tokens=40)
    error = refusal.value
    assert (error.status_code, error.type, error.code, error.param) == (429, "tokens", "rate_limit_exceeded", None)
    assert f"user:{user} on tokens: limit 100, remaining 10, requested 49" in error.message
    assert "TokenGuard" in error.message
    headers = error.response.headers
    assert 19 <= int(headers["retry-after"]) <= 22
    assert 19_000 <= int(headers["retry-after-ms"]) <= 21_500
    assert "x-should-retry" not in headers
    assert headers["x-ratelimit-limit-tokens"] == "100"
    assert fake.received == []


def test_refusal_shows_every_scope_and_touches_none(server, fake, user):
    """A call that one scope refuses leaves the others as they were, and says how each of them stood."""
    server.set_budget("team", f"team-of-{user}", 5000)
    server.set_budget("user", user, 100, level=5)
    client = server.client(user, **{"x-team-id": f"team-of-{user}"})
    with pytest.raises(openai.RateLimitError) as refusal:
        chat(client, model=f"model-of-{user}")  # whose limits nobody has learned
    states = json.loads(refusal.value.response.text)["tokenguard"]
    assert states["scope"] == f"user:{user}"
    assert [(bucket["scope"], bucket["allowed"]) for bucket in states["buckets"]] == [
        ("global", True),
        ("team", True),
        ("user", False),
    ]
    assert server.level("team", f"team-of-{user}") == 5000
    assert server.level("user", user) == 5


def test_sdk_waits_as_told_and_then_passes(server, fake, user):
    """The SDK's own retry, left to its defaults, comes back after the time given and is let through."""
    server.set_budget("user", user, 100, refill=200, level=0)
    answer = chat(server.client(user).with_options(max_retries=1), max_tokens=30)
    assert answer.usage.total_tokens == 30
    assert len(fake.received) == 1


def test_request_that_can_never_pass_is_not_retried(server, fake, user):
    """A prompt that is larger than the budget is refused for good, and the SDK does not try again."""
    server.set_budget("user", user, 100, refill=1)
    messages = [{"role": "user", "content": "word " * 1000}]
    with pytest.raises(openai.RateLimitError, match="Request too large") as refusal:
        server.client(user).with_options(max_retries=2).chat.completions.create(model="m", messages=messages)
    headers = refusal.value.response.headers
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers
    assert refusal.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_requests_budget_counts_calls(server, fake, user):
    """A budget of the meter requests lets so many calls pass, whatever they take."""
    server.set_budget("user", user, 2, meter="requests")
    client = server.client(user)
    chat(client)
    chat(client)
    with pytest.raises(openai.RateLimitError) as refusal:
        chat(client)
    assert refusal.value.type == "requests"


def test_64_callers_at_once_share_one_budget_exactly(server, fake, user):
    """However many call at once, no more is admitted than there is, and every token is accounted for."""
    fake.usage = usage_of(9, 20)
    server.set_budget("user", user, 3000)

    async def callers():
        async with server.client(user, openai.AsyncOpenAI) as client:
            calls = (chat(client, max_tokens=20) for _ in range(64 * 3))
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(callers())
    admitted = sum(not isinstance(answer, openai.RateLimitError) for answer in answers)
    assert admitted == 3000 // 29
    assert all(answer.usage.total_tokens == 29 for answer in answers if not isinstance(answer, Exception))
    assert server.level("user", user) == 3000 - 29 * admitted


def test_model_budget_binds_that_model_only(server, fake, user):
    """A budget for one model leaves calls of another alone."""
    server.set_budget("user", user, 100, model="dear", level=0)
    client = server.client(user)
    client.chat.completions.create(model="cheap", messages=MESSAGES)
    with pytest.raises(openai.RateLimitError, match="of dear"):
        client.chat.completions.create(model="dear", messages=MESSAGES)


# --- bad requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        (b'{"model":"m","messages":[]}', {}, 400, "x-user-id"),
        (b'{"model":"m","messages":[]}', {"x-user-id": "u", "x-team-id": "a" * 257}, 400, "x-team-id"),
        (b'{"model":"m","messages":[]}', {"x-user-id": "u", "content-encoding": "gzip"}, 415, "content-encoding"),
        (b"not json", {"x-user-id": "u"}, 400, "body"),
        (b'{"model":"m","model":"n","messages":[]}', {"x-user-id": "u"}, 400, "model"),
        (b'{"model":5,"messages":[]}', {"x-user-id": "u"}, 400, "model"),
        (b'{"model":"m","messages":[],"n":0}', {"x-user-id": "u"}, 400, "n"),
        (b'{"model":"m","messages":[],"max_tokens":-1}', {"x-user-id": "u"}, 400, "max_tokens"),
    ],
)
def test_bad_request_is_refused_and_not_forwarded(server, fake, body, headers, status, param):
    """What cannot be read is a 4xx in the provider's shape that names the field, and reaches nobody."""
    answer = server.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert fake.received == []


def test_header_given_twice_is_refused(server, fake):
    """An identity that is ambiguous is none."""
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "m", "messages": []},
        headers=[("x-user-id", "a"), ("x-user-id", "b")],
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-user-id")


@pytest.mark.parametrize("written", ["{} ", "{}\t", "  {} \t "])
def test_white_space_around_a_header_is_no_part_of_it(server, fake, user, written):
    """A sloppy client does not slip out of its budget: HTTP's optional white space names nobody else."""
    server.set_budget("user", user, 10, level=0)
    body = b'{"model":"m","messages":[]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-user-id:{written.format(user)}\r\n"
    with socket.create_connection(httpx.URL(server.url).netloc.decode().split(":")) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        assert b" 429 " in connection.makefile("rb").readline()


def test_unknown_path_and_method_answer_in_the_same_shape(server):
    """A path or a method that is not there is an error of the provider's shape too."""
    message = httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"]
    assert message.startswith("Invalid URL (GET /v1/nothing): TokenGuard serves /v1/chat/completions")
    answer = httpx.get(f"{server.url}/v1/chat/completions")
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# --- how calls end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_providers_error_passes_and_costs_the_request_only(server, fake, user, status):
    """Status, body and fields of the provider's error reach the caller, and all tokens are given back."""
    error = {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}

    async def script(reply):
        await reply.whole(status, [*JSON, (b"retry-after", b"7")], json.dumps(error).encode())

    fake.script = script
    server.set_budget("user", user, 10, meter="requests")
    with pytest.raises(openai.APIStatusError) as raised:
        chat(server.client(user), model=f"model-of-{user}")  # which a 429 holds back
    assert raised.value.status_code == status
    assert raised.value.response.json() == error
    assert raised.value.response.headers["retry-after"] == "7"
    assert server.level("user", user) == CAPACITY
    assert server.level("user", user, meter="requests") == 9


@pytest.mark.parametrize("line", [b"HTTP/1.1 799 Weird", b"HTTP/1.1 099 Low", b"garbage"])
def test_answer_that_is_no_http_is_a_502(tmp_path, user, line):
    """What cannot be passed on is said to be the provider's fault, and stays charged: it may have worked."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(line + b"\r\ncontent-length: 0\r\n\r\n")

        pool.submit(answer)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with running(tmp_path, "serve", OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=url, RATE_USER=0) as server:
            with pytest.raises(openai.InternalServerError) as raised:
                chat(server.client(user), max_tokens=50)
            assert raised.value.status_code == 502
            assert server.level("user", user) == 1000 - 9 - 50


def test_provider_that_breaks_off_a_stream_is_not_covered_up(server, fake, user):
    """A stream that the provider cuts ends with an error for the caller, who pays for what came."""

    async def script(reply):
        await reply.head(headers=EVENTS)
        await reply.piece(event(reply.received, delta("one")) + event(reply.received, delta(" two")))
        raise ConnectionAbortedError

    fake.script = script
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)) as raised:
        list(chat(server.client(user), stream=True))
    assert "peer closed" in str(raised.value) or "Connection error" in str(raised.value)
    prompt = 3 + 3 + 3  # nine bytes of text, the framing of a message and of the prompt
    assert server.level("user", user) == CAPACITY - prompt - 2


def test_caller_who_leaves_a_stream_pays_for_what_was_streamed(server, fake, user, upstream_loop):
    """When the caller hangs up, the provider's stream is closed and the output so far is charged."""
    closed = threading.Event()

    async def script(reply):
        await reply.head(headers=EVENTS)
        await reply.piece(event(reply.received, delta("word")) * 5)
        await reply.until_gone()
        closed.set()

    fake.script = script
    stream = chat(server.client(user), stream=True)
    next(stream)
    stream.close()
    assert closed.wait(10)
    wait_for(lambda: server.level("user", user) == CAPACITY - 9 - 5)


def test_caller_who_leaves_before_any_output_pays_the_reservation(server, fake, user):
    """When the caller hangs up on a stream that has shown nothing yet, what was reserved stays spent."""
    arrived, closed = threading.Event(), threading.Event()

    async def script(reply):
        arrived.set()
        await reply.until_gone()
        closed.set()

    fake.script = script
    body = {"model": f"model-of-{user}", "messages": MESSAGES, "stream": True, "max_tokens": 50}
    hang_up(server, user, body)
    assert arrived.wait(10)
    assert closed.wait(10)
    assert server.level("user", user) == CAPACITY - 9 - 50


def test_caller_who_leaves_a_plain_call_pays_what_it_took(server, fake, user, upstream_loop):
    """A call that is not streamed runs on without its caller, to learn what it really took."""
    go_on, finished = asyncio.Event(), threading.Event()

    async def script(reply):
        await go_on.wait()
        await reply.whole(200, JSON, completion(reply.received, usage_of(10, 90)))
        finished.set()

    fake.script = script
    body = {"model": f"model-of-{user}", "messages": MESSAGES, "max_tokens": 50}
    hang_up(server, user, body)
    assert server.level("user", user) == CAPACITY - 9 - 50
    upstream_loop.call_soon_threadsafe(go_on.set)
    assert finished.wait(10)
    wait_for(lambda: server.level("user", user) == CAPACITY - 100)


def hang_up(server, user, body):
    """Make a call and leave before it is answered."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body,
            headers={"x-user-id": user},
            timeout=httpx.Timeout(10, read=0.3),
        )


def wait_for(condition):
    """Wait until something holds that nobody announces; each look is a request, so that is no busy loop."""
    for _ in range(1000):
        if condition():
            return
    pytest.fail("it never held")
