"""The command line and the life of the server: starting, saying what is wrong, stopping."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY, environment, running
from tests.e2e.fake_openai import EVENTS, delta, event, in_two_parts

MESSAGES = [{"role": "user", "content": "Say hello"}]


def tokenguard(folder, *arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "tokenguard", *arguments],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_version_is_told(tmp_path):
    """``--version`` tells name and version, and nothing else."""
    done = tokenguard(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.split()[0] == "tokenguard"


def test_without_a_key_it_says_how_to_go_on(tmp_path):
    """``serve`` without a key refuses to start and names both ways out."""
    done = tokenguard(tmp_path, "serve")
    assert done.returncode == 1
    assert "OPENAI_API_KEY" in done.stderr
    assert "tokenguard demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"TOKENGUARD_ADMIN_TOKN": "x"}, ("TOKENGUARD_ADMIN_TOKN", "did you mean TOKENGUARD_ADMIN_TOKEN")),
        ({"CAP_USR": "5"}, ("CAP_USR", "did you mean CAP_USER")),
        ({"CAP_USER": "many"}, ("CAP_USER", "'many'", "whole number")),
        ({"RATE_USER": "-1"}, ("RATE_USER", "'-1'")),
        ({"OPENAI_BASE_URL": "api.openai.com"}, ("OPENAI_BASE_URL", "'api.openai.com'", "http")),
    ],
)
def test_setting_that_cannot_be_stops_the_start(tmp_path, settings, parts):
    """A typo or an impossible value is named with what is allowed."""
    done = tokenguard(tmp_path, "demo", **settings)
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use_is_said_in_a_line(tmp_path):
    """A port that somebody else has is an error that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tokenguard(tmp_path, "demo", "--port", str(port))
    assert done.returncode != 0
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_dotenv_that_is_not_text_is_said_in_a_line(tmp_path):
    """A .env in another encoding is named, and is no traceback."""
    (tmp_path / ".env").write_bytes("CAP_USER=5\n".encode("utf-16"))
    done = tokenguard(tmp_path, "demo")
    assert done.returncode == 1
    assert ".env must be UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


def test_start_line_tells_what_is_guarded(tmp_path):
    """The start-up line has address, backend, upstream, and the scopes with their defaults."""
    with running(tmp_path, "demo", CAP_ROLE=70, RATE_ROLE="0.5", CAP_TEAM="unlimited") as server:
        line = server.start_line
        assert server.url in line
        for part in ("memory", "demo", "global 10000 tokens, 50/s", "role 70 tokens, 0.5/s", "user 1000 tokens"):
            assert part in line
        assert "team" not in line


def test_settings_come_from_dotenv_and_the_environment_wins(tmp_path):
    """``.env`` in the working directory is read; what the environment says goes before it."""
    (tmp_path / ".env").write_text("CAP_USER=77\nRATE_USER=1\nCAP_TEAM=88\n")
    with running(tmp_path, "demo", CAP_TEAM=99) as server:
        assert httpx.get(f"{server.url}/config/budget/user/u").json()["capacity"] == 77
        assert httpx.get(f"{server.url}/config/budget/team/t").json()["capacity"] == 99


def test_health_tells_what_runs(server):
    """``GET /`` tells name, version, status, backend and time."""
    health = httpx.get(server.url).json()
    assert health["name"] == "tokenguard"
    assert health["status"] == "ok"
    assert health["backend"].startswith(("memory", "redis"))
    assert "trouble" not in health
    assert health["time"].endswith("Z")
    assert health["version"]


def test_demo_answers_the_sdk_plain_and_streamed(tmp_path):
    """The built-in upstream says that it is a demo, tells usage, and is charged for."""
    with running(tmp_path, "demo", RATE_USER=0) as server:
        client = server.client("alice")
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        assert "demo" in answer.choices[0].message.content
        assert server.level("user", "alice") == 1000 - answer.usage.total_tokens
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options=options, n=2)
        )
        text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == 1)
        assert text == answer.choices[0].message.content
        assert server.level("user", "alice") == 1000 - answer.usage.total_tokens - chunks[-1].usage.total_tokens
        short = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2.0, n=1.0)
        assert short.choices[0].finish_reason == "length"
        assert [model.id for model in client.models.list()] == ["tokenguard-demo"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


def test_provider_that_is_not_there_costs_nothing(tmp_path, user):
    """Where no connection comes about, the caller gets a 502 in the usual shape and its tokens back."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with running(tmp_path, "serve", OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=url, RATE_USER=0) as server:
        with pytest.raises(openai.InternalServerError) as raised:
            server.client(user).chat.completions.create(model="m", messages=MESSAGES)
        assert raised.value.status_code == 502
        assert raised.value.code == "upstream_unreachable"
        assert server.level("user", user) == 1000
        assert httpx.get(f"{server.url}/v1/models").status_code == 502
        assert server.log.count("the provider could not be reached (ConnectionRefusedError: ") == 2
        assert OUR_KEY not in server.log


def test_provider_that_takes_too_long_stays_charged(tmp_path, fake, upstream_url, user):
    """After the request was sent, a time-out is a 504, and what was reserved stays spent."""

    async def script(reply):
        await reply.until_gone()

    fake.script = script
    with running(
        tmp_path,
        "serve",
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        RATE_USER=0,
        TOKENGUARD_READ_TIMEOUT_S="0.2",
    ) as server:
        with pytest.raises(openai.InternalServerError) as raised:
            server.client(user).chat.completions.create(model="m", messages=MESSAGES, max_tokens=50)
        assert raised.value.status_code == 504
        assert server.level("user", user) == 1000 - 9 - 50


@pytest.mark.parametrize("driver", DRIVERS)
def test_stopping_lets_running_streams_end(driver, tmp_path, fake, upstream_url, upstream_loop, user):
    """SIGTERM waits for a stream that is under way, which its caller receives whole; the exit code is 0."""
    stopping = asyncio.Event()

    fake.script = in_two_parts("one", "two", stopping)
    with DRIVERS[driver](tmp_path, OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=upstream_url) as server:
        stream = server.client(user).chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert next(stream).choices[0].delta.content == "one"
        server.process.terminate()
        upstream_loop.call_soon_threadsafe(stopping.set)
        assert [chunk.choices[0].delta.content for chunk in stream] == ["two"]
        assert server.process.wait(20) == 0


def test_calls_that_do_not_end_in_time_are_cut_without_a_traceback(tmp_path, fake, upstream_url, user):
    """When patience is over, a waiting caller gets a 503 in the usual shape, and a stream breaks off."""
    arrived = threading.Event()

    async def script(reply):
        if reply.received.json.get("stream"):
            await reply.head(headers=EVENTS)
            await reply.piece(event(reply.received, delta("one")))
        else:
            arrived.set()
        await reply.until_gone()

    fake.script = script
    with (
        running(
            tmp_path,
            "serve",
            OPENAI_API_KEY=OUR_KEY,
            OPENAI_BASE_URL=upstream_url,
            TOKENGUARD_SHUTDOWN_TIMEOUT_S=1,
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        stream = server.client(user).chat.completions.create(model="m", messages=MESSAGES, stream=True)
        next(stream)
        waiting = pool.submit(server.client(user).chat.completions.create, model="m", messages=MESSAGES)
        assert arrived.wait(10)
        assert server.stop() == 0
        with pytest.raises(openai.InternalServerError, match="stopping") as raised:
            waiting.result(10)
        assert raised.value.status_code == 503
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            list(stream)
        assert "stopping: 2 running calls have 1 s to end" in server.log


def test_body_over_the_limit_is_refused(tmp_path, user):
    """A body longer than TOKENGUARD_MAX_BODY_BYTES is a 413, whether its length was told or not."""
    with running(tmp_path, "demo", TOKENGUARD_MAX_BODY_BYTES=100) as server:
        for content in (b"x" * 101, iter([b"x" * 60, b"x" * 60])):
            answer = server.post("/v1/chat/completions", content=content, headers={"x-user-id": user})
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"


def test_full_table_is_a_clear_503(tmp_path):
    """When no bucket is free and none is full, a new user is told so, and known users go on."""
    with running(tmp_path, "demo", TOKENGUARD_BUCKETS=2, CAP_TEAM="unlimited", RATE_USER=0) as server:
        server.client("first").chat.completions.create(model="m", messages=MESSAGES)
        with pytest.raises(openai.InternalServerError) as raised:
            server.client("second").chat.completions.create(model="m", messages=MESSAGES)
        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"] == "1"
        server.client("first").chat.completions.create(model="m", messages=MESSAGES)


def test_what_is_no_http_is_answered_in_the_usual_shape(tmp_path):
    """Garbage gets a 400 with the provider's error body, and the connection is closed."""
    with running(tmp_path, "demo") as server, connection_to(server) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_caller_who_never_ends_a_head_is_given_up(tmp_path, before):
    """Half a head holds a connection for TOKENGUARD_CALLER_TIMEOUT_S, be it the first or a later one."""
    with (
        running(tmp_path, "demo", TOKENGUARD_CALLER_TIMEOUT_S="0.3") as server,
        connection_to(server) as connection,
    ):
        connection.sendall(before + b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
        received = connection.makefile("rb").read()
    assert received.count(b"HTTP/1.1 200 ") == (1 if before else 0)


def connection_to(server):
    return socket.create_connection(httpx.URL(server.url).netloc.decode().split(":"), timeout=10)
